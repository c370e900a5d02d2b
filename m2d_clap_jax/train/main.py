"""The command `python -m m2d_clap_jax.train`, also as `python main.py`: parses the configuration and runs its driver."""
import importlib
import os
import re
import runpy
import sys
import traceback

from absl import app, flags, logging
from ml_collections import config_flags

from m2d_clap_jax import configs
from m2d_clap_jax.errors import (
  EXIT_INTERRUPTED,
  INTERRUPTED_RUN,
  UserError,
  disk_full,
  interrupts_in_one_line,
  missing_extra,
)
from m2d_clap_jax.startup import missing_device
from m2d_clap_jax.train.faults import EXIT_PREEMPTED, EXIT_STALLED, PeerLostError, Preempted

# config.job -> module, function
DRIVERS = {'pretrain': ('m2d_clap_jax.train.pretrain', 'run'),
           'finetune': ('m2d_clap_jax.train.finetune', 'run'),
           'clap': ('m2d_clap_jax.train.clap', 'run'),
           **dict.fromkeys(('linear', 'zeroshot', 'retrieval'), ('m2d_clap_jax.eval.finished', 'run'))}

_CONFIG = config_flags.DEFINE_config_file('config', None, 'What to do, e.g. configs/pretrain.py:demo', lock_config=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Where checkpoints, logs and figures go; a run there is continued.')
_DISTRIBUTED = flags.DEFINE_bool('distributed', False, 'Join the processes of a pod or cluster (jax.distributed).')
_PRINT = '--config.print=True'  # shows the whole configuration and stops
_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'Open the data, make the model, show its memory, and stop before training.')
_COORDINATOR = flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0, for processes started by hand.')
_PROCESS = flags.DEFINE_string('process', None, 'I/N: this is process I, from 0, of N; with --coordinator.')
_PEER_TIMEOUT = flags.DEFINE_integer(
    'peer_timeout', 100, 'Seconds without a heartbeat after which another process is considered lost.', lower_bound=1)


def run(argv):
  """Runs the job that the configuration names; UserError for a mistake in flags or configuration."""
  if len(argv) > 1:
    raise UserError(f'{argv[1]!r}: not a flag; settings are given as --config.KEY=VALUE')
  logging.set_verbosity(logging.WARNING)  # orbax reports each file it writes
  if _CONFIG.value is None:
    raise UserError('--config is missing: e.g. --config=configs/pretrain.py:demo')
  config = _CONFIG.value
  if config.job not in DRIVERS:
    raise UserError(f'config.job={config.job!r}: unknown; known: {", ".join(DRIVERS)}')
  if _DISTRIBUTED.value or _COORDINATOR.value or _PROCESS.value:
    join_processes(_PEER_TIMEOUT.value, **by_hand(_COORDINATOR.value, _PROCESS.value))
  workdir = _WORKDIR.value or os.path.join('runs', *([config.job, config.task] if 'task' in config else [config.job]))
  module, function = DRIVERS[config.job]
  if _DRY_RUN.value and config.job not in ('pretrain', 'finetune'):
    raise UserError(f'--dry_run: is for training; config.job={config.job} has nothing to stop before')
  getattr(importlib.import_module(module), function)(
      config, workdir if '://' in workdir else os.path.abspath(os.path.expanduser(workdir)),
      **{'dry_run': True} if _DRY_RUN.value else {})


def by_hand(coordinator, process) -> dict:
  """Arguments of `jax.distributed.initialize` for processes started by hand; {} in a cluster that it recognises."""
  if not coordinator and not process:
    return {}
  match = re.fullmatch(r'(\d+)/(\d+)', process or '')
  if not coordinator or not match or int(match[1]) >= int(match[2]):
    raise UserError(f'--coordinator={coordinator} --process={process}: processes started by hand need both, as in '
                    '--coordinator=host0:1234 --process=0/4 (the last is --process=3/4)')
  return {'coordinator_address': coordinator, 'process_id': int(match[1]), 'num_processes': int(match[2])}


def join_processes(peer_timeout: int, **arguments):
  """Joins the processes of a run (arguments of jax.distributed.initialize); UserError if they do not meet."""
  import jax
  try:
    jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=peer_timeout, shutdown_timeout_seconds=3 * peer_timeout)
  except ValueError as error:
    raise UserError(f'--distributed: no pod or cluster was detected on this machine ({error}): leave the '
                    'option out, start the processes with SLURM, Open MPI, Kubernetes or on a Cloud TPU pod, or give '
                    '--coordinator and --process') from error
  except RuntimeError as error:
    reason = str(error).splitlines()[0]
    raise UserError(f'--coordinator={arguments.get("coordinator_address")}: the processes did not find each other '
                    f'({reason}): check that all are started with the same address') from error


def parse(argv):
  """absl's parser; errors, including those of configuration files, become one line with the line number in the file."""
  argv[:] = located(argv)  # of sys, which ml_collections reads again
  printing = _PRINT in sys.argv
  if printing:
    sys.argv.remove(_PRINT)  # ml_collections would look for a key of that name
  try:
    rest = flags.FLAGS(argv)
    getattr(_CONFIG.value, 'job', None)  # a file that cannot be loaded fails only here
    if printing and _CONFIG.value is not None:
      print(_CONFIG.value, end='')
      sys.exit()
    return rest
  except (flags.Error, ArithmeticError, AttributeError, ImportError, LookupError, NameError, OSError, SyntaxError, TypeError,
          ValueError) as error:
    lines = [line.strip() for line in str(error.args[0] if error.args else error).splitlines() if line.strip()]
    if any(line.startswith('Traceback') for line in lines):
      lines = lines[-1:]
    # ml_collections quotes a message within a message.
    message = ' '.join(lines).replace('\\n', '; ').replace("\\'", "'").replace("module 'config_config'", config_file())
    message = message[1:-1] if message[:1] in ('"', "'") and message[-1:] == message[:1] else message
    if '--config=' in message:  # raised by this package's configurations
      raise UserError(message.removeprefix('ValueError: ')) from error
    places = re.findall(r'File "([^"]+)", line (\d+)', ''.join(traceback.format_exception(error)))
    lines_of_file = [line for name, line in places if config_file() and os.path.abspath(name) == os.path.abspath(config_file())]
    unknown = re.match(r"'?(\w+)'?(?:$|; Did you mean .(\w+))", message)
    if unknown and not lines_of_file and isinstance(error, AttributeError | KeyError):
      meant = [unknown[2]] if unknown[2] else elsewhere(unknown[1])
      hint = f'; did you mean {" or ".join(meant)}?' if meant else '; --config.print=True shows all'
      raise UserError(f'--config: there is no setting {unknown[1]}{hint}') from error
    message = re.sub(r'^flag (\S+: )invalid literal for int\(\) with base 10: (.*)', r'\1\2 is no whole number', message)
    message = re.sub(r'^flag (\S+: )could not convert string to float: (.*)', r'\1\2 is no number', message)
    raise UserError((f'{config_file()} line {lines_of_file[-1]}: ' if lines_of_file else '') + message) from error


def elsewhere(key: str) -> list[str]:
  """The settings of the named configuration, 'config.GROUP.KEY', whose names contain this one."""
  try:
    variant = next(word for word in sys.argv if word.startswith('--config=')).partition(':')[2]
    config = runpy.run_path(config_file())['get_config'](*[variant] * bool(variant)).to_dict()
  except Exception:  # a file of the user's, of which the first error is reported
    return []
  return [f'config.{group}.{name}' for group, values in config.items() if isinstance(values, dict) for name in values
          if key in name]


def located(argv: list[str]) -> list[str]:
  """The command line with a --config that exists: FILE of --config=FILE and --config=configs/FILE may be one of the package."""
  folder = os.path.dirname(configs.__file__)
  words, rest = [], iter(argv)
  for word in rest:
    if word == '--config':
      word = f'--config={next(rest, "")}'
    name, colon, variant = word.removeprefix('--config=').partition(':')
    if word.startswith('--config=') and not os.path.isfile(name):
      file = os.path.join(folder, os.path.basename(name))
      if os.path.dirname(name) not in ('', 'configs') or not os.path.isfile(file):
        known = ', '.join(sorted(each for each in os.listdir(folder) if each.endswith('.py') and each[0] != '_'))
        raise UserError(f'--config={name}: no such file; those of the package are {known}')
      word = f'--config={file}{colon}{variant}'
    words.append(word)
  return words


def config_file() -> str:
  """The file that --config names, without its variant."""
  return next((word.partition('=')[2].partition(':')[0] for word in sys.argv if word.startswith('--config=')), '')


def line_of_key(error: UserError) -> str:
  """' (mine.py line 6)' for the line that sets an unknown key; '' if there is none."""
  key = re.match(r'config(?:\.\w+)*\.(\w+): unknown key', str(error))
  if not key or not os.path.exists(config_file()):
    return ''
  with open(config_file(), encoding='utf-8') as file:
    lines = [number for number, line in enumerate(file, 1) if re.search(rf'\b{key[1]}\b', line)]
  return f' ({config_file()} line {lines[0]})' if lines else ''


def main():
  """Runs the command and exits: 2 after a user's mistake, in one line, else with the codes of `train.faults`."""
  for flag in flags.FLAGS.get_key_flags_for_module(__name__):  # for --help
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
  try:
    with interrupts_in_one_line(INTERRUPTED_RUN):
      app.run(run, flags_parser=parse)
  except UserError as error:
    print(f'error: {error}{line_of_key(error)}', file=sys.stderr)
    sys.exit(2)
  except (RuntimeError, AssertionError, ModuleNotFoundError) as error:
    if not (reason := missing_extra(error) or missing_device()):
      raise
    print(f'error: {reason}', file=sys.stderr)
    sys.exit(2)
  except Preempted as notice:
    print(f'preempted: {notice}', file=sys.stderr)
    sys.exit(EXIT_PREEMPTED)
  except PeerLostError as error:
    print(f'error: {error}', file=sys.stderr, flush=True)
    os._exit(EXIT_STALLED)  # a normal exit of JAX would wait for the lost process
  except KeyboardInterrupt:
    sys.exit(EXIT_INTERRUPTED)
  except Exception as error:
    if not disk_full(error):
      raise
    print(f'error: {disk_full(error)}: make room; the same command continues from the newest checkpoint', file=sys.stderr)
    sys.exit(2)
