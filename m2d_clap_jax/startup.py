"""What a command or a run sets in its process before JAX and its neighbours are imported. The user's own values win."""
import os
import platform
import zlib

CACHE = 'JAX_COMPILATION_CACHE_DIR'
MOST_BYTES = 4 * 10**9  # of compiled programs; those not used for longest go first


def prepare_process():
  """For `m2d-clap` and `main.py`; not for programs that import this package, which have settings of their own."""
  # TensorFlow only reads and writes files here: its start-up notices would bury ours.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
  os.environ.setdefault('USE_TORCH', '0')  # transformers would import it, which takes seconds, for Flax classes
  _keep_compiled_programs()


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
