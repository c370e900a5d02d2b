"""The folder that a job writes into."""
import os
import socket

from etils import epath

from m2d_clap_jax.errors import UserError
from m2d_clap_jax.paths import as_path, make_folder


def make_workdir(workdir) -> epath.Path:
  """Makes the folder; UserError where nothing can be written there, before any work is done."""
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
