"""Fits an update into the memory of a device, by what the compiler says that it needs."""
import itertools
import re
from collections.abc import Callable, Iterator
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


def memory_of(program) -> int:
  """Bytes of a device that a compiled program needs; donated memory counts once."""
  memory = program.memory_analysis()
  return (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
          + memory.temp_size_in_bytes)


def fit(compile: Callable[[Plan], Any], candidates: Iterator[Plan], memory: int) -> tuple[Any, str]:
  """The first program that `memory` bytes of a device hold -> (it, a line about it); UserError where none does."""
  tried = []
  for plan in candidates:
    try:
      program = compile(plan)
      need = memory_of(program)
      if need <= memory:
        return program, f'an update needs {need / 2 ** 30:.1f} of {memory / 2 ** 30:.1f} GB of a device; {plan}'
      tried.append(f'{plan}: {need / 2 ** 30:.1f} GB')
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      tried.append(f'{plan}: {_need(str(error))}')
  raise UserError(f'an update does not fit into the {memory / 2 ** 30:.1f} GB of a device ({"; ".join(tried)}): lower '
                  'config.batch_size, divide the state by a larger config.mesh.fsdp, or use more devices')


def _need(message: str) -> str:
  found = re.search(r'Used ([\d.]+\w) of', message)
  return found[1] if found else 'more'
