"""Starts a run from existing weights instead of random ones."""
import jax
import numpy as np
from flax import traverse_util

from m2d_clap_jax.errors import UserError
from m2d_clap_jax.train.step import TrainState
from m2d_clap_jax.weights import Weights


def start_from(state: TrainState, weights: Weights) -> tuple[TrainState, str]:
  """Puts imported weights into a new state -> (state, a line that names the imported parts).

  Parts that the weights lack (the predictor of encoder-only files, the CLAP head of M2D) stay as initialised; a missing
  target network becomes a copy of the imported encoder. Position tables are computed, so any input size works.
  The optimizer state is not imported.

  Raises:
    UserError: common parts differ in shape: another width, depth, or patch size.
  """
  params, taken, fresh = merge(state.params, weights.trees['params'], weights.source)
  target = state.target_params
  if target:
    imported = weights.trees.get('target')
    encoder = {path.removeprefix('encoder/'): value for path, value in weights.trees['params'].items()
               if path.startswith('encoder/')}
    target, _, _ = merge(target, imported or encoder, weights.source)
    taken.append('target' if imported else 'target (a copy of the encoder)')
  note = f'starts from {weights.source}: {", ".join(taken)}'
  if fresh:
    note += f'; at random: {", ".join(fresh)}'
  return state.replace(params=params, target_params=target), note


def merge(tree, leaves: dict, source: str):
  """Replaces the leaves of `tree` by those with the same path -> (tree, top-level parts replaced, parts kept).

  Raises:
    UserError: a part is incomplete or has other shapes.
  """
  flat = traverse_util.flatten_dict(tree, sep='/')
  wrong = [f'{path} {tuple(leaves[path].shape)} instead of {value.shape}' for path, value in flat.items()
           if path in leaves and tuple(leaves[path].shape) != value.shape]
  # A part is replaced as a whole or not at all: an encoder of another depth would be a mixture.
  parts = {path.partition('/')[0] for path in flat}
  fresh = sorted(part for part in parts if not any(_in(part, path) for path in leaves))
  wrong += [f'{path} missing' for path in flat if path not in leaves and not any(_in(part, path) for part in fresh)]
  wrong += [f'{path} unexpected' for path in leaves if path not in flat and any(_in(part, path) for part in parts)]
  if wrong:
    raise UserError(f'config.init={source}: its weights do not fit config.model: ' + ', '.join(wrong[:6])
                    + (f', and {len(wrong) - 6} more' if len(wrong) > 6 else ''))
  merged = {path: like(leaves[path], value) if path in leaves else value for path, value in flat.items()}
  return traverse_util.unflatten_dict(merged, sep='/'), sorted(parts - set(fresh)), fresh


def _in(part: str, path: str) -> bool:
  return path == part or path.startswith(f'{part}/')


def like(value: np.ndarray, leaf: jax.Array) -> jax.Array:
  """A value on the devices, in the type and layout of `leaf`."""
  return jax.device_put(np.asarray(value, leaf.dtype), leaf.sharding)
