"""Fits an update into the memory of a device, by what the compiler says that it needs."""
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax

from m2d_clap_jax.errors import UserError

SMALL = 0.1  # share of a device's memory; a state that takes no more is not divided further


class Plan(NamedTuple):
  """fsdp: number of devices that the state is divided over; remat: see `models.vit.Transformer`; accumulate: number of
  parts in which a batch is computed. In a run's configuration: mesh.fsdp, model.remat and loss.accumulate."""
  fsdp: int
  remat: str
  accumulate: int

  def __str__(self):
    return f'fsdp={self.fsdp}, remat={self.remat}, accumulate={self.accumulate}'

  def options(self) -> str:
    """For `main.py`."""
    return (f'--config.mesh.fsdp={self.fsdp} --config.model.remat={self.remat} '
            f'--config.loss.accumulate={self.accumulate}')


class Given(NamedTuple):
  """The fields of a `Plan` that are not to be chosen."""
  fsdp: int | None = None
  remat: str | None = None
  accumulate: int | None = None


def plans(given: Given, *, devices: int, samples: int, state: int, memory: int) -> Iterator[Plan]:
  """What to try on an accelerator, the fastest first.

  To gather parameters takes less time than to compute every block again, and that less than to compute a batch in parts, which
  does so, too. Norms, GELU and softmax are always computed again: to write and read them takes longer.

  Args:
    samples: per device, of a batch. state: bytes of the whole training state. memory: bytes of a device.
  """
  parts = [given.accumulate] if given.accumulate else [n for n in (2 ** i for i in range(10)) if samples % n == 0]
  kinds = [given.remat] if given.remat else ['cheap', 'full']
  divisors = [given.fsdp] if given.fsdp else list(divisions(devices, state, memory))
  return (Plan(fsdp, kind, n) for n, kind, fsdp in itertools.product(parts, kinds, divisors))


def divisions(devices: int, state: int, memory: int) -> Iterator[int]:
  """Numbers of devices to divide a state over: from the fewest whose memory holds it to the first that leave it SMALL."""
  for n in (n for n in range(1, devices + 1) if devices % n == 0):
    if state / n < memory or n == devices:
      yield n
    if state / n <= SMALL * memory:
      return


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


def fit(lower: Callable[[Plan], Any], candidates: Iterable[Plan], memory: int) -> tuple[Any, Plan, str]:
  """The first program that `memory` bytes of a device hold -> (it, its plan, a line about it); UserError where none does.

  lower: returns the program of a plan, not compiled yet.
  """
  tried = []
  for plan in candidates:
    try:
      program = compiled(lower(plan))
      need = memory_of(program)
      if need <= memory:
        return program, plan, f'an update needs {need / 2 ** 30:.1f} of {memory / 2 ** 30:.1f} GB of a device; {plan}'
    except OutOfMemory as error:
      need = error.bytes
    tried.append(f'{plan}: {need / 2 ** 30:.1f} GB')
  raise UserError(f'an update does not fit into the {memory / 2 ** 30:.1f} GB of a device ({"; ".join(tried)}): lower '
                  'config.batch_size, leave config.mesh.fsdp, config.model.remat and config.loss.accumulate unset, or use more '
                  'devices')
