"""Locks between processes of one machine, or of several that share a disk whose file system has locks."""
import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator


class HeldError(Exception):
  """Somebody else holds a lock; the message says who, as far as that is known: 'host HOST, process PID'."""


@contextlib.contextmanager
def locked(path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
  """Holds the lock on a local file, which is made where there is none and stays. A killed holder's lock is free.

  Args:
    shared: several may hold the lock at once, if all of them share it.
    wait: wait for the holder; else HeldError.
  """
  with open(path, 'a+', encoding='utf-8') as file:
    try:
      fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
      file.seek(0)
      raise HeldError(file.read(200).strip() or 'host and process unknown') from None
    if not shared:
      with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        file.truncate(0)
        file.write(f'host {socket.gethostname()}, process {os.getpid()}\n')
        file.flush()
    yield
