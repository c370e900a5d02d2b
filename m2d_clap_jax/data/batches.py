"""Training batches by step number, from a data folder."""
import collections
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from m2d_clap_jax.audio.logmel import SILENCE
from m2d_clap_jax.data import schema
from m2d_clap_jax.data.order import Order
from m2d_clap_jax.data.read import Split
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.startup import cores
from m2d_clap_jax.text.tower import padded

Captions = Callable[[list[schema.Record], Sequence[float]], dict[str, np.ndarray]]


def crop(logmel: np.ndarray, frames: int, where: float) -> np.ndarray:
  """Cuts [F, T] to [F, frames] at the fraction `where` in [0, 1) of possible starts; pads short clips with silence."""
  spare = logmel.shape[1] - frames
  if spare < 0:
    return np.pad(logmel, ((0, 0), (0, -spare)), constant_values=SILENCE)
  start = int(where * (spare + 1))
  return logmel[:, start:start + frames]


def pick(options: Sequence, u: float):
  """The one that uniform `u` falls on."""
  return options[int(u * len(options))]


def embeddings(clips: list[schema.Record], draws: Sequence[float]) -> dict[str, np.ndarray]:
  """Captions of training batches as their embeddings: 'text' [b, C]."""
  return {'text': np.stack([pick(clip.caption_embeddings, u) for clip, u in zip(clips, draws)])}


class Tokens:
  """Captions of training batches as 'ids' and 'mask', int32 [b, L], for a text encoder that is trained.

  Args:
    tower: see `text.TextTower`.
    lengths: to which lengths L captions are padded, ascending: 'few', the tower's own, or 'one', its max_length, which
      several processes need, because each sees its own captions only.
  """

  def __init__(self, tower, lengths: str = 'few'):
    self.tower, self.lengths = tower, lengths

  def __call__(self, clips: list[schema.Record], draws: Sequence[float]) -> dict[str, np.ndarray]:
    """UserError for a clip without a caption."""
    for clip in clips:
      if not clip.captions:
        raise UserError(f'{clip.key}: has no caption, which a text encoder in training needs: prepare the data from a '
                        'manifest with captions or labels')
    tokens = self.tower.tokens([pick(clip.captions, u) for clip, u in zip(clips, draws)])
    length = self.tower.length(tokens) if self.lengths == 'few' else self.tower.max_length
    return dict(zip(('ids', 'mask'), padded(tokens, length)))


class TrainingBatches:
  """`batches(step)` -> {'logmel': [b, F, frames] float16, ...}: random crops, each with a random caption, and, where the
  clips are of several folders, the number of each one's: 'folder' int32 [b].

  Args:
    split: clips to draw from.
    frames: length of a crop.
    batch_size: size B of the global batch.
    seed: of the order, crops and captions.
    captions: `embeddings`, `Tokens`, or None for none: (clips, uniform numbers) -> arrays of the captions that they
      fall on.
    part: (index, count) of this host, which gets the index-th of `count` equal parts of each batch.
    sizes, weights: of `Order`, where the clips are of several folders.
  """

  def __init__(self, split: Split, *, frames: int, batch_size: int, seed: int, captions: Captions | None,
               part=(0, 1), sizes: Sequence[int] | None = None, weights: Sequence[float] | None = None):
    self.split, self.frames, self.captions = split, frames, captions
    self.order = Order(split.num_clips, batch_size, seed, sizes, weights)
    if self.order.epoch_clips < batch_size:
      raise UserError(f'batch_size={batch_size} is more than the {self.order.epoch_clips} clips of {split.name!r}: '
                      'use a smaller batch or more data')
    index, count = part
    self.rows = slice(index * batch_size // count, (index + 1) * batch_size // count)

  def __call__(self, step: int) -> dict[str, np.ndarray]:
    numbers = self.order.clips(step)[self.rows]
    clips = self.split.clips(numbers.tolist())
    draws = self.order.draws(step)[self.rows]
    batch = {'logmel': np.stack([crop(clip.logmel, self.frames, u) for clip, (u, _) in zip(clips, draws)])}
    if len(self.order.sizes) > 1:
      batch['folder'] = self.order.parts(numbers)
    if self.captions:
      batch |= self.captions(clips, draws[:, 1].tolist())
    return batch


def prefetch(make: Callable[[int], dict], start: int, stop: int, *, threads: int | None = None) -> Iterator[dict]:
  """Yields make(start), ..., make(stop - 1) in order, computed by threads (one per core, 2 to 8) two items further ahead."""
  threads = threads or min(8, max(2, cores()))
  ahead = threads + 2
  with ThreadPoolExecutor(threads, thread_name_prefix='batches') as pool:
    waiting = collections.deque(pool.submit(make, i) for i in range(start, min(start + ahead, stop)))
    try:
      for i in range(start + len(waiting), stop + len(waiting)):
        item = waiting.popleft().result()
        if i < stop:
          waiting.append(pool.submit(make, i))
        yield item
    finally:
      for future in waiting:
        future.cancel()
