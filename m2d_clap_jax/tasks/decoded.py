"""Recordings decoded once into files that are mapped into memory: epochs, each with other crops, cost no decoding."""
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

SHARD = 4096  # clips of a file: all of AudioSet's stay below the 1,024 files that a process may have open
GROUP = 256  # clips in memory while they are decoded
MEASURED = 32  # clips that the size of all is estimated from
SCALE = 32767  # of int16, which holds what 16-bit recordings hold, in half the bytes of float32


class Waves:
  """int16 recordings of different lengths, of which `crops` gives pieces of one length.

  Args:
    folder: where the decoded files are, or will be: FOLDER/waves-HASH, of names and rate. What is complete there is
      used, so that a decoding that was broken off goes on.
    names: the clips' names, which tell one set from another.
    read: number of a clip -> its wave [any length] in [-1, 1] at the rate wanted, by several threads. What is louder
      than 1 is clipped.
    samples: S, length of a crop.
    rate: Hz, only to tell sets apart.
    tell: called with one line about the disk space that decoding will take, before it begins.
    note: called with (clips done, clips) now and then.
    part: (index, count) of this process; each begins with another file, so that those that share `folder` share the work.

  Attributes: samples; lengths: int64 [n] samples of each clip; rejected: {number: reason} of clips that cannot be read,
  whose length is 0.

  Raises:
    UserError: the folder cannot be written, or the disk is too small.
  """

  def __init__(self, folder, names: Sequence[str], read: Callable[[int], np.ndarray], *, samples: int, rate: int,
               tell: Callable[[str], None] = lambda line: None,
               note: Callable[[int, int], None] = lambda done, total: None, part: tuple[int, int] = (0, 1)):
    if is_remote(folder):
      raise UserError(f'config.data.cache={folder}: decoded recordings are mapped into memory, from a local disk only')
    key = hashlib.sha256(json.dumps([list(names), rate, SHARD]).encode()).hexdigest()[:16]
    self.folder = pathlib.Path(folder) / f'waves-{key}'
    self.samples, self._read, self._count = samples, read, len(names)
    starts = list(range(0, self._count, SHARD))
    first = part[0] * len(starts) // part[1]
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      with ThreadPoolExecutor(os.cpu_count()) as pool:
        self._check_space(pool, tell)
        for start in starts[first:] + starts[:first]:
          self._decode(start, pool, note)
    except OSError as error:
      raise UserError(f'{self.folder}: decoded recordings cannot be written ({error}): choose another '
                      'config.data.cache') from error
    self._open(starts)

  def __len__(self) -> int:
    return self._count

  def crops(self, numbers: Sequence[int] | np.ndarray, draws: Sequence[float] | np.ndarray) -> np.ndarray:
    """-> int16 [k, S]: of each clip a piece at the share `draws` [k] in [0, 1) of the possible starts, so 0 is its start.

    Short clips begin at their start and are filled up with silence.
    """
    out = np.zeros((len(numbers), self.samples), np.int16)
    for row, i, draw in zip(out, numbers, draws):
      length = int(self.lengths[i])
      start = self._starts[i] + int(draw * (max(0, length - self.samples) + 1))
      wave = self._shards[i // SHARD][start:start + min(length, self.samples)]
      row[:len(wave)] = wave
    return out

  def _files(self, start: int) -> tuple[pathlib.Path, pathlib.Path]:
    """Samples, and {'lengths', 'rejected'} of a shard, which is written last: while it is there, so are the samples."""
    path = self.folder / f'{start // SHARD:05d}.int16'
    return path, path.with_suffix('.json')

  def _check_space(self, pool, tell):
    """Estimates what is still to be written from some clips, and compares it with the room on the disk."""
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
    tell(about)

  def _decode(self, start: int, pool, note):
    path, index = self._files(start)
    if index.exists():
      return
    stop = min(start + SHARD, self._count)
    lengths, rejected = [], {}
    # The names of the files being written are of this process: others of a run decode the same.
    with replacing(path) as name, open(name, 'wb') as file:
      for first in range(start, stop, GROUP):
        for i, (wave, reason) in enumerate(pool.map(self._wave, range(first, min(first + GROUP, stop))), first):
          file.write(wave.tobytes())
          lengths.append(len(wave))
          if reason:
            rejected[i] = reason
          note(i + 1, self._count)
    with replacing(index) as name:
      pathlib.Path(name).write_text(json.dumps({'lengths': lengths, 'rejected': rejected}))

  def _wave(self, i: int) -> tuple[np.ndarray, str]:
    """int16 wave and '', or nothing and why it cannot be read."""
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
