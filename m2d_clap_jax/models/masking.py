"""Random masking: which patches the online encoder sees and which it must predict (M2D, section 3.1)."""
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Mask(NamedTuple):
  """A split of N patches into V visible and M masked ones, drawn for each of B samples.

  visible: int [B, V] patch indices, in the order drawn.
  masked: int [B, M] patch indices, in the order drawn.
  restore: int [B, N] position of patch n in the concatenation [visible, masked].
  """
  visible: jax.Array
  masked: jax.Array
  restore: jax.Array


def num_visible(num_patches: int, mask_ratio: float) -> int:
  """Number of patches that stay visible: int(N * (1 - ratio)), e.g. 57 of 190 at 0.7."""
  # 1 - 0.7 is 0.30000000000000004 and 190 times that is 57.0: the same float arithmetic as the public implementation.
  return int(num_patches * (1 - mask_ratio))


def random_mask(noise: jax.Array, visible: int) -> Mask:
  """Sorts uniform noise [B, N]; the `visible` patches with the lowest values in each sample stay visible."""
  order = jnp.argsort(noise, axis=1)
  return Mask(order[:, :visible], order[:, visible:], jnp.argsort(order, axis=1))


def take(tokens: jax.Array, index: jax.Array) -> jax.Array:
  """Picks tokens [B, N, D] at index [B, K] -> [B, K, D]."""
  return jnp.take_along_axis(tokens, index[:, :, None], axis=1)


def as_bool(mask: Mask) -> jax.Array:
  """The mask as bool [B, N], True where a patch is masked."""
  return mask.restore >= mask.visible.shape[1]
