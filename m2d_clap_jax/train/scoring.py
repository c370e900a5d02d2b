"""Scores a task's clips with a classifier in training, on all devices of its mesh."""
import functools
from collections.abc import Callable

import numpy as np

from m2d_clap_jax import sharding
from m2d_clap_jax.eval import linear_protocol
from m2d_clap_jax.models.classifier import Classifier
from m2d_clap_jax.train.finetune_step import Inputs, score
from m2d_clap_jax.train.task_data import Data

BATCH = 64


class Scorer:
  """`scorer(variables, clips)` -> targets and logits [n, C], in all processes; each reads the clips of its own devices.

  Args:
    progress: called with a description after each batch.
  """

  def __init__(self, classifier: Classifier, data: Data, inputs: Inputs, mesh, progress: Callable[[str], None]):
    self._data, self._mesh, self._progress = data, mesh, progress
    model = classifier.on(sharding.platform(mesh))
    self._score = sharding.Jitted(functools.partial(score, model=model, inputs=inputs), mesh, static_argnames='method',
                                  out_shardings=sharding.replicated(mesh))

  def __call__(self, variables, clips, draws: np.ndarray | None = None,
               method: str = '__call__') -> tuple[np.ndarray, np.ndarray]:
    """variables: (params, stats, tables); draws: where the clips are cropped, as for `Waves.crops`, None: at their start;
    method: of the classifier, to return something other than logits."""
    size = -(-BATCH // self._mesh.size) * self._mesh.size
    numbers, found = self._data.numbers(clips), []
    draws = np.zeros(len(clips)) if draws is None else draws
    for start in range(0, len(numbers), size):
      count = len(numbers[start:start + size])
      # Filled up with the last clip: one shape, one compilation.
      rows, places = (np.pad(x[start:start + size], (0, size - count), mode='edge') for x in (numbers, draws))
      waves = sharding.rows_on_devices(self._mesh, (size, self._data.waves.samples),
                                       lambda a, b, r=rows, p=places: self._data.waves.crops(r[a:b], p[a:b]))
      lengths = sharding.rows_on_devices(self._mesh, (size,), lambda a, b, r=rows: self._data.lengths(r[a:b]))
      found.append(np.asarray(self._score(*variables, waves=waves, lengths=lengths, method=method))[:count])
      self._progress(f'clip {start} of an evaluation')
    return self._data.task.targets(clips), np.concatenate(found)

  def metric(self, variables, clips, draws: np.ndarray | None = None) -> float:
    """The task's metric, in 0..1."""
    return self.metric_of(*self(variables, clips, draws))

  def metric_of(self, targets, logits) -> float:
    return linear_protocol.score_of(logits, targets, self._data.task.metric == 'mAP')
