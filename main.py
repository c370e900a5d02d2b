"""Trains and evaluates: python main.py --config=configs/pretrain.py[:VARIANT] --workdir=runs/NAME [--config.KEY=VALUE]

The same as python -m m2d_clap_jax.train.
"""
from m2d_clap_jax.train.__main__ import start

if __name__ == '__main__':
  start()
