"""Reads the authors' folders: `.npy` log-mels, and `capemb_*.npy` dictionaries of caption embeddings.

A dictionary is `np.save` of {id: [E] or [n, E] array}, that is, a pickle. Pickles can execute code, so an unpickler reads
them that can only build arrays, dicts, strings and numbers.
"""
import hashlib
import io
import pickle

import numpy as np

from m2d_clap_jax import paths
from m2d_clap_jax.data.manifest import Row
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.tables.names import account_of, as_text

# All names in numpy's pickles of arrays and scalars, under numpy 1 and 2. None of them executes its arguments.
_ALLOWED = {(f'numpy.{core}.{module}', name) for core in ('core', '_core')
            for module, name in [('multiarray', '_reconstruct'), ('multiarray', 'scalar'), ('numeric', '_frombuffer')]}
_ALLOWED |= {('numpy', 'ndarray'), ('numpy', 'dtype'), ('_codecs', 'encode')}


class _Unpickler(pickle.Unpickler):

  def find_class(self, module, name):
    if (module, name) not in _ALLOWED:
      raise pickle.UnpicklingError(f'it asks for {module}.{name}, which arrays do not need')
    return super().find_class(module, name)


def list_logmels(folder, split='train'):
  """Folder of `.npy` files, sub-folders too -> list[Row], sorted; key is the path relative to the folder."""
  folder = paths.as_path(folder)
  if not folder.is_dir():
    raise UserError(f'{folder}: no such folder: check --logmels')
  everything = paths.files_under(folder)
  names = [name for name in everything
           if name.endswith('.npy') and not name.rsplit('/', 1)[-1].startswith('capemb_')]
  if not names:
    raise UserError(f'{folder}: contains no .npy files: check --logmels')
  print(account_of(folder, everything, names, 'log-mels'))
  rows = []
  for name in names:
    text, reason = as_text(name)
    rows.append(Row(text, split=split, reason=reason))
  return rows


def load_dictionary(path):
  """`np.save`d dictionary {id: array} -> {str: [n, E] float array}, SHA-256 of the file. UserError for anything else in it."""
  try:
    data = paths.read_bytes(path)
    with io.BytesIO(data) as f:
      version = np.lib.format.read_magic(f)
      read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
      shape, _, dtype = read_header(f)
      if not dtype.hasobject or shape != ():
        raise ValueError(f'it contains an array of {dtype}, shape {list(shape)}, not a dictionary')
      content = _Unpickler(f, encoding='latin1').load()
    content = content.item() if isinstance(content, np.ndarray) and content.shape == () else content
    if not isinstance(content, dict):
      raise ValueError(f'it contains a {type(content).__name__}, not a dictionary')
    return {_text(key): _matrix(key, value) for key, value in content.items()}, hashlib.sha256(data).digest()
  except UserError:  # of a store: it says what was wrong
    raise
  except OSError as e:
    raise UserError(f'{path}: cannot be read ({e.strerror or e}): check --caption_embeddings') from e
  except Exception as e:  # a damaged pickle can raise almost any exception
    raise UserError(f'{path}: not a dictionary of caption embeddings ({" ".join(str(e).split())}): '
                    'save it with np.save(path, {id: array})') from e


def _text(key):
  return key.decode() if isinstance(key, bytes) else str(key)


def _matrix(key, value):
  value = np.asarray(value)
  if not np.issubdtype(value.dtype, np.floating) or value.ndim not in (1, 2) or not value.size:
    raise ValueError(f'{_text(key)!r} has shape {list(value.shape)} of {value.dtype} where [E] or [n, E] floats '
                     'are expected')
  return value.reshape(-1, value.shape[-1])


class Dictionaries:
  """The caption embeddings of all dictionaries that match the patterns; a clip in several has several captions.

  Attributes: width E; weights_hash, 16 hex digits over the files' bytes; name 'capemb'.
  """
  name = 'capemb'

  def __init__(self, patterns, dtype):
    files = []
    for pattern in patterns:
      found = paths.glob(pattern)
      if not found:
        raise UserError(f'{pattern}: no such file: check --caption_embeddings')
      files += [path for path in found if path not in files]
    digest = hashlib.sha256()
    self._dtype = dtype
    self._parts = []
    self.width = None
    for path in files:
      part, own_digest = load_dictionary(path)
      for key, value in part.items():
        self.width = self.width or value.shape[1]
        if value.shape[1] != self.width:
          raise UserError(f'{path}: {key!r} is {value.shape[1]} wide, but others are {self.width}: '
                          'use dictionaries of one text encoder')
      self._parts.append(part)
      digest.update(own_digest)
    if not self.width:
      raise UserError(f'{", ".join(files)}: the dictionaries are empty: check --caption_embeddings')
    self.weights_hash = digest.hexdigest()[:16]

  def mark_missing(self, rows):
    """Rejects the rows without a finite embedding; returns the rows."""
    for row in rows:
      if not row.reason:
        embeddings = self(row)
        if embeddings is None:
          row.reason = 'no caption embedding'
        elif not np.isfinite(embeddings).all():
          row.reason = f'its caption embedding contains NaN, infinity or values beyond {self._dtype}'
    return rows

  def __call__(self, row):
    """Row -> [n, E] in the stored dtype, or None."""
    found = [self._find(part, row.file_name) for part in self._parts]
    found = [value for value in found if value is not None]
    return np.concatenate(found).astype(self._dtype) if found else None

  @staticmethod
  def _find(part, name):
    for key in candidates(name):
      if key in part:
        return part[key]
    return None


def candidates(name):
  """File name -> its possible ids, best first: the stem, without a leading Y, the first 11 characters of both."""
  stem = name.rsplit('/', 1)[-1].removesuffix('.npy')
  bare = stem.removeprefix('Y')
  # The variants without Y come last: an id may itself begin with Y.
  return list(dict.fromkeys([stem, bare, stem[:11], bare[:11]]))
