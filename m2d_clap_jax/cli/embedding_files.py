"""Writes embeddings of many files to one .npz or .parquet file, incrementally, and renames it when complete.

Alphabet: n rows, C numbers per embedding.
"""
import contextlib
import csv
import io
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator

import numpy as np

from m2d_clap_jax import paths
from m2d_clap_jax.errors import UserError

ROWS = 1024  # per parquet row group; 16 MB for Base


class Writer:
  """A file of embeddings, complete after the `with` block; a failed block leaves an incomplete file.

  Args:
    path: of the file; better a temporary name (`replacing`).
    width: C.
    frames: whether an embedding is [T, C] and has times [T].
    about: JSON data on the model and the kind of embeddings.
  """

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    if kind is None:
      self.finish()
    with contextlib.suppress(Exception if kind else ()):  # the first error matters
      self.close()


class Npz(Writer):
  """Clips: `files` [n], `embeddings` [n, C]. Frames: `files` [n] and for each i `frames/i` [T, C], `times/i` [T] in ms.

  Both hold `about`, a string of JSON. Numbers are float32.
  """

  def __init__(self, path, width: int, frames: bool, about: dict):
    self._zip = zipfile.ZipFile(path, 'w')
    self._names, self._width, self._frames = [], width, frames
    # An array's header contains the number of clips, which is known only at the end, so rows are kept in a temporary file.
    self._rows = tempfile.TemporaryFile(dir=os.path.dirname(path))
    self._write('about', np.array(json.dumps(about)))

  def add(self, name: str, embedding: np.ndarray, times: np.ndarray | None = None):
    """embedding: [C], or with times [T] also [T, C]."""
    if self._frames:
      self._write(f'frames/{len(self._names)}', embedding)
      self._write(f'times/{len(self._names)}', times)
    else:
      self._rows.write(np.ascontiguousarray(embedding, '<f4'))
    self._names.append(name)

  def finish(self):
    self._write('files', np.array(self._names))
    if not self._frames:
      self._rows.seek(0)
      with self._zip.open('embeddings.npy', 'w', force_zip64=True) as member:
        shape = len(self._names), self._width
        np.lib.format.write_array_header_1_0(member, {'descr': '<f4', 'fortran_order': False, 'shape': shape})
        shutil.copyfileobj(self._rows, member, 1 << 20)

  def close(self):
    self._rows.close()
    self._zip.close()

  def _write(self, name: str, array: np.ndarray):
    with self._zip.open(f'{name}.npy', 'w', force_zip64=True) as member:
      np.lib.format.write_array(member, array, allow_pickle=False)


class Parquet(Writer):
  """One row per clip (`file`, `embedding`) or per frame (`file`, `time_ms`, `embedding`).

  The schema's metadata contains `about` as JSON under the key m2d_clap_jax.
  """

  def __init__(self, path, width: int, frames: bool, about: dict):
    import pyarrow
    import pyarrow.parquet
    self._arrow = pyarrow
    times = [('time_ms', pyarrow.float32())] if frames else []
    self._schema = pyarrow.schema(
        [('file', pyarrow.string()), *times, ('embedding', pyarrow.list_(pyarrow.float32(), width))],
        metadata={'m2d_clap_jax': json.dumps(about)})
    self._writer = pyarrow.parquet.ParquetWriter(path, self._schema, use_dictionary=['file'])
    self._waiting, self._count = [], 0

  def add(self, name: str, embedding: np.ndarray, times: np.ndarray | None = None):
    """embedding: [C], or with times [T] also [T, C]."""
    embedding = np.atleast_2d(embedding)
    self._waiting.append(([name] * len(embedding), times, embedding))
    self._count += len(embedding)
    if self._count >= ROWS:
      self._flush()

  def finish(self):
    if self._waiting:
      self._flush()

  def close(self):
    self._writer.close()

  def _flush(self):
    names, times, embeddings = zip(*self._waiting)
    columns = [self._arrow.array([name for part in names for name in part])]
    if times[0] is not None:
      columns.append(self._arrow.array(np.concatenate(times), self._arrow.float32()))
    flat = self._arrow.array(np.concatenate(embeddings).reshape(-1), self._arrow.float32())
    columns.append(self._arrow.FixedSizeListArray.from_arrays(flat, type=self._schema.field('embedding').type))
    self._writer.write_table(self._arrow.Table.from_arrays(columns, schema=self._schema), row_group_size=ROWS)
    self._waiting, self._count = [], 0


WRITERS = {'.npz': Npz, '.parquet': Parquet}


def writer_for(path: str) -> type[Writer]:
  """The writer for a file's ending; UserError for an unknown one."""
  kind = WRITERS.get(paths.as_path(path).suffix)
  if kind is None or paths.as_path(path).is_dir():
    raise UserError(f'{path}: unknown kind of output: give a file name that ends in {" or ".join(WRITERS)}')
  return kind


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
  """Yields the name of a local file that replaces `path` if the block succeeds.

  Raises:
    UserError: it cannot be written; nothing is left behind.
  """
  try:
    with paths.replacing(path) as temporary:
      open(temporary, 'wb').close()  # reports a read-only folder before hours of work
      yield temporary
  except OSError as error:
    raise UserError(f'{path}: cannot be written ({error.strerror or error}): free space or choose another name'
                    ) from error


def write_rejected(path: str, rejected: list[tuple[str, str]]) -> str:
  """Lists rejected files in PATH.rejected.csv, or removes an earlier run's list; returns its name."""
  listed = f'{path}.rejected.csv'
  if not rejected:
    paths.as_path(listed).unlink(missing_ok=True)
    return listed
  text = io.StringIO(newline='')
  csv.writer(text).writerows([('file', 'reason'), *rejected])
  paths.write_text(listed, text.getvalue())
  return listed
