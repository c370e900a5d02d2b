"""Several prepared folders as one collection of clips."""
import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from m2d_clap_jax import paths
from m2d_clap_jax.data import schema
from m2d_clap_jax.data.read import Split
from m2d_clap_jax.errors import UserError

SETTINGS = 'logmel', 'text_encoder', 'embedding_dtype'


class Mixture:
  """The clips of several splits, numbered through; read as a `Split` is.

  Attributes: name; num_clips; sizes, of the parts; labels, their folders' names; mean, std of all log-mels, each part by its
  number of clips.
  """

  def __init__(self, splits: Sequence[Split], folders: Sequence[str]):
    self.name = splits[0].name
    self.sizes = [split.num_clips for split in splits]
    self.num_clips = sum(self.sizes)
    names = [os.path.basename(os.fspath(paths.as_path(folder))) for folder in folders]
    self.labels = [name if names.count(name) == 1 else folder for name, folder in zip(names, folders)]
    shares = np.asarray(self.sizes) / self.num_clips
    means, deviations = (np.array([split.meta[key] for split in splits]) for key in ('mean', 'std'))
    self.mean = float(shares @ means)
    self.std = float(np.sqrt(shares @ (deviations ** 2 + means ** 2) - self.mean ** 2))
    self._splits = splits
    self._ends = np.cumsum(self.sizes)

  def clips(self, ids) -> list[schema.Record]:
    """Clips `ids`, in their order; each folder is asked once, for all that are its own."""
    ids = np.asarray(ids, np.int64)
    parts = np.searchsorted(self._ends, ids, 'right')
    found: list[schema.Record | None] = [None] * len(ids)
    for part in np.unique(parts).tolist():
      places = np.flatnonzero(parts == part)
      own = ids[places] - (self._ends[part] - self.sizes[part])
      for place, clip in zip(places, self._splits[part].clips(own.tolist())):
        found[place] = dataclasses.replace(clip, key=f'{self.labels[part]}/{clip.key}')
    return found

  def clip(self, i: int) -> schema.Record:
    return self.clips([i])[0]


def check_settings(metas: Sequence[dict], folders: Sequence[str], captions: bool):
  """UserError that names a setting in which a folder differs from the first. captions: whether their embeddings matter."""
  for key in SETTINGS if captions else SETTINGS[:1]:
    for meta, folder in zip(metas[1:], folders[1:]):
      first, other = metas[0][key], meta[key]
      if first == other:
        continue
      if isinstance(first, dict) and isinstance(other, dict):
        name = next(name for name in {**first, **other} if first.get(name) != other.get(name))
        key, first, other = f'{key} {name}', first.get(name), other.get(name)
      raise UserError(f'config.data.folder: {folder} was prepared with {key}={other} where {folders[0]} has {first}: '
                      'folders that are trained on together need the same settings; prepare one of them again')
