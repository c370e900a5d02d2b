"""Reading a manifest: which file has which captions, labels and split.

CSV with a header (`file_name`, `caption` and/or `label`, optional `split`; other columns are ignored; several rows of
one file are its captions; a comma in a label separates labels), JSON lines or JSON (`captions` and `labels` may be lists), or a
published data set as it is. Nothing is dropped in silence: what cannot be used comes back as a Row with a reason.
"""
import dataclasses
import os
import re
import sys

from m2d_clap_jax.errors import UserError
from m2d_clap_jax.paths import as_path
from m2d_clap_jax.tables.entries import OUTSIDE, Contents, read_entries
from m2d_clap_jax.tables.published import read_published


@dataclasses.dataclass
class Row:
  """One file of one split, all its manifest rows merged.

  Attributes:
    file_name: relative to the audio root, normalised ('a/../b.wav' is 'b.wav'), as the disk spells it.
    captions, labels: in the manifest's order, without repetitions.
    split: 'train' where the manifest has no split column; 'fold3' where it has folds.
    rows: how many manifest rows were merged.
    files: 1, or 0 for a rejected manifest row that names no file of its own (counts must add up).
    reason: why it cannot be used; '' if it can.
  """
  file_name: str
  captions: list = dataclasses.field(default_factory=list)
  labels: list = dataclasses.field(default_factory=list)
  split: str = 'train'
  rows: int = 1
  files: int = 1
  reason: str = ''


def read_manifest(path, audio_root, columns=None, like=''):
  """Returns list[Row] in the order of first appearance; lines and rows are printed, which add up.

  Args:
    path: the manifest; with `like`, the folder of a published data set, or a table of it.
    audio_root: folder that file names are relative to.
    columns: {ours: (theirs, ...)} where columns have other names.
    like: a published data set (tables.layouts.LAYOUTS).

  Raises:
    UserError: for a manifest that is wrong as a whole.
  """
  path, root = os.fspath(as_path(path)), os.fspath(audio_root)
  contents = read_published(path, like, root) if like else read_entries(path, root, columns)
  print('\n'.join(contents.account))
  for note in contents.notes:
    print(note, file=sys.stderr)
  rows = _merge(contents, path)
  assert sum(row.rows for row in rows) == len(contents.entries), 'a row is lost'
  return rows


def _merge(contents: Contents, path: str):
  """Entries -> Rows: rows of the same file and split become one; unusable entries become rejected Rows."""
  has_split = any(entry.split is not None or entry.fold is not None for entry in contents.entries)
  rows, rejected = {}, []
  for entry in contents.entries:
    split = (f'fold{entry.fold}' if entry.fold else entry.split or '') if has_split else 'train'
    reason = entry.reason or ('' if split else 'no split')
    if reason and not (entry.missing or reason == OUTSIDE):
      rejected.append(Row(entry.file or f'({entry.where})', files=0, reason=f'{entry.where}: {reason}'))
      continue
    # 'all' is a reserved word of TensorFlow Datasets; other characters would break the shards' names.
    if not re.fullmatch(r'[A-Za-z0-9_]+', split) or split == 'all':
      raise UserError(f'{path} {entry.where}: split {split[:50]!r} cannot name files: use letters, digits and _ (not "all")')
    row = rows.setdefault((split, entry.file), Row(entry.file, split=split, rows=0))
    row.rows += 1
    row.reason = reason
    row.captions += [text for text in entry.captions if text not in row.captions]
    row.labels += [text for text in entry.labels if text not in row.labels]
  splits = sorted({row.split for row in rows.values()})
  for row in rejected:  # a broken row's own split cannot be trusted
    row.split = 'train' if 'train' in splits or not splits else splits[0]
  return list(rows.values()) + rejected
