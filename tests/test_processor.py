"""What is set up on a CPU: products by oneDNN, and memory that stays in the process."""
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2d_clap_jax import processor
from m2d_clap_jax.processor import FUSION, compiler_options, jit_batches

FAULTS = '''
import resource
from m2d_clap_jax.startup import keep_memory
kept = keep_memory()
import jax, jax.numpy as jnp
step = jax.jit(lambda x: jnp.sum(jnp.sort(2 * x, axis=1)[:, ::-1] @ jnp.ones((64, 64))))  # with 40 MB of its own
x = jnp.ones((160000, 64))
counts = []
for _ in range(12):  # the heap grows for a few calls, until its gaps are large enough
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  step(x).block_until_ready()
  counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, min(counts))
'''


def faults(**environment) -> tuple[bool, int]:
  """(what keep_memory returned, the fewest page faults of a call of a step) in a process of its own."""
  plain = {name: value for name, value in os.environ.items() if not name.startswith(('MALLOC_', 'GLIBC_', 'XLA_'))}
  done = subprocess.run([sys.executable, '-c', FAULTS], env={**plain, 'JAX_PLATFORMS': 'cpu', **environment},
                        capture_output=True, text=True, check=True)
  kept, count = done.stdout.split()
  return kept == 'True', int(count)


@pytest.mark.skipif(sys.platform != 'linux', reason='mallopt is of glibc')
def test_a_step_gets_its_memory_from_the_process_and_not_page_by_page_from_the_system():
  kept, few = faults()
  left_alone, many = faults(MALLOC_TRIM_THRESHOLD_='131072')
  assert kept and few < 500
  assert not left_alone and many > 5000


@pytest.fixture(autouse=True)
def as_users_run(monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', os.environ['XLA_FLAGS'].replace(f'--{FUSION}=', ''))
  compiler_options.cache_clear()
  yield
  compiler_options.cache_clear()


def test_products_are_computed_by_onednn_unless_xla_flags_say_otherwise(monkeypatch):
  x = jnp.ones((256, 256))
  assert '__onednn_fusion' in jax.jit(jnp.matmul, compiler_options=compiler_options()).lower(x, x).compile().as_text()
  compiler_options.cache_clear()
  monkeypatch.setenv('XLA_FLAGS', f'--{FUSION}=LIBRARY_FUSION_TYPE_DOT')
  assert compiler_options() == {}


CACHED = """
import os, jax.numpy as jnp
from m2d_clap_jax.processor import jit_batches
product = jit_batches(lambda variables, batch: batch @ variables, 4)
for rows in 1, 4, 4, 1:
  before = set(os.listdir(os.environ['JAX_COMPILATION_CACHE_DIR']))
  product(jnp.ones((64, 64)), jnp.ones((rows, 64)))
  print(rows, any('lambda' in name for name in set(os.listdir(os.environ['JAX_COMPILATION_CACHE_DIR'])) - before))
"""


def test_a_small_batch_is_cached_and_a_full_one_is_a_program_of_its_own_without_a_warning(tmp_path):
  done = subprocess.run([sys.executable, '-W', 'error', '-c', CACHED], capture_output=True, text=True, env={
      **os.environ, 'JAX_COMPILATION_CACHE_DIR': str(tmp_path), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1'})
  assert (done.stdout.splitlines(), done.stderr) == (['1 True', '4 False', '4 False', '1 False'], '')


def test_an_option_that_this_version_of_xla_does_not_have_is_left_out(monkeypatch):
  monkeypatch.setattr(processor, 'OPTIONS', {'xla_cpu_no_such_option': True})
  assert compiler_options() == {}


def test_elsewhere_nothing_is_set(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(jax, 'jit', lambda function, **options: lambda *args: options)
  assert jit_batches(jnp.matmul, 1, static_argnums=0)(0, [1]) == {'static_argnums': 0}


DIMENSIONS = (0, 1, 2, 3, 5, 17, 64)


@pytest.mark.parametrize('seed', range(20))
def test_every_product_that_jax_can_write_is_that_of_the_default_library(seed):
  """Batch, contracted and free axes of any number, size and order; the library would end the process at what it cannot do."""
  rng = np.random.default_rng(seed)
  axes = {kind + str(i): int(rng.choice(DIMENSIONS)) for kind in 'bclr' for i in range(rng.integers(3))}
  left, right = ([axis for axis in rng.permutation(list(axes)) if axis[0] in kinds] for kinds in ('bcl', 'bcr'))
  numbers = tuple(tuple([side.index(axis) for axis in axes if axis[0] == kind] for side in (left, right)) for kind in 'cb')
  dtype = [jnp.float32, jnp.bfloat16, jnp.float16][seed % 3]
  x, y = (jnp.asarray(rng.standard_normal([axes[axis] for axis in side]), dtype) for side in (left, right))

  def product(x, y):
    return jax.nn.relu(jax.lax.dot_general(x + 1, y, numbers, preferred_element_type=jnp.float32)) + 1
  own = jax.jit(product, compiler_options=compiler_options())
  np.testing.assert_allclose(own(x, y), jax.jit(product)(x, y), rtol=1e-5, atol=1e-4)
