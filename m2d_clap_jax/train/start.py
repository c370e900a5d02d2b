"""Starting a run from weights that exist already, instead of at random."""
import jax
import numpy as np
from flax import traverse_util

from m2d_clap_jax.errors import UserError
from m2d_clap_jax.train.step import TrainState
from m2d_clap_jax.weights import Weights


def start_from(state: TrainState, weights: Weights) -> tuple[TrainState, str]:
  """Puts imported weights into a new state -> (state, what was taken, for people).

  What the weights lack (the predictor of encoder-only files, the CLAP head of M2D) stays as initialised. A target
  network that they lack starts as a copy of the imported encoder. Position tables are computed, so any input size goes.
  The optimizer starts anew.

  Raises:
    UserError: parts that both have differ in shape: another width, depth, or patch size.
  """
  params, taken, fresh = merge(state.params, weights.trees['params'], weights.source)
  target = state.target_params
  if target:
    own = weights.trees.get('target')
    encoder = {path.removeprefix('encoder/'): value for path, value in weights.trees['params'].items()
               if path.startswith('encoder/')}
    target, _, _ = merge(target, own or encoder, weights.source)
    taken.append('target' if own else 'target (a copy of the encoder)')
  note = f'starts from {weights.source}: {", ".join(taken)}'
  if fresh:
    note += f'; at random: {", ".join(fresh)}'
  return state.replace(params=params, target_params=target), note


def merge(tree, leaves: dict, source: str):
  """Replaces the leaves of `tree` by those of the same path -> (tree, top-level parts replaced, parts kept).

  Raises:
    UserError: a part is there, but not all of it, or in other shapes.
  """
  flat = traverse_util.flatten_dict(tree, sep='/')
  wrong = [f'{path} {tuple(leaves[path].shape)} instead of {value.shape}' for path, value in flat.items()
           if path in leaves and tuple(leaves[path].shape) != value.shape]
  # A part is taken as a whole or not at all: half an encoder, of another depth, would be neither.
  parts = {path.partition('/')[0] for path in flat}
  fresh = sorted(part for part in parts if not any(_in(part, path) for path in leaves))
  wrong += [f'{path} missing' for path in flat if path not in leaves and not any(_in(part, path) for part in fresh)]
  wrong += [f'{path} too many' for path in leaves if path not in flat and any(_in(part, path) for part in parts)]
  if wrong:
    raise UserError(f'config.init={source}: its weights do not fit config.model: ' + ', '.join(wrong[:6])
                    + (f', and {len(wrong) - 6} more' if len(wrong) > 6 else ''))
  merged = {path: _like(leaves[path], value) if path in leaves else value for path, value in flat.items()}
  return traverse_util.unflatten_dict(merged, sep='/'), sorted(parts - set(fresh)), fresh


def _in(part: str, path: str) -> bool:
  return path == part or path.startswith(f'{part}/')


def _like(value: np.ndarray, leaf: jax.Array) -> jax.Array:
  return jax.device_put(np.asarray(value, leaf.dtype), leaf.sharding)
