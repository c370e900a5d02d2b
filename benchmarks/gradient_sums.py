"""What it costs in accuracy that devices sum their gradients in bfloat16, the type in which the products return them.

  python -m benchmarks.gradient_sums --run=runs/demo --data=data/demo/records --devices 256 --batch 2048

Masked prediction continues from a run for one batch, each device's part of it by itself, in float32 and in bfloat16. The
devices' gradients of the kernels (all weight matrices) are then added in float32 and in bfloat16: one after the other, as around
a ring, and in pairs, as in a tree. Errors are norms of differences, divided by the norm of what is right. Two things put them
into proportion: the rounding of the products themselves, and the noise of the batch, which is the difference between the gradient
of its first half and that of the whole.
"""
import argparse
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from benchmarks.report import Row, finish
from m2d_clap_jax import weights
from m2d_clap_jax.data.batches import crop
from m2d_clap_jax.data.read import Folder
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.progress import Progress
from m2d_clap_jax.train.step import draw_mask, pretrain_loss


def round_off(x: np.ndarray) -> np.ndarray:
  """float32 -> the nearest bfloat16, as float32."""
  return x.astype(jnp.bfloat16).astype(np.float32)


class Sums:
  """Sums of gradients [N].

  Attributes:
    exact: in float64.
    ring: one after the other in bfloat16 (values of it, as float32).
    pairs: as in a tree, likewise.
  """

  def __init__(self):
    self.exact, self.ring = 0.0, np.float32(0)
    self._pairs: list[tuple[int, np.ndarray]] = []  # sums of 2^level gradients, the largest first

  def add(self, x: np.ndarray):
    self.exact = self.exact + x.astype(np.float64)
    self.ring = round_off(self.ring + round_off(x))
    level, total = 0, round_off(x)
    while self._pairs and self._pairs[-1][0] == level:
      level, total = level + 1, round_off(self._pairs.pop()[1] + total)
    self._pairs.append((level, total))

  @property
  def pairs(self) -> np.ndarray:
    return functools.reduce(lambda a, b: round_off(a + b), [total for _, total in reversed(self._pairs)])


def gradients(run: str, folder: str, devices: int, batch: int) -> Iterator[list[np.ndarray]]:
  """Yields, for each device, its gradient of the kernels [N] by float32 and by bfloat16 products.

  UserError for a run without a target network, or data without a split 'train'.
  """
  found, split = weights.read(run), Folder(folder).split('train')
  if 'target' not in found.trees:
    raise UserError(f'--run={run}: has no target network: name a run of pre-training')
  network = found.network().clone(text_width=None)
  params, target = (traverse_util.unflatten_dict(found.trees[name], sep='/') for name in ('params', 'target'))
  params = {name: value for name, value in params.items() if name in ('cls_token', 'patch_embed', 'encoder', 'predictor')}
  draw = np.random.default_rng(0)
  clips = draw.choice(split.num_clips, batch, replace=split.num_clips < batch).reshape(devices, -1)
  params, target = jax.device_put((params, target))

  def gradient(params, target, logmel, number, dtype):
    model = network.clone(dtype=dtype)
    mask = draw_mask(jax.random.key_data(jax.random.key(0)), number, len(logmel), model=model)
    with jax.default_matmul_precision('highest'):  # accelerators would otherwise round float32 products, too
      return jax.grad(lambda p: pretrain_loss(p, target, {'logmel': logmel}, mask, model=model)[0])(params)
  compute = jax.jit(gradient, static_argnames='dtype')
  for number, ids in enumerate(clips):
    logmel = np.stack([crop(clip.logmel, network.input_size[1], 0.5) for clip in split.clips(ids.tolist())])
    yield [_kernels(compute(params, target, logmel, number, dtype)) for dtype in ('float32', 'bfloat16')]


def _kernels(tree) -> np.ndarray:
  leaves = traverse_util.flatten_dict(jax.device_get(tree), sep='/')
  return np.concatenate([value.ravel() for name, value in leaves.items() if name.endswith('kernel')])


def error(found: np.ndarray, right: np.ndarray) -> float:
  """Norm of the difference over the norm of what is right."""
  return float(np.linalg.norm(found - right) / np.linalg.norm(right))


def main(argv=None):
  parser = argparse.ArgumentParser(prog='python -m benchmarks.gradient_sums', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--run', required=True, help='a run of pre-training')
  parser.add_argument('--data', required=True, help='a prepared folder')
  parser.add_argument('--devices', type=int, default=256)
  parser.add_argument('--batch', type=int, default=2048, help='over all devices')
  parser.add_argument('--out', help='JSON file to write')
  args = parser.parse_args(argv)
  if args.devices < 2 or args.batch < 1 or args.batch % args.devices:
    parser.error('--devices: must be 2 or more and divide --batch')
  sums, wanted, progress = Sums(), np.float64(0), Progress('devices', args.devices)
  try:
    for number, (right, rounded) in enumerate(gradients(args.run, args.data, args.devices, args.batch), 1):
      wanted = wanted + right
      sums.add(rounded)
      if number == args.devices // 2:
        half = wanted * args.devices / number
      progress(number, args.devices)
  except UserError as problem:
    parser.error(str(problem))
  products, noise = error(sums.exact, wanted), error(half, wanted)
  rows = [Row('products in bfloat16', 100 * products, '%', 100 * noise, 'the noise of the batch')]
  rows += [Row(f'sums in bfloat16, {how}', 100 * error(total, sums.exact), '%', 100 * products, 'the products')
           for how, total in (('one after the other', sums.ring), ('in pairs', sums.pairs))]
  finish('gradient_sums', {'devices': args.devices, 'batch': args.batch, 'gradients': len(sums.ring)}, rows, {}, args.out)


if __name__ == '__main__':
  main()
