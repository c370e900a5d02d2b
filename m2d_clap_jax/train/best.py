"""The best classifier of a fine-tuning run so far, as a portable folder beside the checkpoints."""
from collections.abc import Callable

from m2d_clap_jax import paths
from m2d_clap_jax.weights import Weights
from m2d_clap_jax.weights.portable import CONFIG, save_portable

BEST = 'best'


class BestClassifier:
  """Kept in FOLDER/best-EPOCH while the run may still find a better one, then in FOLDER/best.

  Args:
    result: {'score', 'epoch'} from the checkpoint that the run continues from; None without one.
    writes: whether this process writes files.

  Attributes:
    result: {'score', 'epoch'} of the best so far.
  """

  def __init__(self, folder, result: dict | None, writes: bool):
    self.result, self._folder, self._writes = result, folder, writes
    self._in_checkpoint = result

  @property
  def place(self):
    """The folder of the best. Its name has the epoch, because after a kill the epochs since the newest checkpoint are
    repeated and may, on some devices, give slightly different results."""
    place = self._folder / f'{BEST}-{self.result["epoch"]}'
    # After a kill between the last two steps of a run, the folder already has its final name. A store moves file by file,
    # and the description before the tensors: while it is at the old place, so is everything else.
    return place if (place / CONFIG).exists() or not (self._folder / BEST).exists() else self._folder / BEST

  def offer(self, score: float, epoch: int, make: Callable[[], Weights]):
    """Keeps the classifier from `make`, which all processes call, if its score is the best so far."""
    if self.result is None or score > self.result['score']:
      self.result = {'score': score, 'epoch': epoch}
      weights = make()
      if self._writes:
        save_portable(weights, self._folder / f'{BEST}-{epoch}')

  def for_checkpoint(self) -> dict | None:
    """Returns `result`, to be saved. Deletes the classifiers that are the best of neither this checkpoint nor the previous
    one, which is the newest until the background save is done."""
    self._keep({each['epoch'] for each in (self.result, self._in_checkpoint) if each})
    self._in_checkpoint = self.result
    return self.result

  def finish(self):
    """Renames the best to its final name and deletes all others."""
    if self._writes and self.place != self._folder / BEST:
      paths.move(self.place, self._folder / BEST)
    self._keep(set())

  def _keep(self, epochs: set[int]):
    kept = {f'{BEST}-{epoch}' for epoch in epochs}
    for path in self._folder.glob(f'{BEST}-*') if self._writes else ():
      if path.name not in kept:
        path.rmtree()
