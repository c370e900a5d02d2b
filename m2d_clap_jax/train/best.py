"""The best classifier of a fine-tuning run so far, as a portable folder beside the checkpoints."""
from collections.abc import Callable

from m2d_clap_jax import paths
from m2d_clap_jax.weights import Weights
from m2d_clap_jax.weights.portable import CONFIG, save_portable

BEST = 'best'


class BestClassifier:
  """In FOLDER/best-EPOCH while the run may still find a better one, then in FOLDER/best.

  Args:
    found: {'score', 'epoch'} of the checkpoint that the run continues from; None where there is none.
    writes: whether this process is the one that writes.

  Attributes:
    found: the same of the best so far.
  """

  def __init__(self, folder, found: dict | None, writes: bool):
    self.found, self._folder, self._writes = found, folder, writes
    self._in_checkpoint = found

  @property
  def place(self):
    """A name of its own, because after a kill the epochs since the newest checkpoint come again and may, on some devices,
    come out a little differently."""
    place = self._folder / f'{BEST}-{self.found["epoch"]}'
    # Killed between the last two steps of a run, it has its final name already. A store moves file by file, the
    # description before the tensors: while it is there, the rest is.
    return place if (place / CONFIG).exists() or not (self._folder / BEST).exists() else self._folder / BEST

  def offer(self, score: float, epoch: int, make: Callable[[], Weights]):
    """Keeps the classifier that `make` gives, which all processes call, if its score is the best so far."""
    if self.found is None or score > self.found['score']:
      self.found = {'score': score, 'epoch': epoch}
      weights = make()
      if self._writes:
        save_portable(weights, self._folder / f'{BEST}-{epoch}')

  def for_checkpoint(self) -> dict | None:
    """`found`, to be saved. Deletes the classifiers that neither this checkpoint nor the one before, which is the newest
    until the save in the background is done, calls the best."""
    self._keep({each['epoch'] for each in (self.found, self._in_checkpoint) if each})
    self._in_checkpoint = self.found
    return self.found

  def finish(self):
    """Gives the best its final name and deletes all others."""
    if self._writes and self.place != self._folder / BEST:
      paths.move(self.place, self._folder / BEST)
    self._keep(set())

  def _keep(self, epochs: set[int]):
    kept = {f'{BEST}-{epoch}' for epoch in epochs}
    for path in self._folder.glob(f'{BEST}-*') if self._writes else ():
      if path.name not in kept:
        path.rmtree()
