"""Reading a data folder: its description, and its records by number, in any order.

Random access is what lets a resumed run go on with exactly the batches that would have come. It needs only the byte
offsets in the shards' sidecars, and neither TensorFlow nor an index of its own.
"""
import collections
import concurrent.futures
import json
import os
import sys
import threading
import weakref

import numpy as np

from m2d_clap_jax import fields, paths
from m2d_clap_jax.data import description, schema, write
from m2d_clap_jax.data.tfrecord import FOOTER, HEADER, intact
from m2d_clap_jax.errors import UserError

_OPEN_FILES = 256  # AudioSet has thousands of shards, and a process may often hold 1024 files


class Folder:
  """A data folder written by `m2d-clap prepare`.

  Attributes:
    path: the folder.
    meta: prepare.json's dict: logmel, mean, std, text_encoder, embedding_dtype, splits with their counts.
    splits: names of the splits.
  """

  def __init__(self, path):
    self.path = os.fspath(paths.as_path(path))
    prepared = os.path.join(self.path, 'prepare.json')
    if not paths.as_path(prepared).exists():
      there = paths.names_in(self.path) if paths.as_path(self.path).is_dir() else []
      unfinished = any(map(write.SIDECAR.fullmatch, there))
      raise UserError(f'{self.path}: ' + (
          'its preparation is not finished: run the same `m2d-clap prepare` again' if unfinished else
          'is not a prepared data folder (no prepare.json): make it with `m2d-clap prepare`'))
    self.meta = description.read_prepared(prepared)
    self.splits = list(self.meta['splits'])

  def split(self, name, damaged='fail'):
    """Name -> Split. UserError for an unknown name, and, with damaged='fail', for missing or truncated shards."""
    if name not in self.splits:
      raise UserError(f'{self.path}: has no split {name!r}, only {", ".join(self.splits)}')
    return Split(self.path, name, self.meta, damaged)


class Split:
  """The records of one split, numbered through all its shards. May be read from several threads at once.

  Attributes:
    name, meta: the split's name and prepare.json's dict.
    num_clips: number of records.
    fingerprint: of what the records were made of and of the sums of their values, from the sidecars.
    files: paths of the shards.
    damaged: {record: why it cannot be read}, of those found so far where they are skipped.
  """

  def __init__(self, folder, name, meta, damaged='fail'):
    if damaged not in ('fail', 'skip'):
      raise UserError(f"config.data.damaged={damaged!r}: unknown; known: 'fail', 'skip'")
    self.skip_damaged, self.damaged = damaged == 'skip', {}
    self.name, self.meta = name, meta
    count = meta['splits'][name]['shards']
    stems = [os.path.join(folder, f'{name}-{i:05d}-of-{count:05d}') for i in range(count)]
    self.files = [f'{stem}.tfrecord' for stem in stems]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
      sidecars = list(pool.map(lambda stem: description.read_sidecar(f'{stem}.tfrecord.json'), stems))
      self._bytes = [sidecar['bytes'] for sidecar in sidecars]
      if not self.skip_damaged:
        list(pool.map(lambda pair: _check_length(*pair), zip(self.files, self._bytes)))
    self._remote = paths.is_remote(folder)
    offsets = [np.asarray(sidecar['offsets'], np.int64) for sidecar in sidecars]
    ends = [np.append(part[1:], size).astype(np.int64)[:len(part)] for part, size in zip(offsets, self._bytes)]
    self._starts = np.cumsum([0] + [len(part) for part in offsets])  # number of each shard's first record
    self._offsets = np.concatenate(offsets) + HEADER
    self._lengths = np.concatenate(ends) - self._offsets - FOOTER
    self.num_clips = len(self._offsets)
    if self.num_clips != meta['splits'][name]['clips']:
      raise UserError(f'{folder}: split {name!r} has {self.num_clips} records where prepare.json says '
                      f'{meta["splits"][name]["clips"]}: run the same `m2d-clap prepare` again')
    self.fingerprint = fields.checksum(json.dumps([
        [sidecar['settings']['manifest'], sidecar['bytes'], sidecar['sum'], sidecar['sumsq']] for sidecar in sidecars]).encode())
    self._cache = collections.OrderedDict()
    self._lock = threading.Lock()

  def locate(self, ids):
    """ids [n] -> (shard numbers [n], byte offsets of the data [n], its lengths [n])."""
    ids = np.asarray(ids, np.int64)
    if ids.size and (ids.min() < 0 or ids.max() >= self.num_clips):
      raise IndexError(f'split {self.name!r} has records 0 to {self.num_clips - 1}, not {ids.min()} to {ids.max()}')
    return np.searchsorted(self._starts, ids, 'right') - 1, self._offsets[ids], self._lengths[ids]

  def read(self, ids):
    """ids [n] -> list of n records' bytes (tf.train.Examples), in the order of the ids.

    Raises:
      UserError: names the shard and the record whose bytes are not those that were written.
    """
    places = [(self.files[shard], shard, offset - HEADER, offset + length + FOOTER)
              for shard, offset, length in zip(*(part.tolist() for part in self.locate(ids)))]
    if self._remote:
      found = paths.read_ranges([(file, start, end) for file, _, start, end in places])
    else:
      found = [self._file(shard).pread(end - start, start) for _, shard, start, end in places]
    return [self._data(i, end - start, data) for i, (_, _, start, end), data in zip(ids, places, found)]

  def clips(self, ids):
    """Records `ids`, decoded; of damaged ones `clip` tells. From a store they are all asked for at once."""
    if not self._remote:
      return [self.clip(i) for i in ids]
    try:
      return [self._decoded(i, data) for i, data in zip(ids, self.read(ids))]
    except UserError:
      if not self.skip_damaged:
        raise
      return [self.clip(i) for i in ids]

  def clip(self, i):
    """Record `i`, decoded.

    Of a split that skips damaged records, the next one that is not; what was left out is named, counted and printed.

    Raises:
      UserError: names shard and record if it is damaged, or if all are.
    """
    if not self.skip_damaged:
      return self._clip(i)
    for number in (np.arange(i, i + self.num_clips) % self.num_clips).tolist():
      if number in self.damaged:
        continue
      try:
        return self._clip(number)
      except UserError as error:
        self.damaged[number] = str(error)
        print(f'note: clip left out, {len(self.damaged)} so far: {error}', file=sys.stderr)
    raise UserError(f'{self.files[0]} and all other shards: not one clip of {self.name!r} can be read')

  def _clip(self, i):
    return self._decoded(i, self.read([i])[0])

  def _decoded(self, i, data):
    try:
      return schema.decode(data, self.meta)
    except (ValueError, IndexError) as e:
      raise UserError(f'{self.where(i)}: damaged ({e}): delete this file and prepare the data again') from e

  def where(self, i):
    """Record `i` in words, for messages: '.../train-00003-of-00007.tfrecord record 17'."""
    shard = int(self.locate([i])[0][0])
    return f'{self.files[shard]} record {i - int(self._starts[shard])}'

  def _data(self, i, size, record):
    """The data of record `i`, of which `size` bytes should have been read."""
    if isinstance(record, Exception):
      raise UserError(f'{self.where(i)}: cannot be read ({record})') from record
    # Always, not at the first read only: with hardware support this takes 7 us of a record of 160 kB.
    if len(record) != size or not intact(record):
      raise UserError(f'{self.where(i)}: damaged: delete this file and prepare the data again')
    return record[HEADER:-FOOTER]

  def _file(self, shard):
    with self._lock:
      file = self._cache.pop(shard, None)
      if file is None:
        file = _File(self.files[shard], self._bytes[shard])
        while len(self._cache) >= _OPEN_FILES:
          self._cache.popitem(last=False)
      self._cache[shard] = file  # the last one used is the last to go
      return file

  def __getstate__(self):
    return {**self.__dict__, '_cache': None, '_lock': None}

  def __setstate__(self, state):
    self.__dict__.update(state, _cache=collections.OrderedDict(), _lock=threading.Lock())


class _File:
  """An open shard. It is closed when nobody holds it any more, so a thread may still read what the cache let go."""

  def __init__(self, path, size):
    _check_length(path, size)
    self._descriptor = os.open(path, os.O_RDONLY)
    weakref.finalize(self, os.close, self._descriptor)  # also at exit, when __del__ would find `os` gone

  def pread(self, length, offset):
    return os.pread(self._descriptor, length, offset)


def _check_length(path, size):
  try:
    found = paths.size(path)
  except OSError as e:
    raise UserError(f'{path}: shard cannot be read ({e.strerror or e}): run the same `m2d-clap prepare` again') from e
  if found != size:
    raise UserError(f'{path}: shard has {found} bytes where {size} were written: it was cut off or changed; '
                    'run the same `m2d-clap prepare` again')
