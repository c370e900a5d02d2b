"""Encoding prepared clips with a model in training, on all devices of its mesh."""
import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np

from m2d_clap_jax import sharding
from m2d_clap_jax.data.batches import crop
from m2d_clap_jax.data.read import Split
from m2d_clap_jax.models import M2DCLAP

BATCH = 64


class SplitEncoder:
  """`encoder(variables, split)` -> (features [n, f * D], audio embeddings [n, E] or None, clips without their log-mels).

  Each process reads only the clips of its own devices, and all receive the whole result, so that each can compute the
  same scores.

  Args:
    progress: called with a description after each batch.
  """

  def __init__(self, model: M2DCLAP, mesh, progress: Callable[[str], None]):
    self._model, self._mesh, self._progress = model, mesh, progress
    features = functools.partial(_clip_features, model=model.clone(platform=sharding.platform(mesh)))
    self._features = sharding.Jitted(features, mesh, out_shardings=sharding.replicated(mesh))

  def __call__(self, variables, split: Split, limit: int | None = None):
    count = min(split.num_clips, limit or split.num_clips)
    size = -(-min(BATCH, count) // self._mesh.size) * self._mesh.size  # one shape, one compilation
    outputs, clips = [], {}
    for start in range(0, count, size):
      def read(first, stop, start=start):
        logmels = np.zeros((stop - first, *self._model.input_size), np.float16)
        numbers = range(start + first, min(start + stop, count))
        for row, number, clip in zip(logmels, numbers, split.clips(numbers) if numbers else ()):
          row[:] = crop(clip.logmel, row.shape[1], 0.0)
          clips[number] = dataclasses.replace(clip, logmel=None)
        return logmels
      logmels = sharding.rows_on_devices(self._mesh, (size, *self._model.input_size), read)
      outputs.append(jax.tree.map(lambda x, n=count - start: np.asarray(x)[:n], self._features(variables, logmels)))
      self._progress(f'clip {start} of {split.name}')
    features, audio = zip(*outputs)
    return (np.concatenate(features), None if audio[0] is None else np.concatenate(audio),
            list(sharding.join(clips).values()))


def _clip_features(variables, logmel, *, model):
  return model.apply(variables, logmel, method='clip_features')
