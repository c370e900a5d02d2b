"""A run's newest checkpoint as plain weights, for inference and export."""
import pathlib

import numpy as np
from flax import traverse_util

from m2d_clap_jax.train.checkpoint import read_parameters
from m2d_clap_jax.weights import Weights


def read_run(workdir: pathlib.Path) -> Weights:
  """Weights of the newest checkpoint in a pre-training run's workdir; UserError where there is none."""
  step, params, target, meta = read_parameters(workdir.resolve())
  model = {key: tuple(value) if isinstance(value, list) else value for key, value in meta['settings']['model'].items()
           if key not in ('dtype', 'remat', 'scan')}  # how to compute, not what
  model['norm_stats'] = tuple(meta['norm_stats'])
  encoder = meta['text_encoder']
  if model['text_width'] is None:
    encoder = None
  trees = {tree: {path: np.asarray(value) for path, value in traverse_util.flatten_dict(leaves, sep='/').items()}
           for tree, leaves in (('params', params), ('target', target)) if leaves}
  return Weights(model=model, trees=trees, sample_rate=meta['logmel']['sample_rate'],
                 text_encoder=encoder and {'pooling': 'mean', **encoder}, source=str(workdir), step=step)
