"""A pool of worker processes that survives the death of its workers and identifies the file that killed them.

Not `concurrent.futures.ProcessPoolExecutor`, which breaks as a whole when one process dies, does not report the file, and
starts its processes by importing the caller's main script again (including jax, and recursively if the script has no
main guard).
"""
import collections
import concurrent.futures
import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading

from m2d_clap_jax.errors import UserError

MOST_SECONDS = 300.0  # limit for one file: a decoder in an endless loop must not block the rest


class _Died(Exception):
  """The worker process ended while it was processing a file."""


class _Worker:
  """One process of `data.worker.serve`, started when it is first needed."""

  def __init__(self, target):
    self.target = target
    self.process = None

  def call(self, arguments):
    """Returns (ok, result or reason). Raises _Died."""
    if self.process is None:
      self._start()
    late = threading.Event()
    timer = threading.Timer(MOST_SECONDS, lambda: (late.set(), self.process.kill()))
    timer.start()
    try:
      pickle.dump(arguments, self.process.stdin, protocol=5)
      self.process.stdin.flush()
      return pickle.load(self.process.stdout)
    except (EOFError, OSError, pickle.UnpicklingError) as e:
      end = self.stop()
      if late.is_set():
        return False, f'decoding it took more than {MOST_SECONDS:.0f} s'
      raise _Died(end) from e
    finally:
      timer.cancel()

  def stop(self):
    """Ends the process; returns a description of how it ended."""
    process, self.process = self.process, None
    if process is None:
      return ''
    with contextlib.suppress(OSError):  # a request that it never read
      process.stdin.close()
    try:
      code = process.wait(timeout=1)
    except subprocess.TimeoutExpired:
      process.kill()
      code = process.wait()
    process.stdout.close()
    return signal.Signals(-code).name if code < 0 else f'exit code {code}'

  def _start(self):
    # One thread per process: more would compete for the cores, and the last bits of sums would depend on the machine.
    # Modules are found on this process's path, not in the current folder.
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(p or os.getcwd() for p in sys.path), PYTHONSAFEPATH='1',
               OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1', MKL_NUM_THREADS='1')
    with tempfile.TemporaryFile() as log:  # decoders print warnings on stderr even about usable files
      try:
        self.process = subprocess.Popen([sys.executable, '-m', 'm2d_clap_jax.data.worker', self.target], env=env,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
      except OSError as e:
        raise UserError(f'a decoding process cannot start ({e.strerror}): use fewer --workers') from e
      try:
        pickle.load(self.process.stdout)
      except (EOFError, pickle.UnpicklingError) as e:
        end = self.stop()
        log.seek(0)
        last = log.read().decode(errors='replace').strip().splitlines()[-1:] or ['no message']
        raise UserError(f'a decoding process cannot start ({end}: {last[0]}): fix the installation') from e


class Pool:
  """`workers` processes that run `target` ('module:function'). Use as a context manager."""

  def __init__(self, target, workers):
    self._idle = queue.SimpleQueue()
    self._workers = [_Worker(target) for _ in range(workers)]
    for worker in self._workers:
      self._idle.put(worker)
    self._threads = concurrent.futures.ThreadPoolExecutor(workers)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._threads.shutdown(wait=False, cancel_futures=True)
    for worker in self._workers:
      process = worker.process
      if process is not None:
        process.kill()  # also wakes the thread that waits for its answer
    self._threads.shutdown(wait=True)
    for worker in self._workers:
      worker.stop()

  def map(self, tasks):
    """Yields (ok, result or reason) for each tuple of arguments, in their order, running a few tasks ahead."""
    pending = collections.deque()
    tasks = iter(tasks)
    while True:
      while len(pending) < 4 * len(self._workers):
        task = next(tasks, None)
        if task is None:
          break
        pending.append((task, self._threads.submit(self._run, task)))
      if not pending:
        return
      task, future = pending.popleft()
      try:
        answer = future.result()
      except _Died:
        answer = self._alone(task, [other for _, other in pending])
      yield answer

  def _run(self, task):
    worker = self._idle.get()
    try:
      return worker.call(task)
    finally:
      self._idle.put(worker)

  def _alone(self, task, others):
    """Retries a file whose worker died, with no other running: memory may have been short and the file good."""
    concurrent.futures.wait(others)
    try:
      return self._run(task)
    except _Died as e:
      return False, f'the decoding process died on it twice ({e})'
