"""One run at a time in a workdir, full disks, and impatient people at Ctrl-C."""
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import flax.struct
import jax.numpy as jnp
import numpy as np
import pytest

from m2d_clap_jax.errors import UserError, disk_full
from m2d_clap_jax.train.checkpoint import Checkpoints
from m2d_clap_jax.train.log import RunLog
from m2d_clap_jax.workdir import own_workdir

ROOT = pathlib.Path(__file__).parent.parent
HOLD = '''
import sys, time
from m2d_clap_jax.workdir import own_workdir
with own_workdir(sys.argv[1]):
  print('mine', flush=True)
  time.sleep(600)
'''


@contextlib.contextmanager
def started(code, *arguments):
  """A Python process that has printed its first line."""
  process = subprocess.Popen([sys.executable, '-c', code, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})
  try:
    assert process.stdout.readline(), process.stderr.read()
    yield process
  finally:
    process.kill()
    process.communicate()


def test_a_second_run_in_a_workdir_is_refused_until_the_first_is_gone_however_it_went(tmp_path):
  with started(HOLD, tmp_path / 'run') as first:
    with pytest.raises(UserError, match=f'another run is writing here .host .*, process {first.pid}.: wait for it'):
      with own_workdir(tmp_path / 'run'):
        pass
    with own_workdir(tmp_path / 'other'):
      pass
    first.send_signal(signal.SIGKILL)
    first.wait()
    with own_workdir(tmp_path / 'run') as path:
      assert path == tmp_path / 'run'
  with own_workdir(tmp_path / 'run'):
    pass


@pytest.fixture
def small_disk(tmp_path):
  """A folder on a disk of 5 MB."""
  place = tmp_path / 'disk'
  place.mkdir()
  if os.geteuid() or subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=5m', 'tmpfs', place], capture_output=True).returncode:
    pytest.skip('only root may mount a small disk')
  yield place
  subprocess.run(['umount', '-l', place], check=True)


@flax.struct.dataclass
class State:
  step: jnp.ndarray
  params: dict


def state(step):
  """Nearly 2 MB that do not compress."""
  rng = np.random.default_rng(step)
  return State(jnp.asarray(step), {str(i): jnp.asarray(rng.standard_normal((250, 250)), jnp.float32) for i in range(8)})


FULL = '''
import sys
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.train.checkpoint import Checkpoints
from tests.test_workdir import state
print('started', flush=True)
try:
  saved = Checkpoints(sys.argv[1], keep=2)
  for step in range(1, 6):
    saved.save(state(step), {'number': step})
  saved.close()
except UserError as error:
  print(f'error: {error}', file=sys.stderr)
  sys.exit(2)
'''


def test_a_disk_that_fills_up_during_a_save_is_one_line_and_the_checkpoint_before_is_whole(small_disk):
  with started(FULL, small_disk) as run:
    _, errors = run.communicate(timeout=300)
  assert run.returncode == 2 and len(errors.splitlines()) == 1, errors
  assert 'the checkpoint of step 3 could not be written (No space left on device): free disk space' in errors
  found, meta = Checkpoints(small_disk).restore(state(0))
  assert meta == {'number': 2}
  np.testing.assert_array_equal(found.params['7'], state(2).params['7'])


def test_a_log_on_a_full_disk_says_so_once(small_disk):
  with pytest.raises(OSError) as error, RunLog(small_disk, None) as log:
    (small_disk / 'other').write_bytes(bytes(4_900_000))
    with contextlib.suppress(OSError):
      with open(small_disk / 'rest', 'wb', buffering=0) as file:
        while True:
          file.write(bytes(4096))
    for step in range(10_000):
      log.write(step, {'loss': 1.0})
  assert disk_full(error.value).endswith('No space left on device')
  rows = (small_disk / 'metrics.jsonl').read_text().splitlines()
  assert all(json.loads(row)['loss'] == 1.0 for row in rows[:-1]), 'what was written before is whole'


SLOW_TO_CLOSE = '''
import sys, time
from m2d_clap_jax.errors import EXIT_INTERRUPTED, interrupts_in_one_line
try:
  with interrupts_in_one_line('interrupted; the same command continues'):
    try:
      print('running', flush=True)
      time.sleep(600)
    finally:
      print('closing', flush=True)
      time.sleep(float(sys.argv[1]))
except KeyboardInterrupt:
  time.sleep(float(sys.argv[2]))
  sys.exit(EXIT_INTERRUPTED)
'''


@pytest.mark.parametrize('closing,leaving', [(600, 0), (0, 600), (0, 0)],
                         ids=['twice while it closes', 'twice while it leaves', 'once'])
def test_ctrl_c_is_one_line_once_and_twice(closing, leaving):
  with started(SLOW_TO_CLOSE, closing, leaving) as run:
    run.send_signal(signal.SIGINT)
    assert run.stdout.readline() == 'closing\n'
    if leaving:
      assert run.stderr.readline() == 'interrupted; the same command continues\n'
      time.sleep(0.5)
    if closing or leaving:
      run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
  assert run.returncode == 130
  assert errors == ('' if leaving else 'interrupted; the same command continues\n')


def test_ctrl_c_during_the_imports_is_one_line():
  run = subprocess.Popen([sys.executable, 'main.py', '--config=configs/pretrain.py:demo'], cwd=ROOT, stderr=subprocess.PIPE,
                         text=True, env={**os.environ, 'PYTHONPROFILEIMPORTTIME': '1'})
  while 'm2d_clap_jax.errors' not in run.stderr.readline():
    pass
  while 'absl' not in run.stderr.readline():
    pass
  run.send_signal(signal.SIGINT)
  lines = [line for line in run.communicate(timeout=120)[1].splitlines() if not line.startswith('import time:')]
  assert lines == ['interrupted; the same command continues from the newest checkpoint'] and run.returncode == 130
