"""Training state: arrays only, so that a checkpoint is plain data."""
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from m2d_clap_jax.models import M2DCLAP
from m2d_clap_jax.models.masking import num_visible, random_mask


@flax.struct.dataclass
class TrainState:
  """step: int32 updates done; params: online network; target_params: moving average of the encoder (empty for
  MSM-MAE); opt_state: optax; rng: the run's key, never advanced: each step folds its number in."""
  step: jax.Array
  params: Any
  target_params: Any
  opt_state: Any
  rng: jax.Array


def create_state(seed: int, *, model: M2DCLAP, tx: optax.GradientTransformation) -> TrainState:
  """Initialises everything from one seed; traceable, so that drivers can create it already sharded.

  The target encoder starts from its own random initialisation, as in the authors' public implementation.
  """
  rng, online_key, target_key = jax.random.split(jax.random.key(seed), 3)
  logmel = jnp.zeros((1, *model.input_size))
  mask = random_mask(jnp.zeros((1, model.num_patches)), num_visible(model.num_patches, model.mask_ratio))
  text = None if model.text_width is None else jnp.zeros((1, model.text_width))
  params = model.init(online_key, logmel, mask, text)['params']
  target_params = {}
  if model.predict == 'features':
    tokens = jnp.zeros((1, 2, model.width))
    target_params = model.transformer().init(target_key, tokens)['params']
  return TrainState(jnp.zeros((), jnp.int32), params, target_params, tx.init(params), jax.random.key_data(rng))
