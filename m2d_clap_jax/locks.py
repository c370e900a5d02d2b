"""Locks between processes of one machine, or of several that share a disk whose file system has locks."""
import contextlib
import fcntl
from collections.abc import Iterator


@contextlib.contextmanager
def locked(path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
  """Holds the lock on a local file, which is made where there is none and stays. A killed holder's lock is free.

  Args:
    shared: several may hold the lock at once, if all of them share it.
    wait: wait for the holder; else BlockingIOError.
  """
  with open(path, 'w', encoding='utf-8') as file:
    fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    yield
