"""The building blocks of the Vision Transformer (pre-norm, as in ViT, MAE and M2D).

Alphabet: B batch, F mel bins, T frames, N patches, L tokens, D width, H heads, K head width.
Parameters are float32; `dtype` is the type that matrix products run in. Norms and softmax are computed in float32.
"""
import flax.linen as nn
import jax
import jax.numpy as jnp

Dtype = jnp.dtype | type | str
LN_EPSILON = 1e-6


def dense(features: int, dtype: Dtype, name: str | None = None) -> nn.Dense:
  """Linear layer, Xavier-uniform weights and zero bias."""
  return nn.Dense(features, dtype=dtype, kernel_init=nn.initializers.xavier_uniform(), name=name)


def layer_norm(dtype: Dtype, name: str | None = None) -> nn.LayerNorm:
  return nn.LayerNorm(epsilon=LN_EPSILON, dtype=dtype, use_fast_variance=False, name=name)


def patchify(x: jax.Array, patch: tuple[int, int]) -> jax.Array:
  """Cuts [B, F, T] into patches [B, N, PF * PT]: frequency-major, the values of a patch row by row."""
  b, f, t = x.shape
  pf, pt = patch
  x = x.reshape(b, f // pf, pf, t // pt, pt).transpose(0, 1, 3, 2, 4)
  return x.reshape(b, (f // pf) * (t // pt), pf * pt)


class Attention(nn.Module):
  """Multi-head self-attention with one fused query-key-value projection."""
  heads: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    b, l, d = x.shape
    qkv = dense(3 * d, self.dtype, name='qkv')(x).reshape(b, l, 3, self.heads, d // self.heads)
    query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # B L H K
    out = jax.nn.dot_product_attention(query, key, value)  # softmax in float32
    return dense(d, self.dtype, name='proj')(out.reshape(b, l, d))


class Mlp(nn.Module):
  """Two linear layers around an exact (erf) GELU; the hidden layer is `ratio` times as wide."""
  ratio: float = 4.0
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    d = x.shape[-1]
    x = dense(int(d * self.ratio), self.dtype, name='fc1')(x)
    x = nn.gelu(x, approximate=False)
    return dense(d, self.dtype, name='fc2')(x)


class Block(nn.Module):
  """Pre-norm transformer block."""
  heads: int
  mlp_ratio: float = 4.0
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = x + Attention(self.heads, self.dtype, name='attn')(layer_norm(self.dtype, name='norm1')(x))
    return x + Mlp(self.mlp_ratio, self.dtype, name='mlp')(layer_norm(self.dtype, name='norm2')(x))


class Transformer(nn.Module):
  """`depth` blocks and a final norm: [B, L, D] -> [B, L, D]."""
  depth: int
  heads: int
  mlp_ratio: float = 4.0
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for i in range(self.depth):
      x = Block(self.heads, self.mlp_ratio, self.dtype, name=f'blocks_{i}')(x)
    return layer_norm(self.dtype, name='norm')(x)
