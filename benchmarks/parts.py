"""Breaks down the time of the pre-training step: each part compiled and timed alone, alternating with the whole.

  python -m benchmarks.parts --size base --batch 8 --steps 5
  python -m benchmarks.parts --size base --batch 256 --steps 20 --dtype bfloat16     # an accelerator

The encoders and the predictor run forward on random tokens, in their real number. The time of the gradients is that of
`loss and gradients` minus the forward pass; that of optimizer and EMA is the step minus both. XLA also fuses across these
boundaries, so differences of a few per cent mean nothing. The step is also compiled without GELU, softmax or layer norms,
one at a time, to measure the cost of each. Takes the options of benchmarks.train_step.
"""
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import Row, finish, in_turns
from benchmarks.train_step import JaxStep, make_batch, matrix_products, parse, sample_flops
from m2d_clap_jax.models import M2DCLAP, vit
from m2d_clap_jax.models.masking import num_visible
from m2d_clap_jax.train.step import draw_mask, pretrain_loss

# Operations that can be left out: their location and replacement.
WITHOUT = {'GELU': (vit, 'gelu', lambda x: x), 'softmax': (vit.nn, 'softmax', lambda x: x),
           'layer norms': (vit.LayerNorm, '__call__', lambda self, x: x)}


def steps_without(model: M2DCLAP, batch: dict) -> dict:
  """{operation left out: JaxStep}; their losses are meaningless."""
  steps = {}
  for name, (place, attribute, instead) in WITHOUT.items():
    with mock.patch.object(place, attribute, instead):
      steps[name] = JaxStep(model, batch, burst=1)
  return steps


def make_parts(model: M2DCLAP, step: JaxStep, batch: dict) -> dict:
  """{part: function that computes it once}; parameters are arguments, to prevent constant folding at compile time."""
  size = len(batch['logmel'])
  visible = num_visible(model.num_patches, model.mask_ratio)
  state = jax.tree.map(jnp.copy, step.state)  # the step donates its state
  mask = jax.jit(functools.partial(draw_mask, batch_size=size, model=model))(state.rng, state.step)

  def tokens(count: int):
    return jax.random.normal(jax.random.key(count), (size, 1 + count, model.width)).astype(model.dtype)
  encode = jax.jit(lambda params, x: model.transformer().apply({'params': params}, x))
  predict = jax.jit(lambda params, z, mask: model.apply(
      {'params': params}, z, mask, method=lambda module, z, mask: module.predictor(z, mask)))
  loss = functools.partial(pretrain_loss, model=model)
  z = tokens(visible)
  calls = {'encoder, forward': (encode, state.params['encoder'], z)}
  if state.target_params:
    calls['target encoder'] = encode, state.target_params, tokens(model.num_patches - visible)
  calls |= {
      'predictor, forward': (predict, state.params, z, mask),
      'loss': (jax.jit(loss), state.params, state.target_params, batch, mask),
      'loss and gradients': (jax.jit(jax.grad(loss, has_aux=True)), state.params, state.target_params, batch, mask)}
  return {name: functools.partial(_run, *call) for name, call in calls.items()}


def _run(function, *args):
  jax.block_until_ready(function(*args))


def main(argv=None):
  args = parse(argv)
  model, device = args.model, jax.devices()[0]
  batch = make_batch(model, args.batch)
  step = JaxStep(model, batch, burst=1)
  products = matrix_products(args.dtype, args.matmul, 1)
  others = {f'step without {name}': other for name, other in steps_without(model, batch).items()}
  timings = in_turns({**make_parts(model, step, batch), 'step': step, **others, **products}, args.steps, warm_up=2)
  rates = {n: 2e-9 * n ** 3 / timings[n].best for n in products}
  size = max(rates, key=rates.get)
  flops = {name: args.batch * value / 1e9 for name, value in sample_flops(model).items()}  # GFLOP
  forward = (flops['step'] - flops['target']) / 3 + flops['target']
  work = {'encoder, forward': flops['encoder'], 'target encoder': flops['target'],
          'predictor, forward': flops['predictor'], 'loss': forward, 'loss and gradients': flops['step'],
          'step': flops['step']}
  seconds = {name: timings[name].median for name in work if name in timings}
  rows = []
  for name, time in seconds.items():
    rows += [Row(name, 1e3 * time, 'ms'),
             Row(f'  rate of {name}', work[name] / time, 'GFLOP/s', rates[size], f'{args.dtype} product of {size} x {size}')]
  step_time = seconds['step']
  rows += [Row('gradients alone', 1e3 * (seconds['loss and gradients'] - seconds['loss']), 'ms'),
           Row('optimizer, EMA and norms', 1e3 * (step_time - seconds['loss and gradients']), 'ms', 1e3 * step_time,
               'the step'),
           *(Row(name, 1e3 * timings[name].median, 'ms', 1e3 * step_time, 'the step') for name in others),
           Row('encoders and predictor in the loss', 1e3 * sum(
               time for name, time in seconds.items() if name.endswith(('forward', 'encoder'))), 'ms',
               1e3 * seconds['loss'], 'the loss')]
  if not np.isfinite(step.loss):
    raise SystemExit(f'error: the loss became {step.loss}: these figures would be meaningless')
  settings = {'size': args.size, 'variant': args.variant, 'input': model.input_size, 'batch': args.batch,
              'dtype': args.dtype, 'device': device.device_kind, 'jax': jax.__version__}
  finish('parts', settings, rows, {str(name): timing for name, timing in timings.items()}, args.out)


if __name__ == '__main__':
  main()
