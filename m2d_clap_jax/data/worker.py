"""What preparation's processes (see `audio.pool`) do: convert one file to one log-mel spectrogram.

Imports neither jax nor TensorFlow.
"""
import io
import os

import numpy as np

from m2d_clap_jax.audio.decode import AudioError, load
from m2d_clap_jax.paths import is_remote, read_bytes

AUDIO = 'm2d_clap_jax.data.worker:from_audio'
NPY = 'm2d_clap_jax.data.worker:from_npy'


def from_audio(path, logmel, max_seconds):
  """Audio file -> yields its result (see `_result`). `logmel` is a LogMel. Raises AudioError."""
  wave, truncated = load(path, logmel.sample_rate, max_seconds)
  yield _result(path, logmel.numpy(wave), truncated, len(wave) / logmel.sample_rate)


def from_npy(path, logmel, max_seconds):
  """`.npy` file with a log-mel [F, T] or [1, F, T] -> yields its result. Raises AudioError."""
  if not is_remote(path) and not os.path.isfile(path):  # opening a named pipe would block forever
    raise AudioError(f'{path}: ' + ('not a regular file' if os.path.exists(path) else 'no such file'))
  try:
    array = np.load(io.BytesIO(read_bytes(path)), allow_pickle=False)
  except (OSError, ValueError, EOFError) as e:
    raise AudioError(f'{path}: not a readable .npy array ({e})') from e
  if not isinstance(array, np.ndarray) or not np.issubdtype(array.dtype, np.floating):
    raise AudioError(f'{path}: not an array of floats')
  shape = array.shape
  array = array[0] if array.ndim == 3 and shape[0] == 1 else array
  if array.ndim != 2 or array.shape[0] != logmel.n_mels or not array.shape[1]:
    raise AudioError(f'{path}: shape {list(shape)}, but [{logmel.n_mels}, T] or [1, {logmel.n_mels}, T] is expected')
  frames = int(max_seconds * logmel.sample_rate) // logmel.hop + 1
  truncated = array.shape[1] > frames
  array = array[:, :frames]
  yield _result(path, array, truncated, array.shape[1] * logmel.hop / logmel.sample_rate)


def _result(path, array, truncated, seconds):
  """Log-mel [F, T] -> the data that the main process writes. The sums are of the stored values, in float64."""
  stored = array.astype(np.float16)
  if not np.isfinite(stored).all():
    raise AudioError(f'{path}: its log-mel spectrogram contains NaN, infinity or values beyond float16')
  exact = stored.astype(np.float64)
  return {'logmel': stored, 'truncated': bool(truncated), 'seconds': float(seconds),
          'sum': float(exact.sum()), 'sumsq': float(np.square(exact).sum())}
