"""The pre-training step on many devices, compiled but not run: memory, arithmetic and communication of each device.

  python -m benchmarks.scale --size base --devices 256 --batch 2048             # data parallel
  python -m benchmarks.scale --size large --devices 64 --fsdp 8 --batch 2048    # state divided over 8
  python -m benchmarks.scale --plan                                             # what that means for real machines

The first two compile the real step with the driver's shardings for a mesh of that many CPU devices, from shapes alone,
and print the compiler's analysis beside a formula. The third calculates from published figures of the
machines and an assumed utilisation, which it prints. Needs only jax, flax, optax and numpy.
"""
import argparse
import functools
from typing import NamedTuple

import jax
import numpy as np

from benchmarks.compiled import COLLECTIVES, collectives, cost, size_of
from benchmarks.report import Row, finish
from benchmarks.train_step import PRESETS, sample_flops
from m2d_clap_jax import sharding
from m2d_clap_jax.models import M2DCLAP
from m2d_clap_jax.models.vit import KEPT
from m2d_clap_jax.train.optim import linear_ramp, make_optimizer, warmup_cosine
from m2d_clap_jax.train.step import create_state, pretrain_step

SAMPLES = 300 * 2_000_000  # of 300 epochs of AudioSet


class Machine(NamedTuple):
  """teraflops: dense bfloat16 peak of a device; gigabytes: its memory; link: GB/s at which a sum over all devices moves
  its data once."""
  name: str
  devices: int
  teraflops: float
  gigabytes: float
  link: float


# From the vendors' data sheets. Links: two axes of 90 GB/s (v5e); 450 GB/s of NVLink within a machine of 8 GPUs; between
# machines their 8 networks of 50 GB/s together.
MACHINES = (Machine('v5e-8', 8, 197, 16, 180), Machine('v5e-256', 256, 197, 16, 180),
            Machine('8 H100', 8, 989, 80, 450), Machine('64 H100', 64, 989, 80, 400),
            Machine('8 H200', 8, 989, 141, 450), Machine('64 H200', 64, 989, 141, 400))
UTILISATION = 0.4  # of the peak, assumed


def compile_step(model: M2DCLAP, batch: int, devices: int, fsdp: int):
  """The driver's jitted update, compiled for the first `devices` devices -> (compiled, shapes of the state, mesh)."""
  mesh = sharding.make_mesh(jax.devices()[:devices], fsdp)
  tx = make_optimizer(warmup_cosine(1e-4, 10, 10000))
  shapes = jax.eval_shape(functools.partial(create_state, 0, model=model, tx=tx))
  shardings = sharding.of_state(shapes, mesh)
  state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
  inputs = {'logmel': (batch, *model.input_size)} | ({'text': (batch, model.text_width)} if model.text_width else {})
  inputs = {key: jax.ShapeDtypeStruct(shape, np.float16, sharding=sharding.over_batch(mesh))
            for key, shape in inputs.items()}
  step = functools.partial(pretrain_step, model=model, tx=tx, ema_schedule=linear_ramp(0.9999, 1.0, 10000),
                           gather=sharding.gather(mesh))
  update = jax.jit(step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)))
  return update.lower(state, inputs).compile(), shapes, mesh


def count_parameters(shapes) -> int:
  return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes.params))


def state_bytes(shapes, mesh) -> int:
  """Of one device."""
  leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(sharding.of_state(shapes, mesh)))
  return sum(int(np.prod(s.shard_shape(x.shape))) * x.dtype.itemsize for x, s in leaves)


def analysis(args) -> list[Row]:
  model = M2DCLAP(**PRESETS[args.size], dtype=args.dtype, remat=args.remat)
  compiled, shapes, mesh = compile_step(model, args.batch, args.devices, args.fsdp)
  costs = cost(compiled)
  parameters, own = count_parameters(shapes), args.batch // args.devices
  found = collectives(compiled)
  moved = {name: sum(size_of(results) for kind, results in found if kind == name) for name in COLLECTIVES}
  features = 4 * args.batch * model.width if model.text_width else 0  # of the audio: its device then has its logits
  rows = [
      Row('parameters', parameters / 1e6, 'M'),
      Row('samples of a device', own, ''),
      Row('state and batch', costs.state, 'MB', state_bytes(shapes, mesh) / 2 ** 20,
          'the state by its shardings'),
      Row('temporary memory', costs.temporary, 'MB'),
      Row('arithmetic', costs.flops, 'GFLOP', own * sample_flops(model)['step'] / 1e9, "the method's own")]
  if args.fsdp == 1:
    predicted = {'all-reduce': 4 * parameters, 'all-gather': features}
  else:
    divided = sum(4 * int(np.prod(x.shape)) for tree in (shapes.params, shapes.target_params) for x, s in zip(
        jax.tree.leaves(tree), jax.tree.leaves(sharding.of_state(tree, mesh))) if s.spec)
    predicted = {'all-gather': divided + features}
  for name, size in moved.items():
    if size:
      rows.append(Row(f'{name}, {sum(kind == name for kind, _ in found)} of them: results', size / 2 ** 20, 'MB',
                      predicted.get(name, 0) / 2 ** 20 or None, 'by formula'))
  return rows


def plan() -> list[Row]:
  rows = []
  for size in ('base', 'large'):
    model = M2DCLAP(**PRESETS[size])
    shapes = jax.eval_shape(functools.partial(create_state, 0, model=model, tx=make_optimizer(1e-4)))
    parameters = count_parameters(shapes)
    state = sum(4 * int(np.prod(x.shape)) for x in jax.tree.leaves(shapes)) / 2 ** 30
    one, two = (cost(compile_step(model, batch, 1, 1)[0]).temporary for batch in (32, 64))
    activations = (two - one) / 32 / 2 ** 10 / 2  # of a sample; half of float32's
    rows += [Row(f'{size}: parameters', parameters / 1e6, 'M'), Row('  a sample', sample_flops(model)['step'] / 1e9, 'GFLOP'),
             Row('  state, undivided', state, 'GB'), Row('  activations of a sample, bfloat16', activations * 1024, 'MB')]
    for machine in MACHINES:
      batch = 2048 // machine.devices
      rate = machine.devices * UTILISATION * machine.teraflops * 1e12 / sample_flops(model)['step']
      seconds = 2048 / rate
      sent = 2 * 4 * parameters * (machine.devices - 1) / machine.devices / 1e9
      fsdp = sharding.choose_fsdp(parameters, [None] * machine.devices, int(machine.gigabytes * 2 ** 30))
      rows += [Row(f'  {machine.name}: samples', rate, '1/s'), Row('    300 epochs of AudioSet', SAMPLES / rate / 3600, 'hours'),
               Row('    sum of the gradients', 1e3 * sent / machine.link, 'ms', 1e3 * seconds, "of the step's time"),
               Row(f'    memory, state over {fsdp}', state / fsdp + batch * activations, 'GB', machine.gigabytes,
                   'of the device')]
  return rows


def main(argv=None):
  parser = argparse.ArgumentParser(prog='python -m benchmarks.scale', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--size', choices=PRESETS, default='base')
  parser.add_argument('--devices', type=int, default=8)
  parser.add_argument('--fsdp', type=int, default=1)
  parser.add_argument('--batch', type=int, default=2048, help='of all devices together')
  parser.add_argument('--dtype', choices=['float32', 'bfloat16'], default='float32')
  parser.add_argument('--remat', choices=KEPT, default='none')
  parser.add_argument('--plan', action='store_true')
  parser.add_argument('--out', help='JSON file to write')
  args = parser.parse_args(argv)
  jax.config.update('jax_platforms', 'cpu')
  if args.plan:
    finish('scale', {'utilisation assumed': UTILISATION, 'batch': 2048}, plan(), {}, args.out)
    return
  jax.config.update('jax_num_cpu_devices', args.devices)
  settings = {key: value for key, value in vars(args).items() if key not in ('out', 'plan')}
  finish('scale', settings, analysis(args), {}, args.out)


if __name__ == '__main__':
  main()
