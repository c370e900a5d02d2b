"""The `m2d-clap` command. Each subcommand is a module of `m2d_clap_jax.cli`, imported when it is used."""
import argparse
import importlib
import os
import sys

from absl import logging

from m2d_clap_jax.errors import EXIT_INTERRUPTED, UserError, disk_full, interrupts_in_one_line, missing_extra
from m2d_clap_jax.startup import missing_device, prepare_process

COMMANDS = {
    'prepare': 'audio and captions -> TFRecord shards',
    'captions': "a manifest's captions, to be embedded elsewhere",
    'embed': 'audio files -> embeddings in a .npz or .parquet file',
    'classify': 'audio files -> how well labels of your choice fit them',
    'demo': 'a page to try a model in a browser',
    'models': 'the released models that can be opened by name',
    'info': 'what a model is and how it was made',
    'convert': 'a model -> a portable folder, or a checkpoint for PyTorch',
    'plan': 'settings for pre-training on a TPU, without one',
    'plot': 'curves of runs, and what a model attends to in a sound',
    'push': 'a portable folder -> the Hugging Face Hub',
    'pull': 'a model from the Hugging Face Hub',
    'fetch': 'a data set of TensorFlow Datasets -> an evaluation task',
    'report': 'results of evaluations -> the tables of the paper',
}


def main(argv=None):
  """Runs one subcommand; returns the exit code: 0, 2 for a user's mistake (one line on stderr), 130 for Ctrl-C."""
  if argv is None:  # the process is the command's own
    prepare_process()
  logging.set_verbosity(logging.ERROR)  # orbax warns about intended behaviour
  args = parse(sys.argv[1:] if argv is None else argv)
  resumes = '; the same command continues where it stopped' if args.command in ('prepare', 'fetch') else ''
  try:
    with interrupts_in_one_line(f'm2d-clap: interrupted{resumes}'):
      args.run(args)
      sys.stdout.flush()
  except UserError as e:
    print(f'm2d-clap: {e}', file=sys.stderr)
    return 2
  except (RuntimeError, AssertionError, ModuleNotFoundError) as e:
    if not (reason := missing_extra(e) or missing_device()):
      raise
    print(f'm2d-clap: {reason}', file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    return EXIT_INTERRUPTED
  except BrokenPipeError:  # after `m2d-clap ... | head`; Python would report an error when it flushes at exit
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
  except Exception as e:
    if not disk_full(e):
      raise
    print(f'm2d-clap: {disk_full(e)}: make room', file=sys.stderr)
    return 2
  return 0


def parse(argv):
  """Command line -> arguments, with `run` among them. Exits, as argparse does, for --help and for mistakes."""
  parser = argparse.ArgumentParser(prog='m2d-clap', description='M2D-CLAP: tools around training and using models.')
  parser.add_argument('--version', action=_Version)
  commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
  for name, about in COMMANDS.items():
    subparser = commands.add_parser(name, help=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    if name in argv[:1]:
      command = importlib.import_module(f'm2d_clap_jax.cli.{name}')
      command.add_arguments(subparser)
      subparser.set_defaults(run=command.run)
  return parser.parse_args(argv)


class _Version(argparse.Action):
  """--version: looked up only when it is asked for."""

  def __init__(self, **options):
    super().__init__(**options, nargs=0, help='show the version and exit')

  def __call__(self, parser, *_):
    from m2d_clap_jax import __version__
    print(f'm2d-clap {__version__}')
    parser.exit()
