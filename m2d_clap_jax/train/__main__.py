"""Trains and evaluates:

python -m m2d_clap_jax.train --config=pretrain.py[:VARIANT] --workdir=runs/NAME [--config.KEY=VALUE]
"""
import sys

from m2d_clap_jax.errors import INTERRUPTED_RUN, end_on_interrupt, missing_extra
from m2d_clap_jax.startup import prepare_process


def start():
  """What main.py does, too."""
  end_on_interrupt(INTERRUPTED_RUN)  # the imports take seconds
  prepare_process()
  try:
    from m2d_clap_jax.train.main import main
  except ModuleNotFoundError as error:
    if not (reason := missing_extra(error)):
      raise
    print(f'error: {reason}', file=sys.stderr)
    sys.exit(2)
  main()


if __name__ == '__main__':
  start()
