"""The pre-training step, beside the matrix-product rate of the same machine and optionally PyTorch's step.

  python -m benchmarks.train_step --size base --batch 8 --steps 5
  python -m benchmarks.train_step --size base --batch 256 --steps 50 --dtype bfloat16     # an accelerator
  python -m benchmarks.train_step --size small_2s --batch 64 --torch

The step is the real one, including mask, clipping, AdamW and EMA, on random data already on the device. Needs only
jax, flax, optax and numpy (and torch for --torch).
"""
import argparse
import ast
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.compiled import cost
from benchmarks.profiled import by_kind
from benchmarks.report import Row, finish, in_turns
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.models import M2DCLAP, SIZES
from m2d_clap_jax.models.masking import num_visible
from m2d_clap_jax.options import bind
from m2d_clap_jax.planning.arithmetic import sample_flops
from m2d_clap_jax.processor import compiler_options
from m2d_clap_jax.train.optim import linear_ramp, make_optimizer, warmup_cosine
from m2d_clap_jax.train.step import create_state, pretrain_step

# As in configs/pretrain.py, which needs ml_collections; a test compares the two.
PRESETS = {**SIZES, 'small_2s': dict(width=192, depth=6, heads=3, predictor_width=128, predictor_depth=2,
                                     predictor_heads=4, input_size=(80, 208), text_width=384)}
VARIANTS = {
    'clap': {},
    'm2d': dict(text_width=None),
    'msm_mae': dict(text_width=None, predict='pixels', mask_ratio=0.75, predictor_width=384, predictor_depth=4,
                    predictor_heads=6)}
PRODUCTS = 10  # of a hidden layer in a timed call
BURST = 10  # calls dispatched at once to an accelerator, as in training; one on a CPU


def make_batch(model: M2DCLAP, batch_size: int) -> dict[str, jax.Array]:
  """Random log-mels and caption embeddings, float16 as from the loader."""
  rng = np.random.default_rng(0)
  mean, std = model.norm_stats
  batch = {'logmel': mean + std * rng.standard_normal((batch_size, *model.input_size), np.float32)}
  if model.text_width is not None:
    batch['text'] = rng.standard_normal((batch_size, model.text_width), np.float32)
  return jax.tree.map(lambda x: jax.device_put(x.astype(np.float16)), batch)


class JaxStep:
  """`pretrain_step` compiled as the driver compiles it, with its state; calling it does `burst` updates."""

  def __init__(self, model: M2DCLAP, batch: dict, burst: int, jit=jax.jit):
    tx = make_optimizer(warmup_cosine(1e-4, 10, 10000))
    create = functools.partial(create_state, 0, model=model, tx=tx)
    self.state, self.batch, self.burst = jax.jit(create)(), batch, burst
    jax.block_until_ready(self.state)
    update = jit(functools.partial(pretrain_step, model=model, tx=tx, ema_schedule=linear_ramp(0.9999, 1.0, 10000)),
                 donate_argnums=0)
    start = time.perf_counter()
    self.compiled = update.lower(self.state, batch).compile()
    self.compile_seconds = time.perf_counter() - start

  def __call__(self):
    for _ in range(self.burst):
      self.state, metrics = self.compiled(self.state, self.batch)
    self.loss = float(metrics['loss'])  # waits for the last update


def matrix_products(dtype, sizes, burst: int) -> dict:
  """{size: function that does `burst` square products of that size}, for the machine's matrix rate."""
  def multiply(x):
    jax.block_until_ready([product(x, x) for _ in range(burst)])
  product = jax.jit(jnp.matmul)
  return {n: functools.partial(multiply, jax.random.normal(jax.random.key(n), (n, n), dtype)) for n in sizes}


def hidden_layer(model: M2DCLAP, batch_size: int) -> tuple[tuple[int, int], tuple[int, int]]:
  """Shapes of the largest product of the target network: tokens [B L, D] and a block's first MLP layer [D, 4 D]."""
  tokens = batch_size * (1 + model.num_patches - num_visible(model.num_patches, model.mask_ratio))
  return (tokens, model.width), (model.width, 4 * model.width)


def main(argv=None):
  args = parse(argv)
  device = jax.devices()[0]
  model = args.model
  burst = 1 if device.platform == 'cpu' else BURST
  batch = make_batch(model, args.batch)
  step = JaxStep(model, batch, burst)
  products = matrix_products(args.dtype, args.matmul, burst)
  functions = {'step': step, **products}
  if args.onednn:
    functions['onednn'] = JaxStep(model, batch, burst, jit=functools.partial(jax.jit, compiler_options=compiler_options()))
  if args.torch:
    from benchmarks.torch_step import TorchStep, product
    functions['torch'] = TorchStep(model, batch, burst, compiled=args.torch == 'compile')
    left, right = (jax.random.normal(jax.random.key(0), shape, model.dtype) for shape in hidden_layer(model, args.batch))
    multiply = jax.jit(jnp.matmul)
    functions |= {'hidden': lambda: jax.block_until_ready([multiply(left, right) for _ in range(PRODUCTS)]),
                  'torch hidden': product(left, right, PRODUCTS)}
    # The threads of one library still spin for a moment after its turn.
    timings = in_turns(functions, args.steps, warm_up=2, pause=0.3)
  else:
    timings = in_turns(functions, args.steps, warm_up=2)
  if not np.isfinite(step.loss):
    raise UserError(f'the loss became {step.loss}: these figures would be meaningless')
  settings = {'size': args.size, 'variant': args.variant, 'input': model.input_size, 'batch': args.batch,
              'dtype': args.dtype, 'device': device.device_kind, 'jax': jax.__version__,
              'compilation cache': jax.config.jax_compilation_cache_dir or 'none'}
  rows = make_rows(args, step, timings, products, burst, device) + (by_kind(step, args.profile) if args.profile else [])
  finish('train_step', settings, rows,
         {str(name): timing for name, timing in timings.items()}, args.out)


def make_rows(args, step: JaxStep, timings, products, burst: int, device) -> list[Row]:
  flops = {name: f / 1e9 for name, f in sample_flops(args.model).items()}  # GFLOP
  best = timings['step'].best / burst
  rates = {n: 2e-9 * n ** 3 * burst / timings[n].best for n in products}
  size = max(rates, key=rates.get)
  ceiling = rates[size], f'{args.dtype} product of {size} x {size}, GFLOP/s'
  costs = cost(step.compiled)
  rows = [
      Row('compile', step.compile_seconds, 's'),
      Row('step, best', 1e3 * best, 'ms'),
      Row('step, median', 1e3 * timings['step'].median / burst, 'ms'),
      Row('samples', args.batch / best, '1/s', ceiling[0] / flops['step'], 'at the matrix rate'),
      Row("rate by the method's arithmetic", flops['step'] * args.batch / best, 'GFLOP/s', *ceiling),
      Row("rate by XLA's cost analysis", costs.flops / best, 'GFLOP/s', *ceiling),
      Row('arithmetic of a sample', flops['step'], 'GFLOP'),
      Row('state and batch', costs.state, 'MB'),
      Row('temporary memory of a step', costs.temporary, 'MB'),
      Row('all of it, by the compiler', costs.total, 'MB')]
  peak = (device.memory_stats() or {}).get('peak_bytes_in_use')
  if peak:
    rows.append(Row('peak memory of the device', peak / 2 ** 20, 'MB'))
  if args.torch:
    rows += against(args, timings, 'torch', burst, f'PyTorch ({args.torch})')
    left, right = hidden_layer(args.model, args.batch)
    own, theirs = (2e-9 * left[0] * left[1] * right[1] * PRODUCTS / timings[name].best for name in ('hidden', 'torch hidden'))
    rows.append(Row('product of a hidden layer', own, 'GFLOP/s', theirs, f'PyTorch, {left} x {right}'))
  if args.onednn:
    rows += against(args, timings, 'onednn', burst, "oneDNN's products")
  return rows


def add_model_options(parser, dtype: str = 'float32'):
  parser.add_argument('--size', choices=PRESETS, default='base')
  parser.add_argument('--variant', choices=VARIANTS, default='clap')
  parser.add_argument('--model', nargs='*', default=[], metavar='FIELD=VALUE', help='e.g. depth=4 remat=cheap input_size=80,1008')
  parser.add_argument('--dtype', choices=['float32', 'bfloat16'], default=dtype)


def model_of(args, parser) -> M2DCLAP:
  """The model that these options describe; ends with argparse's error where none can be made."""
  fields = {**PRESETS[args.size], **VARIANTS[args.variant], 'dtype': args.dtype}
  try:
    fields |= {key: value if value.isidentifier() and value not in ('True', 'False', 'None') else ast.literal_eval(value)
               for key, value in (field.split('=', 1) for field in args.model)}
    return bind(M2DCLAP, fields, '--model')()
  except (UserError, ValueError, SyntaxError) as error:
    parser.error(str(error))


def against(args, timings, name: str, burst: int, which: str) -> list[Row]:
  """The step beside another one timed in the same run."""
  own, other = timings['step'], timings[name]
  return [Row(f'step with {which}, best', 1e3 * other.best / burst, 'ms'),
          Row('samples', args.batch * burst / own.best, '1/s', args.batch * burst / other.best, f'{which} in the same run'),
          Row('the same by processor time', args.batch * burst / own.work, '1/s', args.batch * burst / other.work, which)]


def parse(argv):
  parser = argparse.ArgumentParser(prog='python -m benchmarks.train_step', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  add_model_options(parser)
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--steps', type=int, default=5, help=f'timed rounds: one step each on a CPU, {BURST} elsewhere')
  parser.add_argument('--matmul', type=int, nargs='+', metavar='N', help='sizes of the products that give the ceiling')
  parser.add_argument('--torch', nargs='?', const='eager', choices=['eager', 'compile'],
                      help='also time an equivalent PyTorch step, in turns with this one')
  parser.add_argument('--onednn', action='store_true', help="also time the step with oneDNN's products, as in inference, in turns")
  parser.add_argument('--profile', type=int, default=0, metavar='N', help='also the N kinds of instruction that take longest')
  parser.add_argument('--out', help='JSON file to write')
  args = parser.parse_args(argv)
  if not args.matmul:
    args.matmul = [512, 1024, 2048] if jax.default_backend() == 'cpu' else [4096, 8192, 16384]
  args.model = model_of(args, parser)
  return args


if __name__ == '__main__':
  main()
