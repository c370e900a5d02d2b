"""What a command or a run sets in its process before JAX and its neighbours are imported. The user's own variables win."""
import ctypes
import functools
import gc
import glob
import os
import platform
import zlib

CACHE = 'JAX_COMPILATION_CACHE_DIR'
MOST_BYTES = 4 * 10**9  # of compiled programs; those not used for longest go first
# Parameters of mallopt and their numbers in glibc's malloc.h: no block has a mapping of its own, nothing is given back to the
# system, and all threads share one heap (those of further threads are given back whatever the threshold).
MMAP_MAX, TRIM_THRESHOLD, ARENA_MAX = -4, -1, -8
ACCELERATORS = '/dev/nvidia[0-9]*', '/dev/kfd', '/dev/accel*', '/dev/vfio/[0-9]*'


def prepare_process():
  """For `m2d-clap` and `main.py`; not for programs that import this package, which have settings of their own."""
  # TensorFlow only reads and writes files here: its start-up notices would bury ours.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
  keep_memory()
  collect_rarely()
  os.environ.setdefault('USE_TORCH', '0')  # transformers would import it, which takes seconds, for Flax classes
  _keep_compiled_programs()


@functools.cache
def keep_memory() -> bool:
  """Tells the C library to keep freed memory in the process; whether it does.

  XLA's CPU client frees its work memory after every step, and the system would hand it out again page by page, zeroed. To be
  called before JAX starts its threads, later it has no effect. Does nothing without glibc, where there is an accelerator
  (unless JAX_PLATFORMS=cpu), or where the environment sets how memory is allocated (GLIBC_TUNABLES, MALLOC_TRIM_THRESHOLD_
  ...).
  """
  if any(name.startswith('MALLOC_') for name in os.environ) or 'glibc.malloc' in os.environ.get('GLIBC_TUNABLES', ''):
    return False
  if os.environ.get('JAX_PLATFORMS') != 'cpu' and any(map(glob.glob, ACCELERATORS)):
    return False
  if platform.libc_ver()[0] != 'glibc':
    return False
  mallopt = ctypes.CDLL(None).mallopt
  return all([mallopt(MMAP_MAX, 0), mallopt(TRIM_THRESHOLD, -1), mallopt(ARENA_MAX, 1)])


def collect_rarely():
  """Makes Python search for dead reference cycles less often.

  Tracing a program allocates many small objects, nearly all of which stay alive, and every search visits them again.
  """
  gc.set_threshold(100_000, 20, 10)


def cache_folder() -> str:
  """Where compiled programs are kept unless JAX_COMPILATION_CACHE_DIR says otherwise (empty: nowhere).

  Each kind of processor has a folder: programs for another, as where machines share a home, may use instructions that it
  lacks, and JAX does not tell them apart.
  """
  base = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  try:
    with open('/proc/cpuinfo', encoding='utf-8') as file:
      about = ''.join(sorted({line for line in file if line.startswith(('model name', 'flags', 'Features'))}))
  except OSError:
    about = platform.processor()
  return os.path.join(base, 'm2d_clap_jax', 'compiled', f'{platform.machine()}-{zlib.crc32(about.encode()):08x}')


def cores() -> int:
  """The number of processor cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1  # macOS lacks the first


def missing_device() -> str:
  """After an error of JAX: a line to show instead where JAX_PLATFORMS names a device that is not there; '' otherwise."""
  wanted = os.environ.get('JAX_PLATFORMS')
  if not wanted:
    return ''
  import jax
  try:
    jax.devices()
    return ''
  except Exception:  # which one, if any, depends on what is installed
    pass
  return (f'JAX_PLATFORMS={wanted}: there is no such device, or JAX is installed without support for it: leave the variable '
          "out to take what there is, or install the support (for NVIDIA GPUs: pip install 'jax[cuda12]')")


def _keep_compiled_programs():
  if CACHE in os.environ:
    return
  folder = cache_folder()
  try:
    os.makedirs(folder, exist_ok=True)
  except OSError:  # JAX would complain with every program
    return
  if os.access(folder, os.W_OK):
    os.environ[CACHE] = folder
    os.environ.setdefault('JAX_COMPILATION_CACHE_MAX_SIZE', str(MOST_BYTES))
    os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')
