"""Projectors of the CLAP head: from the encoder's patches, and from a caption embedding, to the shared space.

Alphabet: B batch, N patches, D width of the encoder, E embedding, C caption embedding.
"""
import flax.linen as nn
import jax
import jax.numpy as jnp

from m2d_clap_jax.models.vit import Dtype, Linear, Transformer


class ProjectionMlp(nn.Module):
  """Linear, ReLU, linear: [B, D] -> [B, E] with E = `width` (M2D-CLAP 2024's audio projector, section 2.2)."""
  width: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.relu(Linear(self.width, dtype=self.dtype, name='fc1')(x))
    return Linear(self.width, dtype=self.dtype, name='fc2')(x)


class SemanticProjector(nn.Module):
  """A learned token that attends to the patches through transformer blocks with one head: the 2025 models' projector.

  Maps patch embeddings [B, N, D] and a mask of the real ones, bool [B, N], to [B, D]. The authors' models have an MLP
  ratio of 1 with one or two blocks and of 2 with three or four (arXiv 2503.22104 and its code).
  """
  width: int
  depth: int = 1
  mlp_ratio: float = 1.0
  dtype: Dtype = jnp.float32
  platform: str = 'cpu'

  @nn.compact
  def __call__(self, x: jax.Array, valid: jax.Array) -> jax.Array:
    token = self.param('token', nn.initializers.zeros, (1, 1, self.width)).astype(x.dtype)
    x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.width)), x], axis=1)
    valid = jnp.pad(valid, ((0, 0), (1, 0)), constant_values=True)
    blocks = Transformer(self.depth, heads=1, mlp_ratio=self.mlp_ratio, epsilon=1e-5, dtype=self.dtype, platform=self.platform,
                         name='transformer')
    return blocks(x, valid, wanted=jnp.zeros((x.shape[0], 1), int))[:, 0]


def masked_mean(x: jax.Array, valid: jax.Array) -> jax.Array:
  """Mean of [B, N, D] over the N that are valid, bool [B, N] -> float32 [B, D]."""
  weights = valid.astype(jnp.float32)
  return jnp.sum(x.astype(jnp.float32) * weights[..., None], axis=1) / jnp.sum(weights, axis=1, keepdims=True)
