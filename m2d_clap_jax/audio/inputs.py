"""Turns the audio arguments of the API into a list of clips: one or many arrays or files."""
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from m2d_clap_jax.audio import decode
from m2d_clap_jax.audio.decode import AudioError
from m2d_clap_jax.audio.integrity import HIGHEST_RATE, LOWEST_RATE
from m2d_clap_jax.errors import UserError

MOST_CHANNELS = 32


class AudioClip(NamedTuple):
  """name: for messages; blocks(sample_rate): iterator of consecutive mono float32 waves [S]."""
  name: str
  wave: np.ndarray | bytes | None  # bytes: those of a file; None: the file is `name`
  rate: int  # of an array
  read: Callable[..., Iterator[np.ndarray]] = decode.stream  # of a file

  def blocks(self, sample_rate: int) -> Iterator[np.ndarray]:
    if isinstance(self.wave, np.ndarray):
      yield decode.resample(self.wave, self.rate, sample_rate)
    else:
      yield from self.read(self.name, sample_rate, None, self.wave)


class CheckedClip(AudioClip):
  """A clip whose damage ends only its own sound. `error`: why it cannot be used, known once its blocks were read."""
  error: AudioError | None = None

  def blocks(self, sample_rate: int) -> Iterator[np.ndarray]:
    try:
      yield from super().blocks(sample_rate)
    except AudioError as error:
      self.error = error


def as_clips(waves, sample_rate: int) -> list[AudioClip]:
  """One array, a batch, a list of arrays of different lengths, a path or a list of paths -> clips.

  Args:
    waves: [S] one clip, [S, channels] one clip as soundfile reads it, [B, S] or [B, channels, S] a batch; or a list
      whose items are [S], [channels, S], [S, channels] (channels is the shorter axis), paths or `AudioClip`s. Integers
      are scaled to [-1, 1], channels averaged.
    sample_rate: of the arrays, Hz; files state their own.

  Raises:
    UserError: names the item that is empty, not audio, or contains NaN, infinity or 16-bit samples as floats; or the
      rate, if it is in kHz or invalid.
  """
  sample_rate = _checked_rate(sample_rate)
  if isinstance(waves, (str, os.PathLike)):
    items: list = [waves]
  elif isinstance(waves, (list, tuple)) and not (len(waves) and isinstance(waves[0], (int, float))):
    items = list(waves)
  else:
    array = np.asarray(waves)
    if not 1 <= array.ndim <= 3:
      raise UserError(f'audio of shape {array.shape} is not supported: use [S], [B, S], [B, channels, S], or a list')
    items = [array] if array.ndim == 1 or _is_interleaved(array) else list(array)
  if not items:
    raise UserError('no audio was given: the list is empty')
  return [_as_clip(i, item, sample_rate) for i, item in enumerate(items)]


def _is_interleaved(array: np.ndarray) -> bool:
  """Whether a two-dimensional array is one clip [S, channels] rather than a batch [B, S] of clips of a few samples."""
  return array.ndim == 2 and array.shape[1] <= MOST_CHANNELS < array.shape[0]


def _checked_rate(rate) -> int:
  if not (isinstance(rate, int | float | np.number) and LOWEST_RATE <= rate <= HIGHEST_RATE and rate == int(rate)):
    raise UserError(f'sample_rate={rate!r}: give a whole number of Hz from {LOWEST_RATE} to {HIGHEST_RATE}, as in 44100')
  return int(rate)


def _as_clip(i: int, item, sample_rate: int) -> AudioClip:
  if isinstance(item, (str, os.PathLike)):
    return AudioClip(os.fspath(item), None, 0)
  if isinstance(item, AudioClip):
    return item
  array, name = np.asarray(item), f'item {i}'
  if array.ndim not in (1, 2):
    raise UserError(f'{name} has shape {array.shape}: one clip is [S], [channels, S] or [S, channels]')
  if not array.size:
    raise UserError(f'{name} is empty (shape {array.shape}): leave it out')
  axis = None
  if array.ndim == 2:
    axis = int(np.argmin(array.shape))
    if array.shape[axis] > MOST_CHANNELS:
      raise UserError(f'{name} has shape {array.shape}: neither axis can be channels (at most {MOST_CHANNELS}); '
                      'a batch within a list is not supported')
  try:
    wave = decode.as_mono(array, axis)
  except ValueError as error:
    raise UserError(f'{name}: {error}') from None
  if not np.isfinite(wave).all():
    raise UserError(f'{name} contains NaN or infinite samples: repair it or leave it out')
  if (loudest := np.abs(wave).max()) > decode.LOUDEST:
    raise UserError(f'{name} contains samples up to {loudest:.4g} where full scale is 1: are they 16-bit samples as floats? '
                    'Divide them by 32768')
  return AudioClip(name, wave, sample_rate)
