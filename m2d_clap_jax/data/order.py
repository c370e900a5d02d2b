"""Which clips, crops and captions make up a batch: a pure function of (seed, step).

Nothing here has state. The position in the data is the step number, so a run resumes exactly, on any number of hosts;
host h reads rows h * B / H ... (h + 1) * B / H of a batch that is the same for all.
"""
import functools

import numpy as np


class Order:
  """An endless sequence of shuffled epochs over `num_clips` clips, cut into batches.

  Every clip occurs exactly once per epoch. Batches span the end of an epoch, so that no clip is dropped.
  """

  def __init__(self, num_clips: int, batch_size: int, seed: int):
    self.num_clips, self.batch_size, self.seed = num_clips, batch_size, seed
    # A batch not larger than the data spans at most two epochs; keep the permutations of the current ones.
    self._permutation = functools.lru_cache(maxsize=4)(self._draw_permutation)

  def _draw_permutation(self, epoch: int) -> np.ndarray:
    return np.random.default_rng([self.seed, 0, epoch]).permutation(self.num_clips)

  def clips(self, step: int) -> np.ndarray:
    """Clip numbers int [B] of batch `step`."""
    places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
    epochs, places = np.divmod(places, self.num_clips)
    clips = np.empty(self.batch_size, np.int64)
    for epoch in np.unique(epochs):
      clips[epochs == epoch] = self._permutation(int(epoch))[places[epochs == epoch]]
    return clips

  def draws(self, step: int) -> np.ndarray:
    """Uniform numbers [B, 2] of batch `step`: where each clip is cropped, and which of its captions is used."""
    return np.random.default_rng([self.seed, 1, step]).random((self.batch_size, 2))
