"""Clips of 10 seconds through the real `Pipeline`, beside the matrix-product rate and optionally PyTorch.

  python -m benchmarks.encode --size base --batch 1 32 --torch
  python -m benchmarks.encode --size base --batch 1 32 256 --dtype bfloat16 --torch     # an accelerator
  python -m benchmarks.encode --size base --batch 1 8 --stablehlo                       # beside the exported program

A call converts waves in memory to embeddings in memory: log-mels, encoder, average, CLAP projection. PyTorch has less
to do: a ViT of the same size, in evaluation mode, on a clip's number of tokens, without computing log-mels.
Growth of memory is the maximum over all calls, including the first and its compilation. Weights are random; neither
TensorFlow nor orbax is needed.
"""
import argparse
import functools

import jax
import numpy as np

from benchmarks.report import Row, finish, in_turns
from benchmarks.train_step import PRESETS, matrix_products
from m2d_clap_jax import stablehlo
from m2d_clap_jax.api import Pipeline
from m2d_clap_jax.models import M2DCLAP
from m2d_clap_jax.planning.arithmetic import block_flops
from m2d_clap_jax.weights import Weights, expected_shapes

SECONDS = 10


def random_pipeline(model: M2DCLAP, batch_size: int) -> Pipeline:
  """A Pipeline of the model's encoder and CLAP head with random weights."""
  rng = np.random.default_rng(0)
  params = {path: 0.02 * rng.standard_normal(shape).astype(np.float32) + path.endswith('scale')
            for path, shape in expected_shapes(model)['params'].items() if not path.startswith('predictor/')}
  fields = {name: getattr(model, name) for name in M2DCLAP.__dataclass_fields__
            if name not in ('parent', 'name', 'dtype')}
  return Pipeline(Weights(model=fields, trees={'params': params}, source='random'), dtype=model.dtype,
                  batch_size=batch_size)


def token_counts(pipeline: Pipeline) -> list[int]:
  """Numbers of tokens, including [CLS], of a clip's chunks."""
  rows, columns = pipeline.network.grid
  left = -(-pipeline.logmel.num_frames(SECONDS * pipeline.sample_rate) // pipeline.network.patch_size[1])
  counts = []
  while left:
    counts.append(1 + rows * min(left, columns))
    left -= min(left, columns)
  return counts


def clip_flops(model: M2DCLAP, tokens: list[int]) -> float:
  """Forward FLOP of one clip: patch embedding and blocks, matrix products only."""
  pixels = model.patch_size[0] * model.patch_size[1]
  return sum(model.depth * block_flops(n, model.width) + 2 * (n - 1) * pixels * model.width for n in tokens)


def encode(pipeline: Pipeline, waves: np.ndarray):
  assert np.isfinite(pipeline.encode_audio(waves)).all()


class Exported:
  """The StableHLO program of `m2d-clap convert`, called with waves in memory."""

  def __init__(self, pipeline: Pipeline, waves: np.ndarray):
    program, parameters = stablehlo.exported(pipeline.weights)
    self._call, self._parameters = jax.jit(program.call), jax.device_put(list(parameters.values()))
    self._waves, self._samples = waves, np.full(len(waves), waves.shape[1], np.int32)

  def __call__(self):
    assert np.isfinite(jax.device_get(self._call(self._parameters, self._waves, self._samples))['clap']).all()


def logmels(pipeline: Pipeline, waves: np.ndarray):
  for wave in waves:
    pipeline.logmel.numpy(wave)


def main(argv=None):
  args = parse(argv)
  device = jax.devices()[0]
  model = M2DCLAP(**PRESETS[args.size], dtype=args.dtype)
  pipeline = random_pipeline(model, max(args.batch))
  waves = 0.1 * np.random.default_rng(0).standard_normal((max(args.batch), SECONDS * pipeline.sample_rate), np.float32)
  tokens = token_counts(pipeline)
  functions = {}
  for batch in args.batch:
    functions[f'encode {batch}'] = functools.partial(encode, pipeline, waves[:batch])
    functions[f'log-mel {batch}'] = functools.partial(logmels, pipeline, waves[:batch])
    if args.stablehlo:
      functions[f'stablehlo {batch}'] = Exported(pipeline, waves[:batch])
    if args.torch:
      from benchmarks.torch_step import TorchEncoder
      functions[f'torch {batch}'] = TorchEncoder(model, batch, tokens)
  products = matrix_products(args.dtype, args.matmul, 1)
  functions |= {f'product {n}': function for n, function in products.items()}
  # The threads of one library still spin for a moment after its turn.
  timings = in_turns(functions, args.rounds, warm_up=1, pause=0.3 if args.torch else 0.0)
  settings = {'size': args.size, 'input': model.input_size, 'seconds': SECONDS, 'dtype': args.dtype,
              'rounds': args.rounds, 'device': device.device_kind, 'jax': jax.__version__}
  rates = {n: 2e-9 * n ** 3 / timings[f'product {n}'].best for n in products}
  finish('encode', settings, make_rows(args, clip_flops(model, tokens) / 1e9, timings, rates), timings, args.out)


def make_rows(args, gflop: float, timings, rates) -> list[Row]:
  size = max(rates, key=rates.get)
  rows = []
  for batch in args.batch:
    seconds, name = timings[f'encode {batch}'], f'clips at batch {batch}'
    rows.append(Row(name, batch / seconds.best, '1/s', rates[size] / gflop, f'at the {args.dtype} product of {size}'))
    if args.torch:
      other = timings[f'torch {batch}']
      rows += [Row(name, batch / seconds.best, '1/s', batch / other.best, 'ViT alone in PyTorch, in the same run'),
               Row('the same by processor time', batch / seconds.work, '1/s', batch / other.work, 'ViT alone in PyTorch')]
    if args.stablehlo:
      rows.append(Row(name, batch / seconds.best, '1/s', batch / timings[f'stablehlo {batch}'].best,
                      'the exported StableHLO program, in the same run'))
    rows.append(Row(f'log-mel alone, share of the time at batch {batch}',
                    100 * timings[f'log-mel {batch}'].best / seconds.best, '%'))
    rows.append(Row(f'peak growth of memory at batch {batch}', seconds.grew_mb, 'MB'))
    if args.torch:
      rows.append(Row(f'the same of PyTorch at batch {batch}', timings[f'torch {batch}'].grew_mb, 'MB'))
  return [*rows, Row('arithmetic of a clip', gflop, 'GFLOP')]


def parse(argv):
  parser = argparse.ArgumentParser(prog='python -m benchmarks.encode', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--size', choices=PRESETS, default='base')
  parser.add_argument('--batch', type=int, nargs='+', default=[1, 32], metavar='N', help='clips a call')
  parser.add_argument('--rounds', type=int, default=3, help='timed turns')
  parser.add_argument('--dtype', choices=['float32', 'bfloat16'], default='float32')
  parser.add_argument('--matmul', type=int, nargs='+', metavar='N', help='sizes of the products that give the ceiling')
  parser.add_argument('--torch', action='store_true', help='also time a PyTorch ViT of the same size, in turns')
  parser.add_argument('--stablehlo', action='store_true', help='also time the exported program, float32, in turns')
  parser.add_argument('--out', help='JSON file to write')
  args = parser.parse_args(argv)
  if min(args.batch) < 1:
    parser.error(f'--batch {min(args.batch)}: a call takes at least one clip')
  if not args.matmul:
    args.matmul = [1024, 2048] if jax.default_backend() == 'cpu' else [8192, 16384]
  return args


if __name__ == '__main__':
  main()
