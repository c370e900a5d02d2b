"""The clips in the batches of a fine-tuning run, and the random numbers drawn for them on the host: pure functions of
(seed, step) or (seed, epoch), the same in every process."""
import functools

import numpy as np

from m2d_clap_jax.errors import UserError


def rarity(targets: np.ndarray) -> np.ndarray:
  """Weights of clips by the rarity of their classes, as used for AudioSet: (sum of 1000 / (count + 0.01))^(2/3).

  Args:
    targets: [n, C], 1 where the clip has the label.

  Returns:
    float64 [n], 0 for a clip without labels.
  """
  targets = np.asarray(targets, bool)
  worth = 1000 / (targets.sum(axis=0) + 0.01)
  return np.array([worth[row].sum() for row in targets]) ** (2 / 3)  # row by row: all of AudioSet in float64 is 8 GB


class Epochs:
  """Batches that restart each epoch: every clip at most once per epoch; an incomplete last batch is dropped.

  Args:
    num_clips, batch_size, seed: of the order.
    weights: [num_clips]; with them, an epoch is `per_epoch` clips drawn without replacement by these weights.
  """

  def __init__(self, num_clips: int, batch_size: int, seed: int, weights: np.ndarray | None = None,
               per_epoch: int | None = None):
    possible = num_clips if weights is None else int(np.count_nonzero(weights))
    size = min(possible, per_epoch or possible)
    self.steps = size // batch_size
    if not self.steps:
      raise UserError(f'config.batch_size={batch_size} is more than the {size} clips of an epoch: use a smaller one')
    self._num_clips, self._batch_size, self._seed = num_clips, batch_size, seed
    self._weights, self._size = weights, size
    self._order = functools.lru_cache(maxsize=2)(self._draw)

  def _draw(self, epoch: int) -> np.ndarray:
    draw = np.random.default_rng([self._seed, 0, epoch])
    if self._weights is None:
      return draw.permutation(self._num_clips)
    # The largest u^(1/weight), here as logarithms, are a sample without replacement (Efraimidis and Spirakis, 2006).
    with np.errstate(divide='ignore'):
      keys = np.log(draw.random(self._num_clips)) / self._weights
    return draw.permutation(np.argpartition(-keys, self._size - 1)[:self._size])

  def clips(self, step: int) -> np.ndarray:
    """Clip numbers int [B] of batch `step`, counted over all epochs."""
    epoch, place = divmod(step, self.steps)
    return self._order(epoch)[place * self._batch_size:(place + 1) * self._batch_size]

  def crops(self, step: int) -> np.ndarray:
    """Uniform numbers [B]: where the clips of batch `step` are cropped, new each time a clip occurs."""
    return np.random.default_rng([self._seed, 1, step]).random(self._batch_size)

  def patchout(self, step: int) -> float:
    """The uniform number that determines the counts of structured patchout, once per step."""
    return np.random.default_rng([self._seed, 2, step]).random()


def validation_crops(num_clips: int, seed: int, epoch: int) -> np.ndarray:
  """Uniform numbers [num_clips]: where validation clips are cropped after `epoch`."""
  return np.random.default_rng([seed, 3, epoch]).random(num_clips)
