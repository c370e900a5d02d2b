"""Decodes and resamples recordings: all formats of libsndfile and FFmpeg, from wav and mp3 to m4a, webm and amr."""

import io
import math
import os

import numpy as np
import soundfile
import soxr

from m2d_clap_jax.audio import integrity, readers
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.paths import as_path, is_remote, read_bytes, write_bytes

_MARGIN = 0.1  # seconds read beyond max_seconds: the resampling filter must not see an artificial end
LOUDEST = 1e3  # with full scale 1; anything louder is 16-bit samples in floats, a level wrong by 90 dB


class AudioError(UserError):
  """A recording that cannot be used: the message names the file and the reason in one line."""


class NoSamples(AudioError):
  """A recording without samples."""


def load(path, sample_rate, max_seconds=None, data=None, read=None):
  """Read a recording as mono float32.

  Args:
    path: local file, or anything that `paths.as_path` accepts.
    sample_rate: target rate in Hz; other rates are resampled (soxr, high quality).
    max_seconds: keep at most this many seconds from the start; the rest is not decoded.
    data: as in `stream`.
    read: what to read with instead of `stream`, such as `Pool.stream`.

  Returns:
    wave [S] (integer files scaled to [-1, 1], channels averaged) and whether the recording was longer than max_seconds.

  Raises:
    AudioError: missing, empty, not audio, truncated, corrupt, without samples, or with samples that are not finite.
  """
  wanted = math.inf if max_seconds is None else round(max_seconds * sample_rate)
  blocks, count = [], 0
  for block in (read or stream)(path, sample_rate, None if max_seconds is None else max_seconds + _MARGIN, data):
    blocks.append(block)
    count += len(block)
  wave = np.ascontiguousarray(np.concatenate(blocks))
  return (wave, False) if count <= wanted else (wave[:wanted], True)


def stream(path, sample_rate, max_seconds=None, data=None):
  """Like `load`, in blocks [S] of a bounded size as the file is decoded, so that it may be hours long.

  data: the bytes of the file where they are in memory; `path` is then its name in messages.

  A recording that is damaged at its end raises after the blocks before it have been yielded.
  """
  path = as_path(path)
  local = data is None and not is_remote(path)
  try:
    if local and path.exists() and not (os.path.isfile(path) or path.is_dir()):  # opening a pipe may block
      raise AudioError(f'{path}: is not a regular file; correct the path or drop its row')
    # A remote file is read whole: libsndfile would mistake a later read failure for the end of the file.
    with path.open('rb') if local else io.BytesIO(read_bytes(path) if data is None else data) as file:
      size = file.seek(0, io.SEEK_END)
      if not size:
        raise NoSamples(f'{path}: the file is empty (0 bytes); replace it or drop its row')
      file.seek(0)
      yield from _decode(file, sample_rate, max_seconds)
  except AudioError:
    raise
  except integrity.Damaged as error:
    kind = NoSamples if isinstance(error, integrity.Empty) else AudioError
    raise kind(f'{path}: {error}; replace it or drop its row') from None
  except FileNotFoundError:
    raise AudioError(f'{path}: no such file; correct the path or drop its row') from None
  except IsADirectoryError:
    raise AudioError(f'{path}: is a folder, not a file; correct the path or drop its row') from None
  except OSError as error:
    raise AudioError(f'{path}: cannot be read ({_one_line(error.strerror or error)}); check the file') from None


def save_flac(path, wave, sample_rate):
  """Writes a mono wave [S]: int16 unchanged, float32 in [-1, 1] with 24 bits. The file appears only when complete."""
  buffer = io.BytesIO()
  soundfile.write(buffer, wave, sample_rate, 'PCM_16' if wave.dtype == np.int16 else 'PCM_24', format='FLAC')
  write_bytes(path, buffer.getvalue())


def as_mono(wave, channel_axis=None):
  """A wave array -> [S] float32: the mean over channels, integers scaled to [-1, 1] (8-bit unsigned ones centred).

  channel_axis: which of the two axes of `wave` is channels; None for a mono wave [S].
  """
  wave = np.asarray(wave)
  if wave.ndim != (1 if channel_axis is None else 2):
    raise ValueError(f'channel_axis={channel_axis} does not fit a wave of shape {wave.shape}')
  if wave.dtype == np.uint8:
    wave = (wave.astype(np.float32) - 128) / 128
  elif wave.dtype.kind == 'i' and wave.dtype.itemsize <= 4:  # of either byte order
    wave = wave.astype(np.float32) / np.float32(2.0 ** (8 * wave.dtype.itemsize - 1))
  elif not np.issubdtype(wave.dtype, np.floating):
    # No recording has 64 bits: these are 16-bit samples in a wider type, and scaling by that type would silence them.
    raise ValueError(f'a wave of {wave.dtype} is not supported: use floats in [-1, 1], int8, int16, int32 or uint8')
  if channel_axis is not None:
    wave = wave.mean(channel_axis)
  return np.asarray(wave, np.float32)


def resample(wave, from_rate, to_rate):
  """wave [S] at from_rate Hz -> [about S * to_rate / from_rate] at to_rate Hz, float32; unchanged if the rates are equal."""
  wave = np.asarray(wave, np.float32)
  return wave if from_rate == to_rate else soxr.resample(wave, from_rate, to_rate, quality='HQ')


def _decode(file, sample_rate, max_seconds):
  """Yields the consecutive mono waves [S] of an open file at sample_rate."""
  seconds, given = 0.0, 0
  for sound in readers.open_sounds(file):
    resampler = None
    if sound.rate != sample_rate:
      resampler = soxr.ResampleStream(sound.rate, sample_rate, 1, dtype='float32', quality='HQ')
    wanted = math.inf if max_seconds is None else math.ceil((max_seconds - seconds) * sound.rate)
    for block in sound.blocks(wanted):
      if not (block.max() < LOUDEST and block.min() > -LOUDEST):  # also true for NaN
        raise integrity.Damaged(f'contains samples that are NaN, infinite or beyond {LOUDEST:.0f} where full scale is 1')
      seconds += len(block) / sound.rate
      # Added channel by channel: five times as fast as block.mean(1).
      mono = sum(block[:, c] for c in range(1, block.shape[1])) + block[:, 0]
      mono /= block.shape[1]
      mono = resampler.resample_chunk(mono) if resampler else mono
      given += len(mono)
      yield mono
    if resampler:
      rest = resampler.resample_chunk(np.zeros(0, np.float32), last=True)
      given += len(rest)
      yield rest
    if max_seconds is not None and seconds >= max_seconds:
      break
  if not given:
    raise integrity.Empty('is shorter than one sample at the target rate')


def _one_line(text):
  return ' '.join(str(text).split()).rstrip('.')
