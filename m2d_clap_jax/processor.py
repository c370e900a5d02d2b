"""`jit` with what makes products of matrices fast on a CPU; for other devices it is `jax.jit`."""
import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import jax

# XLA's CPU compiler leaves products to YNNPACK or Eigen unless told that oneDNN is to compute them, each on its own
# (types that also fuse what comes after a product abort at some shapes). docs/performance.md compares their speed.
FUSION = 'xla_cpu_experimental_onednn_fusion_type'
OPTIONS = {'xla_cpu_use_onednn': True, FUSION: 'LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT'}


def jit(function: Callable, platform: str | None = None, **options: Any) -> Any:
  """`jax.jit` of what runs long, for a kind of device ('cpu', 'gpu' or 'tpu'; None means JAX's default).

  The program for a CPU is faster, but it cannot be kept in the compilation cache.
  """
  if (platform or jax.default_backend()) == 'cpu':
    options['compiler_options'] = compiler_options()
  return jax.jit(function, **options)


def jit_batches(function: Callable, size: int, **options: Any) -> Callable:
  """`jit` of function(variables, batch, ...) where the batch has at least `size` rows, else `jax.jit`.

  Whoever has a full batch will probably have more of them, and gains from `jit`; a clip or two should not wait for a
  compilation.
  """
  full, small = jit(function, **options), jax.jit(function, **options)
  return lambda variables, batch, *args, **kwargs: (full if len(batch) >= size else small)(variables, batch, *args, **kwargs)


@functools.cache
def compiler_options() -> dict[str, Any]:
  """For `jax.jit` on a CPU; {} where XLA_FLAGS chooses the library, or where this version of XLA does not know the options."""
  if FUSION in os.environ.get('XLA_FLAGS', ''):
    return {}
  try:
    jax.jit(lambda: 0, compiler_options=OPTIONS).lower().compile()
  except jax.errors.JaxRuntimeError:
    return {}
  warnings.filterwarnings('ignore', r'Error writing persistent compilation cache entry.*onednn', UserWarning)
  return OPTIONS
