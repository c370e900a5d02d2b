"""Attention of each block's [CLS] token to the patches of a clip.

Alphabet: H heads, N patches, D width.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from m2d_clap_jax.models import M2DCLAP


def cls_attention(pipeline, wave, sample_rate: int | None = None) -> tuple[np.ndarray, np.ndarray]:
  """The first chunk (6.08 s, for most models) of a clip -> (log-mel [F, T], attention [blocks, H, rows, columns]).

  The attention of a head over the patches and [CLS] itself sums to 1; the maps contain only the patches.

  Args:
    pipeline: `api.Pipeline`.
    wave: one clip, as for `Pipeline.embed`.
  """
  chunk = next(pipeline.chunks([wave], sample_rate))
  weights = _attention(pipeline.variables, chunk.logmel[None], network=pipeline.network)
  return chunk.logmel, np.asarray(weights).reshape(*weights.shape[:2], pipeline.network.grid[0], chunk.columns)


@functools.partial(jax.jit, static_argnames='network')
def _attention(variables, logmel, *, network: M2DCLAP):
  """Log-mels [1, F, T] -> [blocks, H, N]."""
  def is_qkv(module, method):
    return module.name == 'qkv' and method == '__call__'
  _, found = network.clone(remat='none').apply(
      variables, logmel, method='encode', capture_intermediates=is_qkv, mutable='intermediates')
  blocks = found['intermediates']['encoder']
  rows = []
  for i in range(network.depth):
    qkv = blocks[f'blocks_{i}']['attn']['qkv']['__call__'][0].astype(jnp.float32)
    query, key, _ = jnp.split(qkv.reshape(-1, 3, network.heads, network.width // network.heads), 3, axis=1)  # 1+N 1 H K
    scores = jnp.einsum('hk,nhk->hn', query[0, 0], key[:, 0]) * key.shape[-1] ** -0.5
    rows.append(nn.softmax(scores)[:, 1:])
  return jnp.stack(rows)
