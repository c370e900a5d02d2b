"""Recordings decoded once, to one length, into files that are mapped into memory: epochs then cost no decoding."""
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from m2d_clap_jax.audio.decode import AudioError
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.paths import is_remote, replacing

SHARD = 4096  # clips of a file: all of AudioSet's stay below the 1,024 files that a process may have open
SCALE = 32767  # of int16, which holds what 16-bit recordings hold, in half the bytes of float32


class Waves:
  """int16 waves [n, S] of a list of clips; indexed by one number or by many.

  Args:
    folder: where the decoded files are, or will be: FOLDER/waves-HASH, of names, rate and length. What is complete
      there is used, so that a decoding that was broken off goes on.
    names: the clips' names, which tell one set from another.
    read: number of a clip -> its wave [any length] in [-1, 1] at the rate wanted, by several threads. What is longer
      than S is cut, what is shorter is filled up with silence, what is louder than 1 is clipped.
    samples: S.
    rate: Hz, only to tell sets apart.
    note: called with (clips done, clips) now and then.
    part: (index, count) of this process; each begins with another file, so that those that share `folder` share the work.

  Attributes: samples; rejected: {number: reason} of clips that cannot be read, whose waves are silence.

  Raises:
    UserError: the folder cannot be written.
  """

  def __init__(self, folder, names: Sequence[str], read: Callable[[int], np.ndarray], *, samples: int, rate: int,
               note: Callable[[int, int], None] = lambda done, total: None, part: tuple[int, int] = (0, 1)):
    if is_remote(folder):
      raise UserError(f'config.data.cache={folder}: decoded recordings are mapped into memory, from a local disk only')
    key = hashlib.sha256(json.dumps([list(names), samples, rate, SHARD]).encode()).hexdigest()[:16]
    self.folder = pathlib.Path(folder) / f'waves-{key}'
    self.samples, self._read, self._count = samples, read, len(names)
    self.rejected = {}
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      with ThreadPoolExecutor(os.cpu_count()) as pool:
        starts = list(range(0, self._count, SHARD))
        first = part[0] * len(starts) // part[1]
        made = {start: self._shard(start, pool, note) for start in starts[first:] + starts[:first]}
      self._shards = [made[start] for start in starts]
      self.rejected = dict(sorted(self.rejected.items()))
    except OSError as error:
      size = 2 * samples * self._count / 1e9
      raise UserError(f'{self.folder}: decoded recordings cannot be written ({error}): {size:.1f} GB are needed; choose '
                      'another config.data.cache') from error

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, numbers) -> np.ndarray:
    """int16 [S] of one clip, or [k, S] of several."""
    if np.ndim(numbers) == 0:
      return self._shards[numbers // SHARD][numbers % SHARD]
    return np.stack([self[int(i)] for i in numbers])

  def _shard(self, start: int, pool, note) -> np.ndarray:
    path = self.folder / f'{start // SHARD:05d}.npy'
    reasons = path.with_suffix('.json')
    stop = min(start + SHARD, self._count)
    if not path.exists():
      rejected = {}
      block = np.zeros((stop - start, self.samples), np.int16)
      for i, _ in enumerate(pool.map(lambda i: self._decode(i, block[i - start], rejected), range(start, stop))):
        note(start + i + 1, self._count)
      # The waves come last. The names are of this process: others of a run decode the same.
      _replace(reasons, lambda file: file.write(json.dumps(rejected).encode()))
      _replace(path, lambda file: np.save(file, block))
    self.rejected |= {int(i): reason for i, reason in json.loads(reasons.read_text()).items()}
    return np.load(path, mmap_mode='r')

  def _decode(self, i: int, out: np.ndarray, rejected: dict):
    try:
      wave = np.asarray(self._read(i), np.float32)[:self.samples]
      out[:len(wave)] = np.round(np.clip(wave, -1, 1) * SCALE)
    except AudioError as error:
      rejected[i] = str(error)


def _replace(path: pathlib.Path, write):
  with replacing(path) as name, open(name, 'wb') as file:
    write(file)
