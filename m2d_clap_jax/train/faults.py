"""Machines that are taken away, and runs that make no progress."""
import contextlib
import itertools
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax

from m2d_clap_jax.errors import UserError

# What collectives report when a process that takes part in them is gone.
PEER_GONE = re.compile(r'Gloo|NCCL|Connection (reset|closed|refused)|Socket closed|heartbeat', re.IGNORECASE)
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: the same command, started again, continues
EXIT_STALLED = 76


class Preempted(Exception):
  """The machine is being taken away and everything is saved; main.py exits with EXIT_PREEMPTED."""


class PeerLostError(Exception):
  """Another process of the run is gone; main.py exits with EXIT_STALLED, at once and without waiting for anyone."""


class Preemption:
  """Notices SIGTERM inside its `with` block, with which clouds, Slurm and Kubernetes announce that a machine goes away.

  With several processes, each may get the signal at another moment; JAX's coordination then agrees on one call of
  `reached`. The handler that was there before is back after the block.
  """
  _calls = itertools.count(1)  # over all blocks of the process: JAX waits for a number that is yet to come

  def __init__(self):
    self._signalled = threading.Event()
    # With several processes JAX listens for the signal itself; only a main thread can.
    self._listens = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()

  def __enter__(self):
    if self._listens:
      self._before = signal.signal(signal.SIGTERM, lambda *_: self._signalled.set())
    return self

  def __exit__(self, *exception):
    if self._listens:
      signal.signal(signal.SIGTERM, self._before)

  def reached(self) -> bool:
    """Whether to save and leave after this step; to be called once a step, with the same answer in every process."""
    if jax.process_count() > 1:
      from jax.experimental import multihost_utils
      return multihost_utils.reached_preemption_sync_point(next(self._calls))
    return self._signalled.is_set()


class Watchdog:
  """Ends the process with a message when, inside its `with` block, `beat` was not called for `seconds`.

  A stalled disk and a peer that is gone both block where no exception can reach, so the process leaves for good. The
  newest checkpoint is whole at any moment.

  Args:
    seconds: of config.stall_seconds; 0 for no watching.
    leave: ends the process.

  Raises:
    UserError: negative seconds.
  """

  def __init__(self, seconds: float, leave=os._exit):
    if seconds < 0:
      raise UserError(f'config.stall_seconds={seconds}: must be 0 (never) or more')
    self._seconds, self._leave = seconds, leave
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._watch, name='watchdog', daemon=True)

  def __enter__(self):
    self.beat('the start')
    if self._seconds:
      self._thread.start()
    return self

  def __exit__(self, *exception):
    self._closed.set()
    if self._seconds:
      self._thread.join()

  def beat(self, what: str):
    """Something was achieved: `what`, in words."""
    self._what, self._last = what, time.monotonic()

  def rest(self):
    """Nothing is watched until the next beat: what follows computes alone, for as long as it takes."""
    self._last = float('inf')

  def _watch(self):
    while not self._closed.wait(min(1.0, self._seconds / 10)):
      if time.monotonic() - self._last > self._seconds:
        others = f', or another of the {jax.process_count()} processes is gone' if jax.process_count() > 1 else ''
        print(f'error: nothing has moved for {self._seconds:.0f} s (config.stall_seconds) since {self._what}: the '
              f'storage of the data or of the workdir may have stalled{others}. The same command continues from the '
              'newest checkpoint', file=sys.stderr, flush=True)
        self._leave(EXIT_STALLED)
        return


class Guards(NamedTuple):
  preemption: Preemption
  watchdog: Watchdog


@contextlib.contextmanager
def guards(stall_seconds: float) -> Iterator[Guards]:
  """Both, for a whole job: entered before anything that can hang, such as opening data and restoring a checkpoint."""
  with Preemption() as preemption, Watchdog(stall_seconds) as watchdog:
    try:
      yield Guards(preemption, watchdog)
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # of arrays on their way to numpy it is a ValueError
      if jax.process_count() == 1 or not PEER_GONE.search(str(error)):
        raise
      raise PeerLostError(f'another of the {jax.process_count()} processes is gone ({str(error).splitlines()[0][:200]}). '
                          'The same command continues from the newest checkpoint') from error
