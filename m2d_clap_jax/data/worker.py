"""The preparation worker: converts one file to one log-mel spectrogram. Runs in its own process.

Decoders are C code that reads untrusted files. A separate process keeps a crash there from ending the run.
Imports neither jax nor TensorFlow.
"""
import importlib
import io
import os
import pickle
import signal
import sys

import numpy as np

from m2d_clap_jax.paths import StoreError, is_remote, read_bytes

AUDIO = 'm2d_clap_jax.data.worker:from_audio'
NPY = 'm2d_clap_jax.data.worker:from_npy'


class Rejected(Exception):
  """A file cannot be used; the message is the reason."""


def from_audio(path, logmel, max_seconds):
  """Audio file -> result (see `_result`). `logmel` is a LogMel. Raises Rejected."""
  from m2d_clap_jax.audio.decode import AudioError, load
  try:
    wave, truncated = load(path, logmel.sample_rate, max_seconds)
  except AudioError as e:
    raise Rejected(str(e).removeprefix(f'{path}: ')) from e
  return _result(logmel.numpy(wave), truncated, len(wave) / logmel.sample_rate)


def from_npy(path, logmel, max_seconds):
  """`.npy` file with a log-mel [F, T] or [1, F, T] -> result. Raises Rejected."""
  if not is_remote(path) and not os.path.isfile(path):  # opening a named pipe would block forever
    raise Rejected('not a regular file' if os.path.exists(path) else 'no such file')
  try:
    array = np.load(io.BytesIO(read_bytes(path)), allow_pickle=False)
  except (OSError, ValueError, EOFError) as e:
    raise Rejected(f'not a readable .npy array ({e})') from e
  if not isinstance(array, np.ndarray) or not np.issubdtype(array.dtype, np.floating):
    raise Rejected('not an array of floats')
  shape = array.shape
  array = array[0] if array.ndim == 3 and shape[0] == 1 else array
  if array.ndim != 2 or array.shape[0] != logmel.n_mels or not array.shape[1]:
    raise Rejected(f'shape {list(shape)}, but [{logmel.n_mels}, T] or [1, {logmel.n_mels}, T] is expected')
  frames = int(max_seconds * logmel.sample_rate) // logmel.hop + 1
  truncated = array.shape[1] > frames
  array = array[:, :frames]
  return _result(array, truncated, array.shape[1] * logmel.hop / logmel.sample_rate)


def _result(array, truncated, seconds):
  """Log-mel [F, T] -> the data that the main process writes. The sums are of the stored values, in float64."""
  stored = array.astype(np.float16)
  if not np.isfinite(stored).all():
    raise Rejected('its log-mel spectrogram contains NaN, infinity or values beyond float16')
  exact = stored.astype(np.float64)
  return {'logmel': stored, 'truncated': bool(truncated), 'seconds': float(seconds),
          'sum': float(exact.sum()), 'sumsq': float(np.square(exact).sum())}


def serve(target):
  """Reads requests from stdin and writes answers to stdout until stdin is closed; `target` is 'module:function'.

  A request is a pickled tuple of arguments; an answer is (True, result), (False, reason), or (None, reason) if the file
  cannot be judged because its store failed.
  """
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process ends this one
  answers = os.fdopen(os.dup(1), 'wb')
  os.dup2(2, 1)  # output of libraries must not mix with the answers
  module, name = target.split(':')
  function = getattr(importlib.import_module(module), name)
  pickle.dump('ready', answers)
  answers.flush()
  while True:
    try:
      arguments = pickle.load(sys.stdin.buffer)
    except EOFError:
      return
    try:
      answer = True, function(*arguments)
    except Rejected as e:
      answer = False, str(e)
    except StoreError as e:
      answer = None, str(e)
    except Exception as e:  # a bad file must not end a run, whatever a library raises
      answer = False, f'{type(e).__name__}: {e}'
    if not answer[0]:
      answer = answer[0], ' '.join(answer[1].split())[:500]
    pickle.dump(answer, answers, protocol=5)
    answers.flush()


if __name__ == '__main__':
  # Under `python -m` this module is called __main__, and its Rejected would be a different class from the target's.
  importlib.import_module('m2d_clap_jax.data.worker').serve(sys.argv[1])
