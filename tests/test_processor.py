"""What a run sets up on a CPU: products by Eigen, and memory that stays in the process."""
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from m2d_clap_jax import processor
from m2d_clap_jax.processor import YNNPACK, compiler_options, jit

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


def test_products_are_computed_by_eigen_unless_xla_flags_say_otherwise(monkeypatch):
  x = jnp.ones((256, 256))
  assert 'ynn' not in jit(jnp.matmul).lower(x, x).compile().as_text()
  compiler_options.cache_clear()
  monkeypatch.setenv('XLA_FLAGS', f'--{YNNPACK}=LIBRARY_FUSION_TYPE_DOT')
  assert compiler_options() == {}
  compiler_options.cache_clear()


def test_an_option_that_this_version_of_xla_does_not_have_is_left_out(monkeypatch):
  monkeypatch.setattr(processor, 'YNNPACK', 'xla_cpu_no_such_option')
  compiler_options.cache_clear()
  assert compiler_options() == {}
  compiler_options.cache_clear()


def test_elsewhere_nothing_is_set(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(jax, 'jit', lambda function, **options: options)
  assert jit(jnp.matmul, donate_argnums=0) == {'donate_argnums': 0}
