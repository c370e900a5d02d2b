"""Which clips, crops and captions make up a batch: a pure function of (seed, step).

Nothing here has state. The position in the data is the step number, so a run resumes exactly, on any number of hosts;
host h reads rows h * B / H ... (h + 1) * B / H of a batch that is the same for all.
"""
import functools
from collections.abc import Sequence

import numpy as np


class Order:
  """An endless sequence of shuffled epochs over `num_clips` clips, cut into batches.

  Every clip occurs exactly once per epoch, unless weights say otherwise. Batches span the end of an epoch, so that no
  clip is dropped.

  Args:
    num_clips: of all parts.
    sizes: clips of each part, such as a folder; the first part has the first numbers.
    weights: how often the clips of each part come in an epoch: 0.5 is every second one, 2 is each twice. Over the epochs,
      a part's clips come equally often, too.
  """

  def __init__(self, num_clips: int, batch_size: int, seed: int, sizes: Sequence[int] | None = None,
               weights: Sequence[float] | None = None):
    self.num_clips, self.batch_size, self.seed = num_clips, batch_size, seed
    self.sizes = list(sizes or [num_clips])
    self.shares = [round(weight * size) for weight, size in zip(weights or [1] * len(self.sizes), self.sizes)]
    self.epoch_clips = sum(self.shares)
    # A batch not larger than the data spans at most two epochs; keep the permutations of the current ones.
    self._permutation = functools.lru_cache(maxsize=4)(self._draw_permutation)

  def _draw_permutation(self, epoch: int) -> np.ndarray:
    members = np.arange(self.num_clips)
    if self.shares != self.sizes:
      members = np.concatenate([self._of_part(part, epoch) for part in range(len(self.sizes))])
    return np.random.default_rng([self.seed, 0, epoch]).permutation(members)

  def _of_part(self, part: int, epoch: int) -> np.ndarray:
    """Which clips of a part an epoch has: the next ones in an endless shuffled sequence of the part's own."""
    share, size = self.shares[part], self.sizes[part]
    rounds, places = np.divmod(np.arange(epoch * share, (epoch + 1) * share), size)
    clips = np.empty(share, np.int64)
    for number in np.unique(rounds):
      own = np.random.default_rng([self.seed, 3, part, number]).permutation(size)
      clips[rounds == number] = own[places[rounds == number]]
    return sum(self.sizes[:part]) + clips

  def clips(self, step: int) -> np.ndarray:
    """Clip numbers int [B] of batch `step`."""
    places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
    epochs, places = np.divmod(places, self.epoch_clips)
    clips = np.empty(self.batch_size, np.int64)
    for epoch in np.unique(epochs):
      clips[epochs == epoch] = self._permutation(int(epoch))[places[epochs == epoch]]
    return clips

  def parts(self, clips: np.ndarray) -> np.ndarray:
    """Which part each clip belongs to, int32."""
    return np.searchsorted(np.cumsum(self.sizes), clips, 'right').astype(np.int32)

  def counts(self, step: int) -> np.ndarray:
    """How many clips of each part the batches before `step` had, int [parts]."""
    epochs, places = divmod(step * self.batch_size, self.epoch_clips)
    parts = self.parts(self._permutation(epochs)[:places])
    return epochs * np.array(self.shares) + np.bincount(parts, minlength=len(self.sizes))

  def draws(self, step: int) -> np.ndarray:
    """Uniform numbers [B, 2] of batch `step`: where each clip is cropped, and which of its captions is used."""
    return np.random.default_rng([self.seed, 1, step]).random((self.batch_size, 2))

  def patchout(self, step: int) -> float:
    """The uniform number that the counts of a structured mask are drawn with, once a step."""
    return np.random.default_rng([self.seed, 2, step]).random()
