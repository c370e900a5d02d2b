"""The building blocks of the Vision Transformer (pre-norm, as in ViT, MAE and M2D).

Alphabet: B batch, F mel bins, T frames, N patches, L tokens, M of them, D width, H heads, K head width.
Parameters are float32; `dtype` is the type that matrix products run in. Norms and softmax are computed in float32.
`platform` is the kind of device that the computation is arranged for, 'cpu', 'gpu' or 'tpu'; it runs on all of them and
gives the same results.
"""
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from m2d_clap_jax.models import attention
from m2d_clap_jax.models.masking import take

Dtype = jnp.dtype | type | str


class Linear(nn.Dense):
  """Linear layer over the last axis, Xavier-uniform weights and zero bias.

  For a CPU, tokens of all samples are multiplied as one matrix [B * L, D]: XLA then needs no transposed copies in the
  backward pass and takes less than half the time. A TPU would have to move all of them, unless L is a multiple of 16.
  """
  kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
  platform: str = 'cpu'

  def __call__(self, x: jax.Array) -> jax.Array:
    if self.platform != 'cpu':
      return super().__call__(x)
    return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.features)


class LayerNorm(nn.LayerNorm):
  """Layer norm over the last axis, statistics in float32; flattened as in `Linear`."""
  epsilon: float = 1e-6
  use_fast_variance: bool = False
  platform: str = 'cpu'

  def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]  # without Flax's mask argument
    if self.platform != 'cpu':
      return super().__call__(x)
    return super().__call__(x.reshape(-1, x.shape[-1])).reshape(x.shape)


def patchify(x: jax.Array, patch: tuple[int, int]) -> jax.Array:
  """Cuts [B, F, T] into patches [B, N, PF * PT]: frequency-major, the values of a patch row by row.

  Remainders at the ends are dropped: 1001 frames give 62 patches of 16.
  """
  pf, pt = patch
  b, f, t = x.shape[0], x.shape[1] // pf, x.shape[2] // pt
  x = x[:, :f * pf, :t * pt].reshape(b, f, pf, t, pt).transpose(0, 1, 3, 2, 4)
  return x.reshape(b, f * t, pf * pt)


class Attention(nn.Module):
  """Multi-head self-attention with one fused query-key-value projection.

  valid: bool [B, L], the tokens that are attended to; None means all of them.
  wanted: int [B, M], the tokens that attend; None means all of them, M = L.

  [B, L, D] -> [B, M, D]. On TPUs it is one kernel, where the width allows (see `attention`).
  """
  heads: int
  dtype: Dtype = jnp.float32
  platform: str = 'cpu'

  @nn.compact
  def __call__(self, x: jax.Array, valid: jax.Array | None = None, wanted: jax.Array | None = None) -> jax.Array:
    qkv = checkpoint_name(Linear(3 * x.shape[-1], dtype=self.dtype, platform=self.platform, name='qkv')(x), 'qkv')
    if self.platform == 'tpu' and attention.fits(x.shape[-1], self.heads):
      out = attention.fused_attention(qkv, valid, self.heads)
      out = out if wanted is None else take(out, wanted)
    else:
      out = self._plain(qkv, valid, wanted)
    out = checkpoint_name(out, 'attended')
    return Linear(x.shape[-1], dtype=self.dtype, platform=self.platform, name='proj')(out)

  def _plain(self, qkv: jax.Array, valid: jax.Array | None, wanted: jax.Array | None = None) -> jax.Array:
    b, width = qkv.shape[0], qkv.shape[2] // 3
    query, key, value = jnp.split(qkv, 3, axis=2)
    if wanted is not None:
      query = take(query, wanted)
    # Both products have heads in front: in other layouts XLA's CPU products take up to three times as long.
    query, key, value = (x.reshape(b, x.shape[1], self.heads, -1).swapaxes(1, 2) for x in (query, key, value))  # B H . K
    scores = jnp.einsum('bhik,bhjk->bhij', query * (width // self.heads) ** -0.5, key,
                        preferred_element_type=jnp.float32)
    if valid is not None:
      scores = jnp.where(valid[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
    weights = nn.softmax(scores).astype(value.dtype)
    return jnp.einsum('bhij,bhjk->bhik', weights, value).swapaxes(1, 2).reshape(b, -1, width)


def gelu(x: jax.Array) -> jax.Array:
  """Exact GELU with erf: on a CPU, half the work of flax.linen.gelu's erfc, and equally accurate here."""
  return 0.5 * x * (1 + jax.lax.erf(x * np.sqrt(0.5).astype(x.dtype)))


class Mlp(nn.Module):
  """Two linear layers around an exact (erf) GELU; the hidden layer is `ratio` times as wide."""
  ratio: float = 4.0
  dtype: Dtype = jnp.float32
  platform: str = 'cpu'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    d = x.shape[-1]
    x = Linear(int(d * self.ratio), dtype=self.dtype, platform=self.platform, name='fc1')(x)
    x = gelu(checkpoint_name(x, 'hidden'))
    return Linear(d, dtype=self.dtype, platform=self.platform, name='fc2')(x)


class Block(nn.Module):
  """Pre-norm transformer block: [B, L, D] -> [B, L, D], or [B, M, D] of the tokens `wanted`; see `Attention`."""
  heads: int
  mlp_ratio: float = 4.0
  dtype: Dtype = jnp.float32
  epsilon: float = 1e-6
  platform: str = 'cpu'

  @nn.compact
  def __call__(self, x: jax.Array, valid: jax.Array | None = None, wanted: jax.Array | None = None) -> jax.Array:
    normed = LayerNorm(self.epsilon, dtype=self.dtype, platform=self.platform, name='norm1')(x)
    attended = Attention(self.heads, self.dtype, self.platform, name='attn')(normed, valid, wanted)
    x = attended + (x if wanted is None else take(x, wanted))
    x = checkpoint_name(x, 'middle')
    normed = LayerNorm(self.epsilon, dtype=self.dtype, platform=self.platform, name='norm2')(x)
    return x + Mlp(self.mlp_ratio, self.dtype, self.platform, name='mlp')(normed)


# What a block keeps for the backward pass, besides its input, under each kind of `Transformer.remat`. The results of its
# matrix products are dear to compute; norms, GELU and softmax are cheap.
KEPT = {'none': None, 'cheap': ('qkv', 'attended', 'middle', 'hidden'), 'full': ()}


class Transformer(nn.Module):
  """`depth` blocks and a final norm: [B, L, D] -> [B, L, D]; `valid` as in `Attention`.

  wanted: int [B, M], the tokens whose results are needed: the last block computes no others -> [B, M, D].
  remat: what is computed again in the backward pass instead of kept: 'none', 'cheap' (norms, GELU and softmax) or
    'full' (all but the blocks' inputs).
  It changes neither parameters nor, beyond rounding, results. epsilon: of all norms.
  """
  depth: int
  heads: int
  mlp_ratio: float = 4.0
  dtype: Dtype = jnp.float32
  remat: str = 'none'
  platform: str = 'cpu'
  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: jax.Array, valid: jax.Array | None = None, wanted: jax.Array | None = None) -> jax.Array:
    kept, block = KEPT[self.remat], Block
    if kept is not None:
      block = nn.remat(Block, policy=jax.checkpoint_policies.save_only_these_names(*kept))
    for i in range(self.depth):
      rows = wanted if i == self.depth - 1 else None
      x = block(self.heads, self.mlp_ratio, self.dtype, self.epsilon, self.platform, name=f'blocks_{i}')(x, valid, rows)
    return LayerNorm(self.epsilon, dtype=self.dtype, platform=self.platform, name='norm')(x)
