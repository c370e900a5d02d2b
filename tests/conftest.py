"""Settings that must be in place before JAX starts (processes that tests start inherit them), and the closing report."""
import atexit
import gc
import os
import shutil
import tempfile

import filelock
import pytest

from m2d_clap_jax.startup import collect_rarely

# Tests compile far more than they compute: no optimization, no fusion emitters (a third of the compilation time without
# them), and not oneDNN's products, with which programs cannot be cached (test_processor.py).
COMPILE_FAST = ('--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false '
                '--xla_cpu_experimental_onednn_fusion_type=')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
if 'PYTEST_XDIST_WORKER' not in os.environ:  # a worker has all of this from the process that started it
  # Eight devices on one CPU, so that every test of sharding runs everywhere. With as few cores, XLA may otherwise start
  # independent collectives in another order on each device, and they wait for each other for ever.
  os.environ['XLA_FLAGS'] = ' '.join([
      os.environ.get('XLA_FLAGS', ''), COMPILE_FAST, '--xla_force_host_platform_device_count=8',
      '--xla_cpu_enable_concurrency_optimized_scheduler=false'])
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    # One cache for this run: what a test starts again, as after a kill, need not compile again.
    os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='m2d_clap_tests_')
    atexit.register(shutil.rmtree, os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True)
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')

# The files that take longest, the longest first: whole files are handed to the workers in this order, so that no worker
# ends long after the others.
LONGEST = ['test_processes', 'test_pretrain', 'test_benchmarks', 'test_readme', 'test_tpu_program', 'test_wheel',
           'test_finetune', 'test_clap', 'test_eval_run', 'test_faults', 'test_examples', 'test_stablehlo', 'test_first_hour',
           'test_api', 'test_fuzz', 'test_stage_scores', 'test_released', 'test_compiled_program', 'test_remote',
           'test_sharding', 'test_damaged_files', 'test_by_name', 'test_runtime', 'test_readers', 'test_commands_models',
           'test_step', 'test_fitting', 'test_demo_page', 'test_beam']


@pytest.fixture(scope='session')
def data(tmp_path_factory):
  """-> data folder of 40 clips of 0.5 s with embeddings of width 8, prepared once for all workers. Leave it as it is."""
  from m2d_clap_jax.data.prepare import prepare
  from tests.prepare_helpers import FakeEncoder, corpus
  root = tmp_path_factory.getbasetemp()
  root = (root.parent if 'PYTEST_XDIST_WORKER' in os.environ else root) / 'shared'
  with filelock.FileLock(f'{root}.lock'):
    if not (root / 'records').exists():
      manifest = corpus(root / 'audio', 40, seconds=0.5)
      prepare(manifest, root / 'audio', root / 'records', text_encoder=FakeEncoder(), workers=2)
  return root / 'records'


def pytest_collection_modifyitems(items):
  collect_rarely()
  gc.freeze()  # what has been imported stays
  rank = {name: i for i, name in enumerate(LONGEST)}
  items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_terminal_summary(terminalreporter):
  skipped = terminalreporter.stats.get('skipped', [])
  terminalreporter.section('skipped: what, and why' if skipped else 'nothing was skipped')
  for report in skipped:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
    terminalreporter.write_line(f'{report.nodeid}: {reason}')


@pytest.fixture(scope='module')
def model():
  """A tiny random model, loaded; modules that want another define their own."""
  import m2d_clap_jax
  from tests.small_model import tiny_weights
  return m2d_clap_jax.load(tiny_weights())


@pytest.fixture(scope='module')
def music():
  """4 s of notes at 16 kHz, float32 [S]."""
  from tests.small_model import arpeggio
  return arpeggio(16000)
