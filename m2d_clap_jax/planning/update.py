"""The pre-training update compiled for a TPU, and what it needs there, per device and update."""
import functools
from typing import NamedTuple

import jax
import numpy as np

from m2d_clap_jax import sharding
from m2d_clap_jax.models import M2DCLAP
from m2d_clap_jax.planning import machines
from m2d_clap_jax.planning.arithmetic import sample_flops
from m2d_clap_jax.planning.machines import Chip, Machine
from m2d_clap_jax.planning.program import Program
from m2d_clap_jax.train.fitting import compiled
from m2d_clap_jax.train.optim import linear_ramp, make_optimizer, warmup_cosine
from m2d_clap_jax.train.step import create_state, pretrain_step


class Needs(NamedTuple):
  """Of an update, per device.

  arguments, temporary: bytes of state and batch, and of what lives during the update.
  flops: of the matrix products. traffic: bytes read from and written to the main memory by the program's instructions,
    each operand and result once, padding included, except arrays in the core's fast memory.
  sent: bytes of collectives' results; hidden: those of collectives that run beside other work.
  waiting: seconds of communication at the links' rate beside which nothing runs.
  """
  arguments: float
  temporary: float
  flops: float
  traffic: float
  sent: float
  hidden: float
  waiting: float

  @property
  def memory(self) -> float:
    return self.arguments + self.temporary

  def seconds(self, chip: Chip) -> float:
    """The shortest possible time: arithmetic and traffic at the chip's full rates, beside each other, then waiting."""
    return max(self.flops / chip.teraflops / 1e12, self.traffic / chip.bandwidth / 1e9) + self.waiting

  def utilisation(self, model: M2DCLAP, samples: float, chip: Chip) -> float:
    """At most this share of the peak rate: of the method's own arithmetic for `samples` per device."""
    return samples * sample_flops(model)['step'] / chip.teraflops / 1e12 / self.seconds(chip)


OPTIMIZER = make_optimizer(warmup_cosine(1e-4, 10, 10000))


def state_shapes(model: M2DCLAP):
  """Shapes of the training state."""
  return jax.eval_shape(functools.partial(create_state, 0, model=model, tx=OPTIMIZER))


def state_size(model: M2DCLAP) -> int:
  """Bytes of the training state."""
  return sharding.size_of(state_shapes(model))


def compile_update(model: M2DCLAP, devices, batch: int, fsdp: int = 1, **loss_options):
  """The driver's jitted update, compiled for a global batch on these devices -> (compiled, shapes of the state, mesh).

  Raises OutOfMemory.
  """
  mesh = sharding.make_mesh(devices, fsdp)
  shapes = state_shapes(model)
  state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes,
                       sharding.of_state(shapes, mesh))
  inputs = {'logmel': (batch, *model.input_size)} | ({'text': (batch, model.text_width)} if model.text_width else {})
  inputs = {key: jax.ShapeDtypeStruct(shape, np.float16, sharding=sharding.over_batch(mesh))
            for key, shape in inputs.items()}
  step = functools.partial(pretrain_step, model=model.clone(platform=sharding.platform(mesh)), tx=OPTIMIZER,
                           ema_schedule=linear_ramp(0.9999, 1.0, 10000), gather=sharding.gather(mesh), **loss_options)
  return compiled(sharding.jit_update(step, shapes, mesh).lower(state, inputs)), shapes, mesh


def read(program_of, chip: Chip) -> tuple[Needs, Program]:
  """A compiled update -> what it needs, and its program."""
  memory, program = program_of.memory_analysis(), Program(program_of.as_text())

  def least(instructions) -> tuple[float, float]:
    counts = [(times * program.flops(where, each), times * program.traffic(where, each))
              for where, each, times in instructions]
    return sum(f for f, _ in counts), sum(t for _, t in counts)
  flops, traffic = least(program.steps())
  sent = hidden = waiting = 0.0
  for each in program.collectives():
    size = each.times * each.bytes
    work = max(count / rate for count, rate in zip(
        least((where, other, each.times) for where, other in each.during or ()), (chip.teraflops * 1e12, chip.bandwidth * 1e9)))
    sent += size
    hidden += size if work else 0
    waiting += max(0.0, size * (2 if each.operation == 'all-reduce' else 1) / chip.links / 1e9 - work)
  return Needs(memory.argument_size_in_bytes, memory.temp_size_in_bytes, flops, traffic, sent, hidden, waiting), program


def needs(model: M2DCLAP, machine: Machine, batch: int, fsdp: int = 1, **loss_options) -> Needs:
  """What an update of a global batch needs on a machine. Raises OutOfMemory and UserError.

  The model is compiled in its whole depth: shallow ones have more of their arrays in the core's fast memory.
  """
  return read(compile_update(model, machines.devices(machine), batch, fsdp, **loss_options)[0], machine.chip)[0]
