"""Machines that are taken away, and runs that do not get on."""
import itertools
import os
import signal
import sys
import threading
import time

import jax

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: the same command, started again, goes on
EXIT_STALLED = 76


class Preempted(Exception):
  """The machine is being taken away and everything is saved; main.py exits with EXIT_PREEMPTED."""


class Preemption:
  """Notices SIGTERM, with which clouds, Slurm and Kubernetes announce that a machine is taken away.

  With several processes, each may get the signal at another moment; JAX's coordination then agrees on one call of
  `reached`. A signal between two trainings of a process is noticed by the next.
  """
  _told = threading.Event()
  _calls = itertools.count(1)  # over all trainings of the process: JAX waits for a number that is yet to come

  def __init__(self):
    # With several processes JAX listens for the signal itself.
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      signal.signal(signal.SIGTERM, lambda *_: self._told.set())

  def reached(self) -> bool:
    """Whether to save and leave after this step; to be called once a step, with the same answer in every process."""
    if jax.process_count() > 1:
      from jax.experimental import multihost_utils
      return multihost_utils.reached_preemption_sync_point(next(self._calls))
    told = self._told.is_set()
    self._told.clear()
    return told


class Watchdog:
  """Ends the process with a message when `beat` was not called for `seconds`: better than silence for days.

  A stalled disk and a peer that is gone both block where no exception can reach, so the process leaves for good. The
  newest checkpoint is whole at any moment.
  """

  def __init__(self, seconds: float, leave=os._exit):
    self._seconds, self._leave = seconds, leave
    self._last, self._what = time.monotonic(), 'the start'
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._watch, name='watchdog', daemon=True)
    self._thread.start()

  def beat(self, what: str):
    """Something was achieved: `what`, in words."""
    self._last, self._what = time.monotonic(), what

  def close(self):
    self._closed.set()
    self._thread.join()

  def _watch(self):
    while not self._closed.wait(min(1.0, self._seconds / 10)):
      if time.monotonic() - self._last > self._seconds:
        others = f', or another of the {jax.process_count()} processes is gone' if jax.process_count() > 1 else ''
        print(f'error: nothing has moved for {self._seconds:.0f} s (config.stall_seconds) since {self._what}: the '
              f'storage of the data or of the workdir may have stalled{others}. The same command continues from the '
              'newest checkpoint', file=sys.stderr, flush=True)
        self._leave(EXIT_STALLED)
        return
