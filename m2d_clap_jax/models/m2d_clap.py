"""M2D-CLAP: Masked Modeling Duo with a CLAP head, and its baselines M2D and MSM-MAE, as one Flax module.

Alphabet: B batch, F mel bins, T frames, N patches, V visible, M masked, D width, E embedding, C caption embedding.
"""
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from m2d_clap_jax.models import masking
from m2d_clap_jax.models.heads import ProjectionMlp, SemanticProjector, masked_mean
from m2d_clap_jax.models.posemb import sincos_2d
from m2d_clap_jax.models.vit import Dtype, Linear, Transformer, patchify

# Encoders are the usual ViT sizes; base and large predict with 512 x 8 x 16 as published.
SIZES = {
    'tiny': dict(width=192, depth=12, heads=3, predictor_width=128, predictor_depth=4, predictor_heads=4),
    'small': dict(width=384, depth=12, heads=6, predictor_width=256, predictor_depth=4, predictor_heads=8),
    'base': dict(width=768, depth=12, heads=12, predictor_width=512, predictor_depth=8, predictor_heads=16),
    'large': dict(width=1024, depth=24, heads=16, predictor_width=512, predictor_depth=8, predictor_heads=16),
}
HOW = ('dtype', 'remat', 'platform')  # fields that say how to compute, not what
LOGIT_SCALE_INIT = math.log(1 / 0.07)
LOGIT_SCALE_MAX = 4.6052  # log 100, rounded as in the public implementation


class Online(NamedTuple):
  """Output of the online network for a masked batch.

  prediction: [B, M, D], or [B, M, PF * PT] when the model predicts pixels.
  masked_tokens: [B, 1 + M, D] [CLS] and embedded masked patches, the target encoder's input.
  masked_patches: [B, M, PF * PT] standardised log-mel values of the masked patches.
  audio: [B, E] CLAP audio embedding from the visible patches, None without a CLAP head.
  """
  prediction: jax.Array
  masked_tokens: jax.Array
  masked_patches: jax.Array
  audio: jax.Array | None


class Predictor(nn.Module):
  """Fills the masked positions with a learned token and predicts them from the visible ones (M2D, section 3.1)."""
  width: int
  depth: int
  heads: int
  out_width: int
  grid: tuple[int, int]
  dtype: Dtype = jnp.float32
  remat: str = 'none'
  platform: str = 'cpu'

  @nn.compact
  def __call__(self, z: jax.Array, mask: masking.Mask) -> jax.Array:
    """z [B, 1 + V, D] encoded [CLS] and visible patches -> predictions [B, M, out_width] at the masked positions."""
    z = Linear(self.width, dtype=self.dtype, platform=self.platform, name='embed')(z)
    cls, visible = jnp.split(z, [1], axis=1)
    token = self.param('mask_token', nn.initializers.normal(0.02), (1, 1, self.width))
    token = jnp.broadcast_to(token.astype(z.dtype), (z.shape[0], mask.masked.shape[1], self.width))
    x = masking.take(jnp.concatenate([visible, token], axis=1), mask.restore)  # B N D, patches in their original order
    x = jnp.concatenate([cls, x], axis=1) + sincos_2d(self.width, self.grid).astype(z.dtype)
    x = Transformer(self.depth, self.heads, dtype=self.dtype, remat=self.remat, platform=self.platform,
                    name='transformer')(x, wanted=1 + mask.masked)
    return Linear(self.out_width, dtype=self.dtype, platform=self.platform, name='pred')(x)


class M2DCLAP(nn.Module):
  """The online network with its heads. `transformer()` also serves as the target encoder.

  Attributes:
    input_size: (mel bins, frames) of a training crop; cut into whole patches of patch_size.
    mask_ratio: share of the patches hidden from the online encoder.
    text_width: width C of the caption embeddings; None omits the CLAP head (M2D, MSM-MAE).
    audio_projector: 'mlp' on the mean patch (2024), or 'semantic' (2025) with semantic_depth blocks of one head.
    text_projector: 'identity', 'linear' or 'mlp'; None: the identity where C equals D, else 'linear'.
    predict: 'features' of the target encoder (M2D) or 'pixels' (MSM-MAE).
    norm_stats: mean and standard deviation for standardising raw log-mels.
    dtype: type of the matrix products; parameters stay float32.
    remat, platform: see `vit.Transformer`; they save memory and time without changing results.
  """
  input_size: tuple[int, int] = (80, 608)
  patch_size: tuple[int, int] = (16, 16)
  width: int = 768
  depth: int = 12
  heads: int = 12
  predictor_width: int = 512
  predictor_depth: int = 8
  predictor_heads: int = 16
  mask_ratio: float = 0.7
  text_width: int | None = 768
  audio_projector: str = 'mlp'
  semantic_depth: int = 1
  semantic_mlp_ratio: float = 1.0
  text_projector: str | None = None
  predict: str = 'features'
  norm_stats: tuple[float, float] = (-7.1, 4.2)
  dtype: Dtype = jnp.float32
  remat: str = 'none'
  platform: str = 'cpu'

  @property
  def grid(self) -> tuple[int, int]:
    """Patches of a training crop along (frequency, time)."""
    return self.input_size[0] // self.patch_size[0], self.input_size[1] // self.patch_size[1]

  @property
  def num_patches(self) -> int:
    return self.grid[0] * self.grid[1]

  @nn.nowrap
  def transformer(self) -> Transformer:
    """The encoder's blocks and norm, unbound; applied to the target parameters, this is the target encoder."""
    return Transformer(self.depth, self.heads, dtype=self.dtype, remat=self.remat, platform=self.platform)

  @property
  def text_projection(self) -> str:
    """The kind of text projector: 'identity', 'linear' or 'mlp'."""
    return self.text_projector or ('identity' if self.text_width == self.width else 'linear')

  def setup(self):
    pixels = self.patch_size[0] * self.patch_size[1]
    self.patch_embed = Linear(self.width, dtype=self.dtype, platform=self.platform)
    self.cls_token = self.param('cls_token', nn.initializers.normal(0.02), (1, 1, self.width))
    self.encoder = self.transformer()
    self.predictor = Predictor(
        self.predictor_width, self.predictor_depth, self.predictor_heads,
        pixels if self.predict == 'pixels' else self.width, self.grid, dtype=self.dtype, remat=self.remat,
        platform=self.platform)
    if self.text_width is not None:
      self.audio_proj = (
          ProjectionMlp(self.width, self.dtype) if self.audio_projector == 'mlp' else
          SemanticProjector(self.width, self.semantic_depth, self.semantic_mlp_ratio, self.dtype, self.platform))
      if self.text_projection != 'identity':
        self.text_proj = {'linear': Linear, 'mlp': ProjectionMlp}[self.text_projection](self.width, dtype=self.dtype)
      self.logit_scale = self.param('logit_scale', nn.initializers.constant(LOGIT_SCALE_INIT), ())

  def embed(self, logmel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Raw log-mels [B, F, T] -> tokens [B, 1 + N, D] with their positions, and standardised patches [B, N, PF * PT]."""
    mean, std = self.norm_stats
    patches = patchify((logmel.astype(jnp.float32) - mean) / std, self.patch_size)
    grid = logmel.shape[1] // self.patch_size[0], logmel.shape[2] // self.patch_size[1]
    positions = self.positions(grid)
    tokens = self.patch_embed(patches) + positions[1:].astype(self.dtype)
    cls = jnp.broadcast_to(self.cls_token + positions[:1], (tokens.shape[0], 1, self.width))
    return jnp.concatenate([cls.astype(tokens.dtype), tokens], axis=1), patches

  def positions(self, grid: tuple[int, int]) -> jax.Array | np.ndarray:
    """Position table of a grid of patches -> [1 + N, D]: from the variables 'tables', cropped in time, or sin-cos."""
    if not self.has_variable('tables', 'pos_embed'):
      return sincos_2d(self.width, grid)
    table: jax.Array = self.get_variable('tables', 'pos_embed')[0]
    rows, columns = self.grid
    if grid[0] != rows or grid[1] > columns:
      raise ValueError(f'the position table has {rows} x {columns} patches, too few for {grid[0]} x {grid[1]}')
    cut = table[1:].reshape(rows, columns, -1)[:, :grid[1]].reshape(grid[0] * grid[1], -1)
    return jnp.concatenate([table[:1], cut])

  def encode(self, logmel: jax.Array, valid: jax.Array | None = None, keep: jax.Array | None = None) -> jax.Array:
    """Raw log-mels [B, F, T] -> patch embeddings [B, N, D], float32.

    With `keep`, int [B, K], the encoder sees these patches only (structured patchout) -> [B, K, D].

    `valid`, bool [B, N], marks the patches that exist where clips of different lengths are padded to one (see
    `valid_patches`); ignore the embeddings of the others.
    """
    tokens, _ = self.embed(logmel)
    if keep is not None:
      tokens = jnp.concatenate([tokens[:, :1], masking.take(tokens[:, 1:], keep)], axis=1)
    if valid is not None:
      valid = jnp.pad(valid, ((0, 0), (1, 0)), constant_values=True)  # [CLS]
    return self.encoder(tokens, valid)[:, 1:].astype(jnp.float32)

  def clip_features(self, logmel: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Features of unmasked clips for evaluation: raw log-mels [B, F, T] -> float32 ([B, F / PF * D], [B, E] or None).

    The first are transfer-learning features: the embeddings of a time column's patches side by side (5 x 768 = 3840
    for Base), averaged over time. The second are CLAP audio embeddings.
    """
    z = self.encode(logmel)
    features = jnp.mean(self.frames(z), axis=1)
    return features, None if self.text_width is None else self.project_audio(z)

  def frames(self, z: jax.Array) -> jax.Array:
    """Patch embeddings [B, N, D] -> [B, T / PT, F / PF * D]: those of a time column side by side, lowest band first."""
    b, n, d = z.shape
    rows = self.grid[0]
    return z.reshape(b, rows, n // rows, d).transpose(0, 2, 1, 3).reshape(b, n // rows, rows * d)

  def online(self, logmel: jax.Array, mask: masking.Mask) -> Online:
    """Runs the online encoder on the visible patches only, and the predictor. logmel [B, F, T] raw."""
    tokens, patches = self.embed(logmel)
    cls, tokens = jnp.split(tokens, [1], axis=1)
    z = self.encoder(jnp.concatenate([cls, masking.take(tokens, mask.visible)], axis=1))  # B 1+V D
    masked_tokens = jnp.concatenate([cls, masking.take(tokens, mask.masked)], axis=1)
    audio = None
    if self.text_width is not None:
      audio = self.project_audio(z[:, 1:])
    return Online(self.predictor(z, mask), masked_tokens, masking.take(patches, mask.masked), audio)

  def project_audio(self, z: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """Patch embeddings [B, N, D], of which `valid`, bool [B, N], exist -> CLAP audio embeddings [B, E], float32."""
    valid = jnp.ones(z.shape[:2], bool) if valid is None else valid
    if self.audio_projector == 'mlp':
      return self.audio_proj(masked_mean(z, valid)).astype(jnp.float32)
    return self.audio_proj(z, valid).astype(jnp.float32)

  def project_text(self, text: jax.Array) -> jax.Array:
    """Caption embeddings [B, C] -> [B, E], float32."""
    text = text.astype(jnp.float32)
    return text if self.text_projection == 'identity' else self.text_proj(text).astype(jnp.float32)

  def __call__(self, logmel: jax.Array, mask: masking.Mask, text: jax.Array | None = None):
    """Uses every parameter once: for `init`."""
    out = self.online(logmel, mask)
    return out if text is None else (out, self.project_text(text), self.logit_scale)


def valid_patches(columns: jax.Array, grid: tuple[int, int]) -> jax.Array:
  """Number of time columns [B] that each clip has -> which patches of the grid exist, bool [B, N]."""
  exists = jnp.arange(grid[1])[None] < columns[:, None]
  count = columns.shape[0]  # a symbol, where the program is exported for any batch
  return jnp.broadcast_to(exists[:, None], (count, *grid)).reshape(count, -1)
