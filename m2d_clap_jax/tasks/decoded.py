"""Decodes recordings once into memory-mapped files, so that later epochs with new crops need no decoding."""
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from m2d_clap_jax.audio.decode import AudioError
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.paths import is_remote, replacing

SHARD = 4096  # clips per file: AudioSet then stays below the limit of 1,024 open files per process
GROUP = 256  # clips in memory while they are decoded
MEASURED = 32  # clips from which the total size is estimated
SCALE = 32767  # of int16, which is exact enough for 16-bit recordings, in half the bytes of float32


class Waves:
  """int16 recordings of different lengths; `crops` returns excerpts of equal length.

  Args:
    folder: parent of the decoded files in FOLDER/waves-HASH, a hash of names and rate. Complete files there are
      reused, so that an interrupted decoding continues.
    names: the clips' names, which identify the set.
    read: number of a clip -> its wave [any length] in [-1, 1] at `rate`; called in several threads. Values beyond 1
      are clipped.
    samples: S, length of a crop.
    rate: Hz, part of the set's identity.
    report_space: called with one line about the disk space that decoding will take, before it begins.
    report_progress: called with (clips done, clips) after each clip.
    part: (index, count) of this process; each begins with another file, so that processes sharing `folder` share the
      work.

  Attributes: samples; lengths: int64 [n] samples of each clip; rejected: {number: reason} of unreadable clips, whose
  length is 0.

  Raises:
    UserError: the folder cannot be written, or the disk is too small.
  """

  def __init__(self, folder, names: Sequence[str], read: Callable[[int], np.ndarray], *, samples: int, rate: int,
               report_space: Callable[[str], None] = lambda line: None,
               report_progress: Callable[[int, int], None] = lambda done, total: None, part: tuple[int, int] = (0, 1)):
    if is_remote(folder):
      raise UserError(f'config.data.cache={folder}: decoded recordings are memory-mapped; choose a folder on a local disk')
    key = hashlib.sha256(json.dumps([list(names), rate, SHARD]).encode()).hexdigest()[:16]
    self.folder = pathlib.Path(folder) / f'waves-{key}'
    self.samples, self._read, self._count = samples, read, len(names)
    starts = list(range(0, self._count, SHARD))
    first = part[0] * len(starts) // part[1]
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      with ThreadPoolExecutor(os.cpu_count()) as pool:
        self._check_space(pool, report_space)
        for start in starts[first:] + starts[:first]:
          self._decode(start, pool, report_progress)
    except OSError as error:
      raise UserError(f'{self.folder}: decoded recordings cannot be written ({error}): choose another '
                      'config.data.cache') from error
    self._open(starts)

  def __len__(self) -> int:
    return self._count

  def crops(self, numbers: Sequence[int] | np.ndarray, draws: Sequence[float] | np.ndarray) -> np.ndarray:
    """-> int16 [k, S]: an excerpt of each clip, at the fraction `draws` [k] in [0, 1) of its possible starts; 0 is its
    start.

    Short clips begin at their start and are padded with silence.
    """
    out = np.zeros((len(numbers), self.samples), np.int16)
    for row, i, draw in zip(out, numbers, draws):
      length = int(self.lengths[i])
      start = self._starts[i] + int(draw * (max(0, length - self.samples) + 1))
      wave = self._shards[i // SHARD][start:start + min(length, self.samples)]
      row[:len(wave)] = wave
    return out

  def _files(self, start: int) -> tuple[pathlib.Path, pathlib.Path]:
    """Paths of a shard's samples and of {'lengths', 'rejected'}, which is written last: if it exists, so do the samples."""
    path = self.folder / f'{start // SHARD:05d}.int16'
    return path, path.with_suffix('.json')

  def _check_space(self, pool, report_space):
    """Estimates the space still needed from some clips, and compares it with the free disk space."""
    missing = [i for start in range(0, self._count, SHARD) if not self._files(start)[1].exists()
               for i in range(start, min(start + SHARD, self._count))]
    if not missing:
      return
    some = missing[::-(-len(missing) // MEASURED)]
    needed = 2 * len(missing) * sum(len(wave) for wave, _ in pool.map(self._wave, some)) / len(some)
    free = shutil.disk_usage(self.folder).free
    about = f'about {needed / 1e9:.2g} GB of decoded recordings in {self.folder}, where {free / 1e9:.2g} GB are free'
    if needed > free:
      raise UserError(f'{about}: choose another config.data.cache')
    report_space(about)

  def _decode(self, start: int, pool, report_progress):
    path, index = self._files(start)
    if index.exists():
      return
    stop = min(start + SHARD, self._count)
    lengths, rejected = [], {}
    # Temporary names are unique to this process: other processes of a run may decode the same shard.
    with replacing(path) as name, open(name, 'wb') as file:
      for first in range(start, stop, GROUP):
        for i, (wave, reason) in enumerate(pool.map(self._wave, range(first, min(first + GROUP, stop))), first):
          file.write(wave.tobytes())
          lengths.append(len(wave))
          if reason:
            rejected[i] = reason
          report_progress(i + 1, self._count)
    with replacing(index) as name:
      pathlib.Path(name).write_text(json.dumps({'lengths': lengths, 'rejected': rejected}))

  def _wave(self, i: int) -> tuple[np.ndarray, str]:
    """-> int16 wave and '', or an empty wave and why it cannot be read."""
    try:
      wave = np.asarray(self._read(i), np.float32)
    except AudioError as error:
      return np.zeros(0, np.int16), str(error)
    return np.round(np.clip(wave, -1, 1) * SCALE).astype(np.int16), ''

  def _open(self, starts: list[int]):
    self._shards, lengths, begins = [], [], []
    self.rejected: dict[int, str] = {}
    for start in starts:
      path, index = self._files(start)
      about = json.loads(index.read_text())
      size = sum(about['lengths'])
      self._shards.append(np.memmap(path, np.int16, 'r') if size else np.zeros(0, np.int16))
      lengths += about['lengths']
      begins.append(np.cumsum([0, *about['lengths'][:-1]]))
      self.rejected |= {int(i): reason for i, reason in about['rejected'].items()}
    self.lengths = np.array(lengths, np.int64)
    self._starts = np.concatenate(begins)
