"""Settings with which a pre-training update fits on a TPU."""
from collections.abc import Callable, Iterator
from typing import NamedTuple

from m2d_clap_jax.models import M2DCLAP
from m2d_clap_jax.planning.machines import Machine
from m2d_clap_jax.planning.update import Needs, needs, state_size
from m2d_clap_jax.train.fitting import Given, OutOfMemory, Plan, plans


class Trial(NamedTuple):
  """A plan, with what an update needs (None where the compiler found no program that fits) and bytes of memory."""
  plan: Plan
  needs: Needs | None
  memory: int


def trials(model: M2DCLAP, machine: Machine, batch: int, started: Callable[[Plan], None]) -> Iterator[Trial]:
  """Compiles what a run would try by itself, until it fits; `started` is called with each plan before it is compiled."""
  for plan in plans(Given(), devices=machine.devices, samples=batch // machine.devices, state=state_size(model),
                    memory=machine.chip.memory):
    started(plan)
    try:
      found = needs(model.clone(remat=plan.remat), machine, batch, plan.fsdp, accumulate=plan.accumulate)
      yield Trial(plan, found, int(found.memory))
      if found.memory <= machine.chip.memory:
        return
    except OutOfMemory as error:
      yield Trial(plan, None, error.bytes)
