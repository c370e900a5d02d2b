"""What makes products of matrices fast on a CPU: `jit_batches` for inference on many clips."""
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


def jit_batches(function: Callable, size: int, **options: Any) -> Callable:
  """`jax.jit` of function(variables, batch, ...); on a CPU oneDNN computes the products of batches of at least `size` rows.

  Such a program cannot be kept in the compilation cache. Whoever has a full batch will probably have more of them, and
  gains from it; a clip or two should not wait for a compilation, and there all libraries are as fast.
  """
  full = small = jax.jit(function, **options)
  if jax.default_backend() == 'cpu':
    full = jax.jit(function, compiler_options=compiler_options(), **options)
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
