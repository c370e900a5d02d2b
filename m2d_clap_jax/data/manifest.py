"""Reading a manifest: which file has which captions, labels and split.

CSV with a header (`file_name`, `caption` and/or `label`, optional `split`; other columns are ignored; several rows of
one file are its captions; a comma in a label separates labels) or JSON lines (`captions` a list or a string, likewise
`labels`).
Nothing is dropped in silence: what cannot be used comes back as a Row with a reason.
"""
import csv
import dataclasses
import json
import os
import posixpath
import re

from m2d_clap_jax.errors import UserError
from m2d_clap_jax.paths import as_path, is_remote, open_text

# A caption of 10,000 words fits; the default of 131,072 characters is there for other people's mistakes.
MAX_FIELD = 2 ** 24
EXPECTED = 'file_name, caption and/or label, optional split'


@dataclasses.dataclass
class Row:
  """One file of one split, all its manifest rows merged.

  Attributes:
    file_name: relative to the audio root, normalised ('a/../b.wav' is 'b.wav').
    captions, labels: in the manifest's order, without repetitions.
    split: 'train' where the manifest has no split column.
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


def read_manifest(path, audio_root):
  """Returns list[Row] in the order of first appearance. Raises UserError for a manifest that is wrong as a whole."""
  path = os.fspath(as_path(path))
  csv.field_size_limit(MAX_FIELD)
  try:
    with open_text(path) as f:
      entries = list(_json_entries(f, path) if path.endswith(('.jsonl', '.json')) else _csv_entries(f, path))
  except OSError as e:
    raise UserError(f'{path}: cannot read the manifest ({e.strerror}): check --manifest') from e
  except UnicodeDecodeError as e:
    raise UserError(f'{path}: not UTF-8 at byte {e.start}: save the manifest as UTF-8') from e
  except csv.Error as e:
    raise UserError(f'{path}: not a CSV file ({e}): columns are {EXPECTED}') from e
  if not entries:
    raise UserError(f'{path}: the manifest has no rows: give it {EXPECTED}')
  return _merge(entries, os.fspath(audio_root), path)


def _csv_entries(f, path):
  """Yields dicts with file_name, captions, labels, split (or None), or line and reason for a broken row."""
  reader = csv.reader(f)
  header = [name.strip() for name in next(reader, [])]
  _check_columns(header, path)
  columns = {name: header.index(name) for name in ('file_name', 'caption', 'label', 'split') if name in header}
  for fields in reader:
    if not fields:
      continue  # a blank line is no row
    if len(fields) != len(header):
      yield {'line': reader.line_num, 'reason': f'line {reader.line_num}: {len(fields)} fields where the header has '
                                                f'{len(header)} (quote captions that hold commas)'}
      continue
    row = {name: fields[i] for name, i in columns.items()}
    yield {'line': reader.line_num, 'file_name': row['file_name'], 'captions': [row.get('caption', '')],
           'labels': row.get('label', '').split(','), 'split': row.get('split')}


def _check_columns(header, path):
  if 'file_name' not in header or not {'caption', 'label'} & set(header):
    raise UserError(f'{path}: columns are {", ".join(header)[:200] or "none"}; expected {EXPECTED}')
  twice = [name for name in ('file_name', 'caption', 'label', 'split') if header.count(name) > 1]
  if twice:
    raise UserError(f'{path}: column {twice[0]} stands in the header twice: rename one')


def _json_entries(f, path):
  """The same dicts from JSON lines."""
  seen = set()
  for line, text in enumerate(f, 1):
    if not text.strip():
      continue
    try:
      record = json.loads(text)
    except ValueError:
      record = None
    if not isinstance(record, dict):
      yield {'line': line, 'reason': f'line {line}: not a JSON object'}
      continue
    seen.update(record)
    try:
      captions = _texts(record, 'captions') + _texts(record, 'caption')
      labels = _texts(record, 'labels') + [part for text in _texts(record, 'label') for part in text.split(',')]
      name, split = record.get('file_name') or '', record.get('split')
      if not isinstance(name, str) or not isinstance(split, str | None):
        raise TypeError('file_name and split must be strings')
      ''.join([name, split or '', *captions, *labels]).encode()  # JSON can spell half a character
    except (TypeError, UnicodeEncodeError) as e:
      yield {'line': line, 'reason': f'line {line}: {e}'}
      continue
    yield {'line': line, 'file_name': name, 'captions': captions, 'labels': labels, 'split': split}
  if seen and 'file_name' not in seen:
    raise UserError(f'{path}: keys are {", ".join(sorted(seen))[:200]}; '
                    f'expected {EXPECTED.replace("caption", "captions")}')


def _texts(record, name):
  value = record.get(name)
  if value is None:
    return []
  if isinstance(value, str):
    return [value]
  if isinstance(value, list) and all(isinstance(text, str) for text in value):
    return value
  raise TypeError(f'{name} must be a string or a list of strings')


def _merge(entries, root, path):
  """Entries -> Rows: rows of the same file and split become one; unusable entries become rejected Rows."""
  has_split = any(entry.get('split') is not None for entry in entries)
  rows, rejected = {}, []
  for entry in entries:
    reason = entry.get('reason')
    name = (entry.get('file_name') or '').strip()
    split = (entry.get('split') or '').strip() if has_split else 'train'
    if reason is None and not name:
      reason = f'line {entry["line"]}: no file_name'
    if reason is None and not split:
      reason = f'line {entry["line"]}: no split'
    if reason is not None:
      rejected.append(Row(name or f'(line {entry["line"]})', files=0, reason=reason))
      continue
    # 'all' is a reserved word of TensorFlow Datasets; other characters would break the shards' names.
    if not re.fullmatch(r'[A-Za-z0-9_]+', split) or split == 'all':
      raise UserError(f'{path} line {entry["line"]}: split {split!r} cannot name files: '
                      'use letters, digits and _ (not "all")')
    key = relative_to(name, root)
    row = rows.setdefault((split, key or name), Row(key or name, split=split, rows=0))
    row.rows += 1
    row.reason = '' if key else 'path is outside the audio root'
    _extend(row.captions, entry['captions'])
    _extend(row.labels, entry['labels'])
  splits = sorted({row.split for row in rows.values()})
  for row in rejected:  # a broken row's own split cannot be trusted
    row.split = 'train' if 'train' in splits or not splits else splits[0]
  return list(rows.values()) + rejected


def _extend(known, texts):
  for text in texts:
    text = ' '.join(text.split())
    if text and text not in known:
      known.append(text)


def relative_to(name, root):
  """File name -> normalised path relative to `root`, or None if it leads out of it (links are not followed)."""
  name = name.replace('\\', '/') if os.sep == '\\' else name
  if is_remote(root):  # a file's name begins with the root's, or is relative to it
    name = name.removeprefix(root.rstrip('/') + '/')
    root = '.'
  root = posixpath.normpath(root)
  full = posixpath.normpath(posixpath.join(root, name))
  relative = posixpath.relpath(full, root)
  return None if relative == '..' or relative.startswith('../') or relative == '.' else relative
