"""A model's audio side as one StableHLO program with its weights: from waves to embeddings with jax alone.

`save` writes a .npz file: `program`, a serialised `jax.export.Exported` for CPU, CUDA and TPU; `about`, JSON; the
parameters, in the order in which the program takes them. examples/stablehlo_loader.py opens it.

Alphabet: B clips, S samples, F mel bins, T frames, D width of the encoder, E embedding, C classes.
"""
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from m2d_clap_jax import paths
from m2d_clap_jax.api import MOST_TOKENS
from m2d_clap_jax.audio import LogMel
from m2d_clap_jax.audio.logmel import SILENCE
from m2d_clap_jax.models import M2DCLAP, inference
from m2d_clap_jax.weights import Weights, family

PLATFORMS = ('cpu', 'cuda', 'tpu')


def embeddings(variables, waves, samples, *, network: M2DCLAP, logmel: LogMel, shortest: int = 0) -> dict:
  """What `Pipeline` computes, for clips of any lengths: waves [B, S] of which samples, int [B], exist -> a dict.

  `embedding` [B, 5 * D] as of `embed`, and as far as the model has them `clap` [B, E] as of `encode_audio` and `logits`
  [B, C]. Windows are those of `audio.chunks`: whole crops and a last one of its own length. They are computed one after the
  other, those of all clips side by side.

  Args:
    shortest: frames that shorter clips are first filled up to, with silence.
    waves: float32 at the model's rate, S a multiple of the hop; what lies beyond a clip's samples is ignored.
  """
  frames, patch, columns = network.input_size[1], network.patch_size[1], network.grid[1]
  spectrum = logmel.ragged(waves, samples)  # B F T
  count = (spectrum.shape[2] + frames - 1) // frames
  width = jax.core.min_dim(columns, (spectrum.shape[2] + patch - 1) // patch)  # short clips need not be filled up
  lengths = samples // logmel.hop + 1
  if shortest:
    width = columns
    spectrum = jnp.where(jnp.arange(spectrum.shape[2]) < lengths[:, None, None], spectrum, SILENCE)
    lengths = jnp.maximum(lengths, shortest)
  spectrum = jnp.pad(spectrum, ((0, 0), (0, 0), (0, frames)), constant_values=SILENCE)

  def window(total, i):
    piece = jax.lax.dynamic_slice_in_dim(spectrum, i * frames, width * patch, axis=2)
    left = lengths - i * frames  # B
    # The mean pads the last patch, as in `Chunker`.
    piece = jnp.where(jnp.arange(width * patch) < left[:, None, None], piece, network.norm_stats[0])
    real = jnp.clip((left + patch - 1) // patch, 0, columns)
    if network.text_width is not None and network.audio_projector == 'semantic':
      features = inference.columns(variables, piece, real, network=network)
      exists = jnp.arange(width) < real[:, None]
      return total + jnp.sum(jnp.where(exists[..., None], features, 0), axis=1), (features, exists, real)
    return total + inference.pooled(variables, piece, real, network=network), (None, None, real)
  start = jnp.zeros((waves.shape[0], network.grid[0] * network.width))
  total, (features, exists, real) = jax.lax.scan(window, start, jnp.arange(count))
  found = {'embedding': total / jnp.sum(real, axis=0)[:, None]}
  if network.text_width is not None:
    found['clap'] = inference.project(variables, *_patches(found['embedding'], features, exists, network), network=network)
  if 'head' in variables:
    found['logits'] = inference.head(found['embedding'], variables['head'], variables['head_stats'], network=network)
  return found


def _patches(embedding, features, exists, network: M2DCLAP):
  """What the CLAP head projects: patches [B, N, D], and which of them exist, bool [B, N]."""
  b, width, rows = embedding.shape[0], network.width, network.grid[0]
  if features is None:  # only their mean matters
    patches = jnp.mean(embedding.reshape(b, rows, width), axis=1, keepdims=True)
    return patches, jnp.ones((b, 1), bool)
  patches = jnp.moveaxis(features, 0, 1).reshape(b, -1, width)
  return patches, jnp.repeat(jnp.moveaxis(exists, 0, 1).reshape(b, -1), rows, axis=1)


def exported(weights: Weights) -> tuple[export.Exported, dict[str, np.ndarray]]:
  """-> the program of (list of parameters, waves float32 [B, S], samples int32 [B]), for any B and S, and the parameters.

  S is a multiple of the hop, of 6.5 minutes at most for models with a semantic projector, which sees all of a clip at once.
  """
  network, logmel = weights.network(), LogMel.for_rate(weights.sample_rate)
  variables = {'params': {name: tree for name, tree in weights.nested('params').items() if name != 'predictor'}}
  # The table of positions is cropped to any number of columns.
  variables['tables'] = {'pos_embed': np.asarray(weights.with_tables().trees['tables']['pos_embed'])}
  if 'head' in weights.trees:
    variables |= {tree: weights.nested(tree) for tree in ('head', 'head_stats')}
  leaves, structure = jax.tree_util.tree_flatten_with_path(variables)
  parameters = {'/'.join(key.key for key in path): value for path, value in leaves}

  def program(parameters, waves, samples):
    variables = jax.tree.unflatten(structure, parameters)
    return embeddings(variables, waves, samples, network=network, logmel=logmel, shortest=weights.padded_to)
  most = most_frames(network)
  b, t = export.symbolic_shape('b, t', constraints=['t >= 1'] + ([f't <= {most - 1}'] if most else []))
  made = export.export(jax.jit(program), platforms=PLATFORMS)(
      [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in parameters.values()],
      jax.ShapeDtypeStruct((b, t * logmel.hop), np.float32), jax.ShapeDtypeStruct((b,), np.int32))
  return made, parameters


def most_frames(network: M2DCLAP) -> int | None:
  """The longest clip of a model with a semantic projector, in whole windows; None of others."""
  if network.text_width is None or network.audio_projector != 'semantic':
    return None
  return MOST_TOKENS // network.grid[0] // network.grid[1] * network.input_size[1]


def save(weights: Weights, path):
  """Writes program and parameters as one .npz file, atomically -> its path."""
  program, parameters = exported(weights)
  hop, most = LogMel.for_rate(weights.sample_rate).hop, most_frames(weights.network())
  about = {'model': family(weights), 'fingerprint': weights.fingerprint, 'sample_rate': weights.sample_rate, 'hop': hop,
           'most_seconds': most and (most - 1) * hop // weights.sample_rate, 'classes': weights.classes,
           'platforms': PLATFORMS}
  with paths.replacing(path) as name, open(name, 'wb') as file:
    arrays: dict = {'program': np.frombuffer(program.serialize(), np.uint8), 'about': np.array(json.dumps(about))}
    np.savez(file, **arrays | parameters)
  return path
