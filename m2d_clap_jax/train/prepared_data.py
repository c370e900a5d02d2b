"""The prepared folders that a run trains on."""
import collections
import dataclasses
import functools
from collections.abc import Sequence

from m2d_clap_jax.data.mixture import Mixture, check_settings
from m2d_clap_jax.data.order import Order
from m2d_clap_jax.data.read import Folder, Split
from m2d_clap_jax.errors import UserError

LABELLED_CLIPS, MOST_LABELS = 200, 20  # that are looked at and recorded


@dataclasses.dataclass(frozen=True)
class PreparedData:
  """folder: the first one, whose settings are those of all; meta: its prepare.json, with the mean and deviation of all;
  split: the clips; names: of the folders, as given; fingerprints: of their records; sizes, labels, weights: of the folders
  where there are several, else None or ()."""
  folder: Folder
  meta: dict
  split: Split | Mixture
  names: list[str]
  fingerprints: list[str]
  sizes: list[int] | None = None
  labels: Sequence[str] = ()
  weights: Sequence[float] | None = None

  def about(self, before: dict) -> dict:
    """What a checkpoint records of the data, as JSON data; of a continued run, of those that it began with.

    before: the JSON data of the checkpoint that it continues from, {} for a new run.
    """
    return {'logmel': self.meta['logmel'], 'text_encoder': self.meta['text_encoder'],
            'data': before.get('data') or {'clips': self.split.num_clips, 'fingerprints': self.fingerprints,
                                               'labels': self._frequent_labels}}

  @functools.cached_property
  def _frequent_labels(self) -> list[str]:
    """The most frequent labels of some clips from all over the split, for those who use the model."""
    numbers = range(0, self.split.num_clips, -(-self.split.num_clips // LABELLED_CLIPS))
    found = collections.Counter(label for clip in self.split.clips(numbers) for label in clip.labels)
    return [label for label, _ in found.most_common(MOST_LABELS)]

  def log_counts(self, order: Order, step: int, state, log):
    """How many clips of each folder the run has seen, as an action of `train.loop`."""
    del state
    if self.labels:
      log.write(step, {f'clips/{label}': int(n) for label, n in zip(self.labels, order.counts(step))})


def open_data(captions: bool, *, folder: str, split: str = 'train', sample_rate: int = 16000, demo: bool = False,
              damaged: str = 'fail', weights: Sequence[float] | None = None) -> PreparedData:
  """Opens one prepared folder, or several with commas between them; with `demo`, makes the demo corpus there first.

  captions: whether their embeddings are used, so that they must be of one encoder.
  """
  if demo:
    from m2d_clap_jax.demo.corpus import ensure
    folder = str(ensure(folder))
  names = [name.strip() for name in folder.split(',') if name.strip()]
  if not names:
    raise UserError('config.data.folder is empty: give --config.data.folder=FOLDER, made by `m2d-clap prepare`, or try '
                    '--config=configs/pretrain.py:demo')
  folders = [Folder(name) for name in names]
  for name, opened in zip(names, folders):
    rate = opened.meta['logmel']['sample_rate']
    if rate != sample_rate:
      raise UserError(f'{name}: log-mels are of {rate} Hz audio where config.data.sample_rate is {sample_rate}: change one '
                      'of them')
  if weights is not None and (len(weights) != len(names) or min(weights) <= 0):
    raise UserError(f'config.data.weights={tuple(weights)}: needs a number above 0 for each of the {len(names)} folders in '
                    'config.data.folder')
  check_settings([opened.meta for opened in folders], names, captions)
  splits = [opened.split(split, damaged) for opened in folders]
  fingerprints = [part.fingerprint for part in splits]
  if len(splits) == 1:
    return PreparedData(folders[0], folders[0].meta, splits[0], names, fingerprints)
  mixture = Mixture(splits, names)
  return PreparedData(folders[0], folders[0].meta | {'mean': mixture.mean, 'std': mixture.std}, mixture, names, fingerprints,
                      mixture.sizes, mixture.labels, weights)
