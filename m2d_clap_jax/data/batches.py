"""From a data folder to arrays: training batches by step number."""
import collections
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from m2d_clap_jax.audio.logmel import SILENCE
from m2d_clap_jax.data import schema
from m2d_clap_jax.data.order import Order
from m2d_clap_jax.data.read import Split
from m2d_clap_jax.errors import UserError


def crop(logmel: np.ndarray, frames: int, where: float) -> np.ndarray:
  """Cuts [F, T] to [F, frames] at the share `where` in [0, 1) of the possible starts; pads short clips with silence."""
  spare = logmel.shape[1] - frames
  if spare < 0:
    return np.pad(logmel, ((0, 0), (0, -spare)), constant_values=SILENCE)
  start = int(where * (spare + 1))
  return logmel[:, start:start + frames]


class TrainingBatches:
  """`batches(step)` -> {'logmel': [b, F, frames] float16, 'text': [b, C]}: random crops, each with a random caption.

  Args:
    split: clips to draw from.
    frames: length of a crop.
    batch_size: size B of the global batch.
    seed: of the order, crops and captions.
    text: whether captions are wanted.
    part: (index, count) of this host; it gets the index-th of `count` equal parts of each batch.
  """

  def __init__(self, split: Split, *, frames: int, batch_size: int, seed: int, text: bool, part=(0, 1)):
    if split.num_clips < batch_size:
      raise UserError(f'batch_size={batch_size} is more than the {split.num_clips} clips of {split.name!r}: '
                      'a smaller batch or more data is needed')
    self.split, self.frames, self.text = split, frames, text
    self.order = Order(split.num_clips, batch_size, seed)
    index, count = part
    self.rows = slice(index * batch_size // count, (index + 1) * batch_size // count)

  def __call__(self, step: int) -> dict[str, np.ndarray]:
    clips = self.split.clips(self.order.clips(step)[self.rows].tolist())
    draws = self.order.draws(step)[self.rows]
    batch = {'logmel': np.stack([crop(clip.logmel, self.frames, u) for clip, (u, _) in zip(clips, draws)])}
    if self.text:
      batch['text'] = np.stack([pick_caption(clip, u) for clip, (_, u) in zip(clips, draws)])
    return batch


def pick_caption(clip: schema.Record, u: float) -> np.ndarray:
  """The embedding [C] of the caption that uniform `u` falls on."""
  return clip.caption_embeddings[int(u * len(clip.caption_embeddings))]


def prefetch(make: Callable[[int], dict], start: int, stop: int, *, threads: int | None = None) -> Iterator[dict]:
  """Yields make(start), ..., make(stop - 1) in order, computed by threads (one a core, 2 to 8), two items more early."""
  threads = threads or min(8, max(2, len(os.sched_getaffinity(0))))
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
