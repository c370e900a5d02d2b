"""Pieces of clips of many lengths, run on the device in few shapes, so that odd lengths need no new compilation."""
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np


class Chunk(NamedTuple):
  """clip, number: which piece of which clip; columns: patches in time; logmel: raw [F, columns * PT]."""
  clip: int
  number: int
  columns: int
  logmel: np.ndarray


def buckets(columns: int) -> tuple[int, ...]:
  """Widths that chunks are padded to: an eighth, a quarter, half, two thirds and all of the model's columns.

  Two thirds, because 10 s are one whole chunk of 6.08 s and 25 of the next one's 38 columns.
  """
  return tuple(sorted({-(-columns * parts // 24) for parts in (3, 6, 12, 16, 24)}))


def run_in_batches(chunks: Iterable[Chunk], function: Callable, widths: tuple[int, ...],
                   batch_size: int) -> Iterator[tuple[Chunk, np.ndarray]]:
  """Runs function(logmel [R, F, width * PT], columns [R]) -> [R, ...] over chunks; yields each with its own row.

  Batches have batch_size, 8 or 1 rows, never fillers. While the device computes one, the next is being made.
  """
  waiting: dict[int, list[Chunk]] = {width: [] for width in widths}
  running = None
  for width, batch in _batches(chunks, waiting, batch_size):
    started = batch, function(*_stack(batch, width))
    if running:
      yield from _rows(*running)
    running = started
  if running:
    yield from _rows(*running)


def _batches(chunks, waiting, batch_size):
  for chunk in chunks:
    width = next(width for width in waiting if chunk.columns <= width)
    waiting[width].append(chunk)
    if len(waiting[width]) == batch_size:
      yield width, waiting[width]
      waiting[width] = []
  for width, rest in waiting.items():
    while rest:
      size = 8 if len(rest) >= 8 else 1
      yield width, rest[:size]
      rest = rest[size:]


def _stack(batch: list[Chunk], width: int):
  """Padding is not attended to; it repeats each piece's last value, so that it is as tame as the piece."""
  step = batch[0].logmel.shape[1] // batch[0].columns
  pieces = [np.pad(chunk.logmel, ((0, 0), (0, (width - chunk.columns) * step)), mode='edge') for chunk in batch]
  return np.stack(pieces), np.array([chunk.columns for chunk in batch], np.int32)


def _rows(batch, result):
  return zip(batch, np.asarray(result))
