"""Settings that must be in place before JAX starts; processes that tests start inherit them."""
import atexit
import os
import shutil
import tempfile

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
# Eight devices on one CPU, so that every test of sharding runs everywhere. With as few cores, XLA may otherwise start
# independent collectives in another order on each device, and they wait for each other for ever. Tests compile more
# than they compute, hence the low optimization level.
os.environ['XLA_FLAGS'] = ' '.join([
    os.environ.get('XLA_FLAGS', ''), '--xla_force_host_platform_device_count=8',
    '--xla_cpu_enable_concurrency_optimized_scheduler=false', '--xla_backend_optimization_level=0'])
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  # One cache for this run: what a test starts again, as after a kill, need not compile again.
  os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='m2d_clap_tests_')
  atexit.register(shutil.rmtree, os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True)
