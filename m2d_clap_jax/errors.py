"""Errors whose message is written for the user rather than for a debugger, and how programs end with them."""
import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator

EXIT_INTERRUPTED = 130  # as in shells
INTERRUPTED_RUN = 'interrupted; the same command continues from the newest checkpoint'
# Modules that the package works without until they are needed -> the extra of setup.cfg that installs them.
EXTRAS = {**dict.fromkeys(('clu', 'matplotlib', 'ml_collections', 'optax', 'sklearn', 'tensorboard', 'tensorflow',
                           'tensorflow_datasets'), 'train'),
          **dict.fromkeys(('mteb', 'datasets'), 'mteb'), **dict.fromkeys(('gradio', 'starlette'), 'demo'),
          'apache_beam': 'beam', 'gcsfs': 'gcs', 'pyarrow': 'parquet', 's3fs': 's3', 'torch': 'torch', 'wandb': 'wandb'}


class UserError(Exception):
  """A mistake that the user can fix; `main.py` and `m2d-clap` print it as one line and exit with code 2.

  The message states what is wrong, where (file, key or value) and how to fix it.
  """


def install(module: str) -> str:
  """The command that installs a module of EXTRAS."""
  return f"pip install 'm2d-clap-jax[{EXTRAS[module]}]'"


def missing_extra(error: BaseException) -> str:
  """A line to show where an import failed because an extra is not installed; '' of other errors."""
  module = (getattr(error, 'name', '') or '').partition('.')[0]
  if not isinstance(error, ModuleNotFoundError) or module not in EXTRAS:
    return ''
  return f'this needs {module}, which is not installed: {install(module)}'


def disk_full(error: BaseException | None) -> str:
  """'FILE: No space left on device' where that, or a quota, is what an error came from; else ''."""
  while error is not None:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
      return f'{error.filename or "the folder that is written to"}: {error.strerror}'
    if 'No space left on device' in str(error):  # TensorFlow's and others' own kinds
      return f'{" ".join(str(error).split())[:300]}'
    error = error.__cause__ or error.__context__
  return ''


def end_on_interrupt(message: str):
  """From now on, SIGINT ends the process at once and in one line: there is nothing to close."""
  def end(*_):
    os.write(2, f'{message}\n'.encode())  # Python's own streams may be in use
    os._exit(EXIT_INTERRUPTED)
  signal.signal(signal.SIGINT, end)


@contextlib.contextmanager
def interrupts_in_one_line(message: str) -> Iterator[None]:
  """Inside the block, a first SIGINT is a KeyboardInterrupt, for files to be closed, and a second one ends the process.

  `message` is printed once, on the way out; then further interrupts are silent.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def first(*_):
    end_on_interrupt(message)
    raise KeyboardInterrupt
  before = signal.signal(signal.SIGINT, first)
  try:
    yield
  except KeyboardInterrupt:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print(message, file=sys.stderr, flush=True)
    # What is left is the end of the interpreter, which may take seconds.
    signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))
    raise
  finally:
    if signal.getsignal(signal.SIGINT) is first:
      signal.signal(signal.SIGINT, before)
