"""Embeds all captions of a manifest once, in blocks that a restart reuses.

Blocks depend only on the set of captions. The last bits of an embedding depend on the other captions in its batch, so a
shard that is written after a restart, or by another machine, has the same bytes only if the batches are the same.
"""
import hashlib
import io
import os

import numpy as np

from m2d_clap_jax import paths
from m2d_clap_jax.data.vectors import Vectors
from m2d_clap_jax.errors import UserError

BLOCK = 1024  # captions


class Lookup:
  """Finds the embeddings of captions in the blocks of a folder.

  Args:
    folder: of the blocks.
    places: {caption: its number among all captions}.
    blocks: {number: array} cache of the blocks read from a store, to be shared, so that each is read only once.
  """

  def __init__(self, folder: str, places: dict[str, int], blocks: dict[int, np.ndarray] | None = None):
    self.folder, self.places = folder, places
    self._blocks = {} if blocks is None else blocks

  def __call__(self, row) -> np.ndarray:
    """Row -> [n, E] in the stored dtype, in the order of its captions."""
    places = [divmod(self.places[text], BLOCK) for text in row.captions]
    return np.stack([self._block(i)[j] for i, j in places])

  def _block(self, i: int) -> np.ndarray:
    path = _path(self.folder, i)
    if not paths.is_remote(path):  # opened on each use: a million captions would need a thousand open files
      return np.load(path, mmap_mode='r')
    if i not in self._blocks:
      with paths.local_copy(path) as name:
        self._blocks[i] = np.load(name)
    return self._blocks[i]


class CaptionBank(Lookup):
  """Makes and looks up caption embeddings in `folder/.captions-<fingerprint>/` during a preparation."""

  def __init__(self, folder, captions, encoder, dtype):
    self.dtype, self._encoder = np.dtype(dtype), encoder
    # Together are sentences of one length, or vectors that stand side by side in a file.
    self._texts = sorted(set(captions), key=encoder.order if isinstance(encoder, Vectors) else lambda text: (len(text), text))
    made_by = encoder.stamps() if isinstance(encoder, Vectors) else encoder.weights_hash
    digest = hashlib.sha256(f'{made_by} {dtype} {BLOCK}'.encode())
    for text in self._texts:
      digest.update(text.encode() + b'\0')
    super().__init__(os.path.join(folder, f'.captions-{digest.hexdigest()[:16]}'),
                     {text: i for i, text in enumerate(self._texts)})

  def embed(self, rows, progress, task=None):
    """Makes the missing blocks that the rows need. `progress(done, total)` is called after each.

    Of n concurrent tasks each begins at a different block, so that they share the work.
    """
    needed = self.missing(rows)
    first = 0 if task is None else task[0] * len(needed) // task[1]
    for done, (i, texts) in enumerate(needed[first:] + needed[:first], 1):
      make_block(self.folder, self.dtype, i, texts, self._encoder)
      progress(min(done * BLOCK, len(self._texts)), min(len(needed) * BLOCK, len(self._texts)))

  def missing(self, rows):
    """[(number, captions)] of the missing blocks that the rows need."""
    needed = sorted({self.places[text] // BLOCK for row in rows if not row.reason for text in row.captions})
    return [(i, self._texts[i * BLOCK:(i + 1) * BLOCK]) for i in needed
            if not paths.as_path(_path(self.folder, i)).exists()]


def make_block(folder: str, dtype: np.dtype, i: int, texts: list[str], encoder):
  """Embeds and writes a block, unless another process already has.

  Raises:
    UserError: an embedding is not finite in `dtype`.
  """
  if paths.as_path(_path(folder, i)).exists():
    return
  values = np.asarray(encoder(texts), np.float32)
  if values.shape != (len(texts), encoder.width):
    raise ValueError(f'text encoder gave {values.shape} for {len(texts)} captions of width {encoder.width}')
  with np.errstate(over='ignore'):
    stored = values.astype(dtype)
  if not np.isfinite(stored).all():
    bad = texts[int(np.flatnonzero(~np.isfinite(stored).all(1))[0])]
    raise UserError(f'the embedding of caption {bad[:60]!r} is not finite in {dtype}: '
                    'use --embedding_dtype=float32 or another text encoder')
  data = io.BytesIO()
  np.save(data, stored)
  paths.write_bytes(_path(folder, i), data.getvalue())


def _path(folder: str, i: int) -> str:
  return os.path.join(folder, f'{i:05d}.npy')


def remove_blocks(folder):
  """Deletes the blocks of a finished preparation, and those left by an abandoned one."""
  for name in paths.names_in(folder):
    if name.startswith('.captions-'):
      paths.remove_folder(os.path.join(folder, name))
