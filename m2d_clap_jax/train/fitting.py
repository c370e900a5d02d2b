"""Fits an update into the memory of a device, by what the compiler says that it needs."""
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax

from m2d_clap_jax.errors import UserError


class Plan(NamedTuple):
  """remat: see `models.vit.Transformer`; accumulate: number of parts in which a batch is computed."""
  remat: str
  accumulate: int

  def __str__(self):
    return f'remat={self.remat}, accumulate={self.accumulate}'


def plans(remat: str | None, accumulate: int | None, samples: int) -> Iterator[Plan]:
  """What to try on an accelerator, the fastest first; what is given is left as it is.

  samples: per device, of a batch.
  """
  parts = [accumulate] if accumulate else [n for n in (2 ** i for i in range(10)) if samples % n == 0]
  # To recompute norms, GELU and softmax is faster than to write and read them.
  return itertools.starmap(lambda n, kind: Plan(kind, n), itertools.product(parts, [remat] if remat else ['cheap', 'full']))


class OutOfMemory(Exception):
  """The compiler found no program that fits; bytes: what it needed at least."""

  def __init__(self, needed: int):
    super().__init__(f'needs {needed / 2 ** 30:.1f} GB of a device')
    self.bytes = needed


def compiled(lowered):
  """`lowered.compile()`, or OutOfMemory."""
  try:
    return lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    used = re.search(r'(?:Used |temporaries \()([\d.]+)([KMGT])', str(error))
    if 'RESOURCE_EXHAUSTED' not in str(error) or not used:
      raise
    raise OutOfMemory(int(float(used[1]) * 2 ** (10 * (1 + 'KMGT'.index(used[2]))))) from error


def memory_of(program) -> int:
  """Bytes of a device that a compiled program needs; donated memory counts once."""
  memory = program.memory_analysis()
  return (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
          + memory.temp_size_in_bytes)


def fit(lower: Callable[[Plan], Any], candidates: Iterable[Plan], memory: int) -> tuple[Any, str]:
  """The first program that `memory` bytes of a device hold -> (it, a line about it); UserError where none does.

  lower: returns the program of a plan, not compiled yet.
  """
  tried = []
  for plan in candidates:
    try:
      program = compiled(lower(plan))
      need = memory_of(program)
      if need <= memory:
        return program, f'an update needs {need / 2 ** 30:.1f} of {memory / 2 ** 30:.1f} GB of a device; {plan}'
    except OutOfMemory as error:
      need = error.bytes
    tried.append(f'{plan}: {need / 2 ** 30:.1f} GB')
  raise UserError(f'an update does not fit into the {memory / 2 ** 30:.1f} GB of a device ({"; ".join(tried)}): lower '
                  'config.batch_size, divide the state by a larger config.mesh.fsdp, or use more devices')
