"""The building blocks of the Vision Transformer (pre-norm, as in ViT, MAE and M2D).

Alphabet: B batch, F mel bins, T frames, N patches, L tokens, D width, H heads, K head width.
Parameters are float32; `dtype` is the type that matrix products run in. Norms and softmax are computed in float32.
"""
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Dtype = jnp.dtype | type | str


class Linear(nn.Dense):
  """Linear layer over the last axis, Xavier-uniform weights and zero bias.

  Tokens of all samples are multiplied as one matrix [B * L, D]: on a CPU, XLA then needs no transposed copies in the
  backward pass and takes less than half the time. On accelerators it makes no difference.
  """
  kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()

  def __call__(self, x: jax.Array) -> jax.Array:
    return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.features)


class LayerNorm(nn.LayerNorm):
  """Layer norm over the last axis, statistics in float32; flattened for the same reason as `Linear`."""
  epsilon: float = 1e-6
  use_fast_variance: bool = False

  def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]  # without Flax's mask argument
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

  `valid`, bool [B, L], marks the tokens that are attended to; None means all of them.
  """
  heads: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    b, l, d = x.shape
    qkv = Linear(3 * d, dtype=self.dtype, name='qkv')(x).reshape(b, l, 3, self.heads, -1)
    # Heads go to the front first: otherwise XLA's CPU products take up to three times as long.
    query, key, value = qkv.transpose(2, 0, 3, 1, 4)  # each B H L K
    scores = jnp.einsum('bhik,bhjk->bhij', query * (d // self.heads) ** -0.5, key, preferred_element_type=jnp.float32)
    if valid is not None:
      scores = jnp.where(valid[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
    weights = nn.softmax(scores).astype(value.dtype)
    out = jnp.einsum('bhij,bhjk->bihk', weights, value)
    return Linear(d, dtype=self.dtype, name='proj')(out.reshape(b, l, d))


def gelu(x: jax.Array) -> jax.Array:
  """Exact GELU with erf: on a CPU, half the work of flax.linen.gelu's erfc, and equally accurate here."""
  return 0.5 * x * (1 + jax.lax.erf(x * np.sqrt(0.5).astype(x.dtype)))


class Mlp(nn.Module):
  """Two linear layers around an exact (erf) GELU; the hidden layer is `ratio` times as wide."""
  ratio: float = 4.0
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    d = x.shape[-1]
    x = Linear(int(d * self.ratio), dtype=self.dtype, name='fc1')(x)
    x = gelu(x)
    return Linear(d, dtype=self.dtype, name='fc2')(x)


class Block(nn.Module):
  """Pre-norm transformer block."""
  heads: int
  mlp_ratio: float = 4.0
  dtype: Dtype = jnp.float32
  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    normed = LayerNorm(self.epsilon, dtype=self.dtype, name='norm1')(x)
    x = x + Attention(self.heads, self.dtype, name='attn')(normed, valid)
    normed = LayerNorm(self.epsilon, dtype=self.dtype, name='norm2')(x)
    return x + Mlp(self.mlp_ratio, self.dtype, name='mlp')(normed)


class Transformer(nn.Module):
  """`depth` blocks and a final norm: [B, L, D] -> [B, L, D]; `valid` as in `Attention`.

  remat: recompute the blocks' activations in the backward pass instead of keeping them.
  scan: compile one block and run it `depth` times, at the cost of copying the parameters in each call. For deep models
    on accelerators; a CPU does not compile it faster (benchmarks.compile).
  Neither changes parameters or results. epsilon: of all norms.
  """
  depth: int
  heads: int
  mlp_ratio: float = 4.0
  dtype: Dtype = jnp.float32
  remat: bool = False
  scan: bool = False
  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    if self.scan and not self.is_initializing():
      x = self._scanned(x, valid)
    else:
      block = nn.remat(Block) if self.remat else Block
      for i in range(self.depth):
        x = block(self.heads, self.mlp_ratio, self.dtype, self.epsilon, name=f'blocks_{i}')(x, valid)
    return LayerNorm(self.epsilon, dtype=self.dtype, name='norm')(x)

  def _scanned(self, x: jax.Array, valid: jax.Array | None) -> jax.Array:
    params = self.variables['params']
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[f'blocks_{i}'] for i in range(self.depth)))
    block = Block(self.heads, self.mlp_ratio, self.dtype, self.epsilon, parent=None)

    def body(x, own):
      return block.apply({'params': own}, x, valid), None
    return jax.lax.scan(jax.checkpoint(body) if self.remat else body, x, stacked)[0]
