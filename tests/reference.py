"""The authors' reference outputs (float32, CPU) and the weights they were computed with."""
import json
import pathlib
import zlib

import numpy as np
from flax import traverse_util

from m2d_clap_jax.weights.names import to_flax

GOLDEN = pathlib.Path(__file__).parent / 'golden'
TINY = dict(input_size=(80, 96), width=96, depth=2, heads=3, predictor_width=64, predictor_depth=2, predictor_heads=4,
            norm_stats=(0.0, 1.0))


def load(name):
  return np.load(GOLDEN / f'{name}.npz')


def weight(key, shape):
  """One tensor, drawn from its name alone: any implementation can rebuild the same checkpoint."""
  draw = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(tuple(shape), dtype=np.float32)
  if key.endswith('logit_scale'):
    return np.log(1 / 0.07, dtype=np.float32)
  if key.endswith('.weight') and len(shape) == 1:
    return (1 + 0.1 * draw).astype(np.float32)
  if key.endswith(('.bias', 'token')):
    return (0.02 * draw).astype(np.float32)
  return (draw * np.sqrt(1.0 / (int(np.prod(shape[1:])) or 1))).astype(np.float32)


def shapes(name):
  return json.loads((GOLDEN / f'{name}_shapes.json').read_text())


def state_dict(name):
  """The reference checkpoint of a model, torch names and layouts, without the fixed tables."""
  fixed = ('pos_embed', 'decoder_pos_embed', 'norm_stats')
  return {key: weight(key, shape) for key, shape in shapes(name).items() if key not in fixed}


def parameters(name):
  """(online parameters, target parameters) of a reference checkpoint."""
  trees = to_flax(state_dict(name))
  return tuple(traverse_util.unflatten_dict(trees.get(tree, {}), sep='/') for tree in ('params', 'target'))
