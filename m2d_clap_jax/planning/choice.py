"""Settings with which a pre-training update fits on a TPU."""
from collections.abc import Callable, Iterator
from typing import NamedTuple

from m2d_clap_jax import sharding
from m2d_clap_jax.models import M2DCLAP
from m2d_clap_jax.planning.machines import Machine
from m2d_clap_jax.planning.update import Needs, needs
from m2d_clap_jax.train.fitting import OutOfMemory, plans


class Settings(NamedTuple):
  """Those of a run's configuration: mesh.fsdp, model.remat and loss.accumulate."""
  fsdp: int
  remat: str
  accumulate: int

  def options(self) -> str:
    """For `main.py`."""
    return (f'--config.mesh.fsdp={self.fsdp} --config.model.remat={self.remat} '
            f'--config.loss.accumulate={self.accumulate}')


class Trial(NamedTuple):
  """Settings, with what an update needs (None where the compiler found no program that fits) and bytes of memory."""
  settings: Settings
  needs: Needs | None
  memory: int


def candidates(machine: Machine, batch: int, parameters: int) -> Iterator[Settings]:
  """What a run tries by itself, from the fastest to the slowest; then the state over more devices."""
  first = sharding.choose_fsdp(parameters, [None] * machine.devices, machine.chip.memory)
  for fsdp in (n for n in range(first, machine.devices + 1) if machine.devices % n == 0):
    for plan in plans(None, None, batch // machine.devices):
      yield Settings(fsdp, *plan)


def trials(model: M2DCLAP, machine: Machine, batch: int, parameters: int, started: Callable[[Settings], None]
           ) -> Iterator[Trial]:
  """Compiles one candidate after the other, until one fits; `started` is called with each before it is compiled."""
  for settings in candidates(machine, batch, parameters):
    started(settings)
    try:
      found = needs(model.clone(remat=settings.remat), machine, batch, settings.fsdp, whole=True, accumulate=settings.accumulate)
      yield Trial(settings, found, int(found.memory))
      if found.memory <= machine.chip.memory:
        return
    except OutOfMemory as error:
      yield Trial(settings, None, error.bytes)
