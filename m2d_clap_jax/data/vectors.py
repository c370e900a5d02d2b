"""Caption embeddings that were computed elsewhere: files of captions, their vectors and the name of the encoder.

A .parquet file has the columns `caption` (text), `vector` (a list of E numbers) and `encoder` (the same name in each row). A
.npz file has the arrays `caption` [n], `vector` [n, E] and `encoder` (one text), and is held in memory.
"""
import io
import os
import sys
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from m2d_clap_jax import paths
from m2d_clap_jax.data import write
from m2d_clap_jax.errors import UserError

COLUMNS = 'caption', 'vector', 'encoder'
_ROWS = 1024  # of a parquet file in memory
_ADVICE = 'give a .parquet or .npz file of caption, vector and encoder (docs/data.md)'


class Vectors:
  """The vectors of captions, in the place of a text encoder: `vectors(captions)` -> [n, E] float32.

  Attributes: name, of the encoder; width E; weights_hash, None, because what computed them is not at hand.
  """
  weights_hash = None

  def __init__(self, files: Sequence[str], wanted: Iterable[str] | None = None):
    """Reads all captions, but no vectors yet; of a caption that comes twice, the last vector counts.

    wanted: captions that will be asked for; others need no memory.

    Raises:
      UserError: a file cannot be read, or is of another encoder or width than the first.
    """
    self.files = list(files)
    wanted = None if wanted is None else set(wanted)
    self._parts = [_open(path) for path in self.files]
    self._places: dict[str, tuple[int, int]] = {}
    self.name, self.width = self._parts[0].encoder, self._parts[0].width
    for number, part in enumerate(self._parts):
      if (part.encoder, part.width) != (self.name, self.width):
        raise UserError(f'{part.path}: vectors of {part.encoder}, {part.width} wide, where those in {self.files[0]} are of '
                        f'{self.name}, {self.width} wide: give files of one encoder')
      for row, caption in enumerate(part.captions()):
        caption = ' '.join(caption.split())  # as captions of manifests are read
        if wanted is None or caption in wanted:
          self._places[caption] = number, row

  def __contains__(self, caption: str) -> bool:
    return caption in self._places

  def order(self, caption: str) -> tuple[int, int]:
    """Where a caption stands: asked for in this order, the files are read once, from start to end."""
    return self._places[caption]

  def stamps(self) -> dict[str, tuple[int, str]]:
    """What changes when a file does, see `paths.stamps`."""
    return {path: stamp for path in self.files
            for stamp in paths.stamps(os.path.dirname(path), [os.path.basename(path)]).values()}

  def mark_missing(self, rows, listed: str):
    """Rejects the rows with a caption that has no vector, and lists these captions in the file `listed`, a line each."""
    texts = dict.fromkeys(text for row in rows if not row.reason for text in row.captions)
    missing = {text: None for text in texts if text not in self}
    if not missing:
      paths.as_path(listed).unlink(missing_ok=True)
      return
    write.write_text(listed, ''.join(f'{text}\n' for text in missing), alone=False)
    hit = [row for row in rows if not row.reason and not missing.keys().isdisjoint(row.captions)]
    for row in hit:
      row.reason = f'no vector of its caption {next(text for text in row.captions if text in missing)[:60]!r}'
    print(f'notice: {len(missing)} of {len(texts)} captions have no vector and are listed in {listed}: their {len(hit)} clips are '
          'rejected', file=sys.stderr)

  def __call__(self, captions: Sequence[str]) -> np.ndarray:
    places = [self._places[caption] for caption in captions]
    out = np.empty((len(places), self.width), np.float32)
    for number in sorted({number for number, _ in places}):
      rows = sorted((row, i) for i, (own, row) in enumerate(places) if own == number)
      for (_, i), vector in zip(rows, self._parts[number].vectors([row for row, _ in rows])):
        out[i] = vector
    return out


class _Npz:
  """A .npz file, read as a whole."""

  def __init__(self, path: str):
    self.path = path
    with np.load(io.BytesIO(paths.read_bytes(path)), allow_pickle=False) as file:
      _check_columns(path, file.files)
      self._captions, self._vectors, encoder = (file[name] for name in COLUMNS)
    if encoder.size != 1 or encoder.dtype.kind != 'U' or self._captions.dtype.kind != 'U':
      raise ValueError(f'caption of {self._captions.dtype} and encoder of {encoder.dtype} {list(encoder.shape)}, not texts')
    if self._vectors.ndim != 2 or self._vectors.dtype.kind != 'f' or self._captions.shape != self._vectors.shape[:1]:
      raise ValueError(f'{list(self._captions.shape)} captions and vectors {list(self._vectors.shape)} of {self._vectors.dtype}')
    self.encoder, self.width = str(encoder.item()), self._vectors.shape[1]

  def captions(self) -> Iterator[str]:
    return map(str, self._captions)

  def vectors(self, rows: Sequence[int]) -> np.ndarray:
    """Ascending row numbers -> [n, E]."""
    return self._vectors[rows]


class _Parquet:
  """A .parquet file, of which a few rows are in memory."""

  def __init__(self, path: str):
    import pyarrow.parquet
    self.path = path
    self._file = pyarrow.parquet.ParquetFile(paths.filesystem(path).open(path) if paths.is_remote(path) else path)
    _check_columns(path, self._file.schema_arrow.names)
    sizes = [self._file.metadata.row_group(i).num_rows for i in range(self._file.metadata.num_row_groups)]
    self._starts = np.cumsum([0, *sizes])
    names = set().union(*(batch[0].unique().to_pylist() for batch in self._batches(['encoder'])))
    if len(names) != 1 or not isinstance(next(iter(names)), str):
      raise ValueError(f'encoder is {", ".join(map(str, sorted(names, key=str)[:3])) or "of no rows"}, not one name')
    self.encoder = names.pop()
    self._end, self._rest, self._held, self.width = -1, iter(()), np.empty((0, 0), np.float32), 0
    self.width = self.vectors([0]).shape[1]

  def captions(self) -> Iterator[str]:
    for batch in self._batches(['caption']):
      if batch[0].null_count:
        raise UserError(f'{self.path}: a caption is null: leave that row out')
      yield from batch[0].to_pylist()

  def vectors(self, rows: Sequence[int]) -> np.ndarray:
    """Ascending row numbers -> [n, E]. The file is read on from where it was, or from a row group before the first."""
    found = []
    for row in rows:
      group = int(np.searchsorted(self._starts, row, 'right')) - 1
      if row < self._end - len(self._held) or self._starts[group] > self._end:
        self._rest, self._end = self._batches(['vector'], group), int(self._starts[group])
        self._held = self._held[:0]
      while row >= self._end:
        self._held = self._matrix(next(self._rest)[0])
        self._end += len(self._held)
      found.append(self._held[row - self._end + len(self._held)].copy())  # not a view, which would keep all of them
    return np.stack(found)

  def _batches(self, columns: list[str], first: int = 0) -> Iterator:
    """The rows from a row group on."""
    return self._file.iter_batches(_ROWS, row_groups=list(range(first, len(self._starts) - 1)), columns=columns)

  def _matrix(self, column) -> np.ndarray:
    import pyarrow.compute
    lengths = pyarrow.compute.list_value_length(column).unique().to_pylist()
    numbers = column.flatten().to_numpy(zero_copy_only=False)
    if numbers.dtype.kind != 'f' or not lengths[0] or lengths != [self.width or lengths[0]]:
      raise UserError(f'{self.path}: vectors are {column.type} of lengths {lengths}, not floats of one length: {_ADVICE}')
    return numbers.reshape(len(column), -1)


_KINDS = {'.npz': _Npz, '.parquet': _Parquet}


def _open(path: str) -> _Npz | _Parquet:
  kind = _KINDS.get(os.path.splitext(path)[1])
  if kind is None:
    raise UserError(f'{path}: unknown kind of file: {_ADVICE}')
  try:
    return kind(path)
  except UserError:
    raise
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror or error}): check --caption_embeddings') from error
  except Exception as error:  # each kind of damaged file raises something else
    raise UserError(f'{path}: does not contain captions and their vectors ({" ".join(str(error).split())[:200]}): '
                    f'{_ADVICE}') from error


def _check_columns(path: str, names: Iterable[str]):
  missing = [name for name in COLUMNS if name not in names]
  if missing:
    raise UserError(f'{path}: has no {missing[0]}: {_ADVICE}')
