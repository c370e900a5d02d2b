"""Cuts clips of any length into chunks and batches of few shapes, so that unusual lengths need no new compilation.

Alphabet: R chunks of a batch, F mel bins, PT frames of a patch.
"""
import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from m2d_clap_jax.audio.inputs import AudioClip
from m2d_clap_jax.audio.logmel import SILENCE, LogMel


class Chunk(NamedTuple):
  """clip, number: which chunk of which clip; columns: patches in time; logmel: raw [F, columns * PT]; samples: read of
  the clip so far, at the model's rate; in its last chunk, their total."""
  clip: int
  number: int
  columns: int
  logmel: np.ndarray
  samples: int


class Batch(NamedTuple):
  """chunks: its R chunks; logmel: [R, F, width * PT]; columns: int32 [R], how many of the width are real."""
  chunks: list[Chunk]
  logmel: np.ndarray
  columns: np.ndarray


@dataclasses.dataclass(frozen=True)
class Chunker:
  """Cuts and batches clips for a model.

  Attributes:
    frames, columns: of a whole chunk, which is as long as the model's training crops; in frames and in patches.
    patch: frames of a patch.
    pad: value that pads the last patch of a clip: the mean, which becomes 0 when standardised, as in the public
      runtime.
    shortest: frames that shorter clips are first filled up to, with silence.
  """
  logmel: LogMel
  frames: int
  patch: int
  columns: int
  pad: float
  shortest: int = 0

  def cut(self, clips: Iterable[AudioClip]) -> Iterator[Chunk]:
    """Yields all chunks of the clips, one clip after the other."""
    for i, clip in enumerate(clips):
      samples = 0

      def blocks(clip=clip):
        nonlocal samples
        for block in clip.blocks(self.logmel.sample_rate):
          samples += len(block)
          yield block
      for number, piece in enumerate(self.logmel.chunks(blocks(), self.frames)):
        if not number and piece.shape[1] < self.shortest:
          piece = np.pad(piece, ((0, 0), (0, self.shortest - piece.shape[1])), constant_values=SILENCE)
        # A whole chunk drops the frames beyond its last whole patch, as in training: 1001 frames are 62 columns.
        columns = min(self.columns, -(-piece.shape[1] // self.patch))
        piece = piece[:, :columns * self.patch]
        piece = np.pad(piece, ((0, 0), (0, columns * self.patch - piece.shape[1])), constant_values=self.pad)
        yield Chunk(i, number, columns, piece, samples)

  def batches(self, clips: Iterable[AudioClip], batch_size: int) -> Iterator[Batch]:
    """Yields the chunks of the clips in batches of batch_size, 8 or 1, without fillers."""
    waiting: dict[int, list[Chunk]] = {width: [] for width in widths(self.columns)}
    for chunk in self.cut(clips):
      width = next(width for width in waiting if chunk.columns <= width)
      waiting[width].append(chunk)
      if len(waiting[width]) == batch_size:
        yield self._batch(waiting[width], width)
        waiting[width] = []
    for width, rest in waiting.items():
      while rest:
        size = 8 if len(rest) >= 8 else 1
        yield self._batch(rest[:size], width)
        rest = rest[size:]

  def _batch(self, chunks: list[Chunk], width: int) -> Batch:
    # Padding is not attended to; it repeats each chunk's last value to stay within the chunk's range.
    padded = [np.pad(chunk.logmel, ((0, 0), (0, (width - chunk.columns) * self.patch)), mode='edge') for chunk in chunks]
    return Batch(chunks, np.stack(padded), np.array([chunk.columns for chunk in chunks], np.int32))


def widths(columns: int) -> tuple[int, ...]:
  """Widths that chunks are padded to: an eighth, a quarter, half, two thirds and all of the model's columns.

  Two thirds, because 10 s are one whole chunk of 6.08 s and 25 of the next chunk's 38 columns.
  """
  return tuple(sorted({-(-columns * parts // 24) for parts in (3, 6, 12, 16, 24)}))
