"""Inference on the device: pure functions of variables and log-mels, to be compiled.

Alphabet: B clips, F mel bins, T time columns (patches), PT frames of a patch, D width of the encoder, E embedding, L layers,
C classes.
"""
import jax
import jax.numpy as jnp
import numpy as np

from m2d_clap_jax.models import M2DCLAP
from m2d_clap_jax.models.classifier import EPSILON
from m2d_clap_jax.models.m2d_clap import valid_patches
from m2d_clap_jax.models.vit import Block


def columns(variables, logmel, real, *, network: M2DCLAP, layers: tuple[int, ...] = ()):
  """Raw log-mels [B, F, T * PT] of which `real` [B] columns exist -> frame features [B, T, 5 * D].

  With layers, numbers of blocks from 1: the outputs of these blocks, before any norm, instead -> [B, T, L, 5 * D].
  """
  with jax.default_matmul_precision('highest' if network.dtype == 'float32' else None):
    grid = network.grid[0], logmel.shape[2] // network.patch_size[1]
    valid = valid_patches(real, grid)
    if not layers:
      return network.frames(jnp.asarray(network.apply(variables, logmel, valid, method='encode')))
    # Outputs cannot be captured from blocks that are rematerialised: these are not separate modules.
    _, kept = network.clone(remat='none').apply(
        variables, logmel, valid, method='encode', mutable=['intermediates'],
        capture_intermediates=lambda module, _: isinstance(module, Block))
    blocks = kept['intermediates']['encoder']
    outputs = [blocks[f'blocks_{layer - 1}']['__call__'][0][:, 1:].astype(jnp.float32) for layer in layers]  # no [CLS]
    return jnp.stack([network.frames(z) for z in outputs], axis=2)


def pooled(variables, logmel, real, *, network: M2DCLAP):
  """The frame features of `columns`, summed over the columns that exist -> [B, 5 * D]."""
  features = columns(variables, logmel, real, network=network)
  exists = jnp.arange(features.shape[1])[None] < real[:, None]
  return jnp.sum(jnp.where(exists[..., None], features, 0), axis=1)


def project(variables, z, valid, *, network: M2DCLAP):
  """Patch embeddings [B, N, D], of which `valid`, bool [B, N], exist -> CLAP audio embeddings [B, E]."""
  with jax.default_matmul_precision('highest'):
    return network.apply(variables, z, valid, method='project_audio')


def project_text(variables, text, *, network: M2DCLAP):
  """Sentence embeddings [n, width of the text encoder] -> captions in the space of `project` [n, E]."""
  with jax.default_matmul_precision('highest'):
    return network.apply(variables, text, method='project_text')


def head(x, head, stats, *, network: M2DCLAP):
  """Features [n, 5 * D] -> scores of a fine-tuned head [n, C]; arrays of numpy or jax.

  Args:
    head: kernel and bias. stats: mean and var, of the batch norm before it.
  """
  if len(stats['mean']) == network.width:  # trained with structured patchout: on the mean patch
    x = x.reshape(x.shape[0], -1, network.width).mean(axis=1)
  x = (x - stats['mean']) / (stats['var'] + EPSILON) ** 0.5
  with jax.default_matmul_precision('highest'):
    return (x @ head['kernel'] + head['bias']).astype(np.float32)
