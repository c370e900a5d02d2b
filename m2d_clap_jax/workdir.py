"""The folder that a job writes into."""
import contextlib
import os
import socket
from collections.abc import Iterator

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from m2d_clap_jax.errors import UserError
from m2d_clap_jax.locks import HeldError, locked
from m2d_clap_jax.paths import as_path, is_remote, make_folder

LOCK = '.lock'


@contextlib.contextmanager
def own_workdir(workdir) -> Iterator[epath.Path]:
  """Makes the folder, and keeps other runs out of it inside the `with` block; the processes of one run own it together.

  Stores have no locks: there, two runs at once are not noticed.

  Raises:
    UserError: nothing can be written there, before any work is done, or another run is writing.
  """
  path, holder = make_workdir(workdir), ''
  with contextlib.ExitStack() as stack:
    if jax.process_index() == 0 and not is_remote(path):
      try:
        stack.enter_context(locked(path / LOCK))
      except HeldError as error:
        holder = str(error)
      except OSError as error:  # of a file system without locks
        raise UserError(f'--workdir={workdir}: cannot be locked ({error.strerror or error}): choose another') from error
    held = bool(holder)
    if jax.process_count() > 1:  # all of them leave, instead of waiting for the first
      held = bool(multihost_utils.broadcast_one_to_all(np.int32(held)))
    if held:
      raise UserError(f'--workdir={workdir}: another run is writing here ({holder or "see the first process"}): wait for '
                      'it, end it, or choose another')
    yield path


def make_workdir(workdir) -> epath.Path:
  """Makes the folder; UserError where nothing can be written there."""
  try:
    path = as_path(workdir)
    make_folder(path)
    # Of this process: others of the run try the same. In containers the numbers of processes are all alike.
    probe = path / f'.writable-{socket.gethostname()}-{os.getpid()}'
    probe.write_text('')
    probe.unlink(missing_ok=True)
  except OSError as error:
    raise UserError(f'--workdir={workdir}: cannot be written ({error.strerror or error}): choose another') from error
  return path
