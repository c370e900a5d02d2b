"""`jit` for inference: on a CPU it sets what makes the encoder fast there, elsewhere it is `jax.jit`."""
import functools
import os
from collections.abc import Callable
from typing import Any

import jax

# XLA's CPU compiler gives matrix products and sums to YNNPACK, unless this list is empty; then Eigen computes them. Of large
# batches YNNPACK takes longer, but not of gradients (docs/performance.md).
YNNPACK = 'xla_cpu_experimental_ynn_fusion_type'


def jit(function: Callable, **options: Any) -> Any:
  """`jax.jit`; on a CPU with `compiler_options`."""
  if jax.default_backend() == 'cpu':
    options['compiler_options'] = compiler_options()
  return jax.jit(function, **options)


@functools.cache
def compiler_options() -> dict[str, str]:
  """For `jax.jit` on a CPU; {} where XLA_FLAGS sets the option, or where this version of XLA does not know it."""
  options = {YNNPACK: ''}
  if YNNPACK in os.environ.get('XLA_FLAGS', ''):
    return {}
  try:
    jax.jit(lambda: 0, compiler_options=options).lower().compile()
  except jax.errors.JaxRuntimeError:
    return {}
  return options
