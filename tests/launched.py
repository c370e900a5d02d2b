"""main.py in processes of their own, without the seconds that each would take to import JAX, TensorFlow and Orbax.

A server that has imported them, started with the first of these processes, forks the others (multiprocessing's
`forkserver`). What such a process computes, writes and ends with is that of `python main.py`, which tests/test_readme.py
starts for each kind of job.
"""
import atexit
import gc
import multiprocessing
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
_IMPORTED = ['jax', 'flax.linen', 'optax', 'orbax.checkpoint', 'tensorflow', 'clu.metric_writers', 'sklearn.metrics',
             'm2d_clap_jax.train.pretrain', 'm2d_clap_jax.train.clap', 'm2d_clap_jax.train.finetune',
             'm2d_clap_jax.eval.finished', 'tests.launched']
_context = multiprocessing.get_context('forkserver')
_context.set_forkserver_preload(_IMPORTED)


def _run(options: list[str], environment: dict[str, str], error: str):
  """In the new process: `python main.py OPTION ...` in the repository, with what it says on stderr in a file."""
  stderr = os.open(error, os.O_WRONLY | os.O_APPEND)
  os.dup2(os.open(os.devnull, os.O_RDWR), 0)
  os.dup2(0, 1)
  os.dup2(stderr, 2)
  os.chdir(ROOT)
  os.environ.clear()
  os.environ.update(environment)
  gc.freeze()  # nothing of the server's is ever free
  import jax  # has read its variables already, in the server
  for name, value in environment.items():
    if name.startswith('JAX_') and hasattr(jax.config, name.lower()):
      kind = type(getattr(jax.config, name.lower()))
      jax.config.update(name.lower(), kind(value) if kind in (int, float) else value)
  signal.signal(signal.SIGINT, signal.default_int_handler)
  sys.argv = ['main.py', *options]
  try:
    runpy.run_path('main.py', run_name='__main__')
  finally:
    atexit._run_exitfuncs()  # multiprocessing leaves them out


class Main:
  """`python main.py OPTION ...` as a process, with the part of subprocess.Popen's interface that tests use."""

  def __init__(self, *options, env):
    self._file = tempfile.NamedTemporaryFile(prefix='stderr_')
    self.options = [str(option) for option in options]
    self._process = _context.Process(target=_run, args=(self.options, dict(env), self._file.name))
    self._process.start()
    self.pid = self._process.pid

  @property
  def returncode(self):
    return self._process.exitcode

  def poll(self):
    return self._process.exitcode

  def send_signal(self, number):
    if self.poll() is None:
      os.kill(self.pid, number)

  def kill(self):
    self.send_signal(signal.SIGKILL)

  def communicate(self, timeout=None):
    """Waits for its end -> (None, what it wrote to stderr)."""
    self._process.join(timeout)
    if self.returncode is None:
      raise subprocess.TimeoutExpired(['main.py', *self.options], timeout)
    return None, pathlib.Path(self._file.name).read_bytes()


def run(*options, env, check=True):
  """Runs main.py to its end -> subprocess.CompletedProcess with its exit code and stderr."""
  process = Main(*options, env=env)
  error = process.communicate()[1].decode()
  assert not check or process.returncode == 0, error
  return subprocess.CompletedProcess(['main.py', *options], process.returncode, stderr=error)
