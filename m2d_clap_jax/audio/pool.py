"""Processes that read files: one that crashes its decoder, or keeps it busy for ever, is rejected by name; work continues.

Not `concurrent.futures.ProcessPoolExecutor`, which breaks as a whole when one process dies, does not report the file, and
starts its processes by importing the caller's main script again (including jax, and recursively if the script has no
main guard). Nor threads, which cannot be ended.
"""
import collections
import contextlib
import itertools
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from m2d_clap_jax.audio.decode import AudioError
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.paths import as_path
from m2d_clap_jax.startup import cores

STREAM = 'm2d_clap_jax.audio.decode:stream'  # the function that yields a recording's samples
MOST_SECONDS = 300.0  # that the next block of a file may take: a decoder in an endless loop must not block the rest


class _Died(Exception):
  """The worker process ended while it was processing a file."""


class _Worker:
  """One process of `audio.worker.serve`, started when it is first needed."""

  def __init__(self, target: str):
    self._target = target
    self.process: subprocess.Popen | None = None

  def results(self, arguments: tuple) -> Generator:
    """Yields what the function yields. Raises its UserError, AudioError if the next result takes too long, or _Died."""
    if self.process is None:
      self._start()
    ended = False
    try:
      self._connection.send(arguments)
      while True:
        if not self._connection.poll(MOST_SECONDS):
          raise AudioError(f'{as_path(arguments[0])}: decoding it took more than {MOST_SECONDS:.0f} s')
        ended, result = self._connection.recv()
        if ended:
          break
        yield result
    except (EOFError, OSError) as error:
      raise _Died(self.stop()) from error
    finally:
      if not ended:  # or its results would be taken for the next file's
        self.stop()
    if result is not None:
      raise result

  def stop(self) -> str:
    """Ends the process; returns a description of how it ended."""
    process, self.process = self.process, None
    if process is None:
      return ''
    self._connection.close()
    try:
      code = process.wait(timeout=1)
    except subprocess.TimeoutExpired:
      process.kill()
      code = process.wait()
    return signal.Signals(-code).name if code < 0 else f'exit code {code}'

  def _start(self):
    # One thread per process: more would compete for the cores, and the last bits of sums would depend on the machine.
    # Modules are found on this process's path, not in the current folder.
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(p or os.getcwd() for p in sys.path), PYTHONSAFEPATH='1',
               OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1', MKL_NUM_THREADS='1')
    self._connection, theirs = multiprocessing.Pipe()
    with theirs, tempfile.TemporaryFile() as log:  # decoders print warnings even about usable files
      number = theirs.fileno()
      try:
        self.process = subprocess.Popen([sys.executable, '-m', 'm2d_clap_jax.audio.worker', self._target, str(number)],
                                        env=env, pass_fds=[number], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
      except OSError as error:
        raise UserError(f'a decoding process cannot start ({error.strerror}): end other programs, or use fewer --workers'
                        ) from error
      theirs.close()
      try:
        self._connection.recv()
      except (EOFError, OSError) as error:
        end = self.stop()
        log.seek(0)
        last = log.read().decode(errors='replace').strip().splitlines()[-1:] or ['no message']
        raise UserError(f'a decoding process cannot start ({end}: {last[0]}): fix the installation') from error


class Pool:
  """Processes that run `target`, 'module:function', a generator function of a path and more. Use as a context manager.

  workers: number of processes, by default one for each core; they start as they are needed.
  """

  def __init__(self, target: str, workers: int | None = None):
    count = workers or cores()
    self._workers = [_Worker(target) for _ in range(count)]
    self._idle: queue.LifoQueue = queue.LifoQueue()  # running processes before new ones
    for worker in self._workers:
      self._idle.put(worker)
    self._retrying = threading.Lock()
    self._closed = False
    self.threads = ThreadPoolExecutor(count)

  def __enter__(self) -> 'Pool':
    return self

  def __exit__(self, *_):
    self._closed = True
    self.threads.shutdown(wait=False, cancel_futures=True)
    for worker in self._workers:
      process = worker.process
      if process is not None:
        process.kill()  # also wakes the thread that waits for its answer
    self.threads.shutdown(wait=True)
    for worker in self._workers:
      worker.stop()

  def stream(self, *arguments: Any) -> Generator:
    """Yields what the function yields, which runs in one of the processes. Callable in several threads.

    Raises:
      UserError: of the function; AudioError if it takes too long or ends its process twice.
    """
    count = 0
    try:
      with self._borrowed() as worker, contextlib.closing(worker.results(arguments)) as results:
        for result in results:
          count += 1
          yield result
      return
    except _Died:
      if self._closed:
        raise
    # Once more, with no other running: memory may have been short and the file good.
    with self._retrying, contextlib.ExitStack() as stack:
      worker, *_ = [stack.enter_context(self._borrowed()) for _ in self._workers]
      try:
        with contextlib.closing(worker.results(arguments)) as results:
          yield from itertools.islice(results, count, None)
      except _Died as died:
        raise AudioError(f'{as_path(arguments[0])}: the decoding process died on it twice ({died})') from None

  def map(self, tasks: Iterable[tuple]) -> Iterator[tuple[bool, Any]]:
    """Yields (True, the only result) or (False, why a file cannot be used) for each tuple of arguments.

    They come in the order of the tasks; a few tasks run ahead.
    """
    pending: collections.deque = collections.deque()
    for task in tasks:
      pending.append(self.threads.submit(self._only, task))
      if len(pending) == 4 * len(self._workers):
        yield pending.popleft().result()
    while pending:
      yield pending.popleft().result()

  def _only(self, task: tuple) -> tuple[bool, Any]:
    try:
      result, = self.stream(*task)
    except AudioError as error:
      return False, str(error).removeprefix(f'{as_path(task[0])}: ')
    return True, result

  @contextlib.contextmanager
  def _borrowed(self) -> Iterator[_Worker]:
    worker = self._idle.get()
    try:
      yield worker
    finally:
      self._idle.put(worker)
