"""Published data sets as they come out of their archives -> entries."""
import os
import posixpath
import re
from collections.abc import Iterator

from m2d_clap_jax.audio.names import ENDINGS, printable
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.paths import as_path, files_under
from m2d_clap_jax.tables.entries import OUTSIDE, Contents, Entry, content_of, notes_of
from m2d_clap_jax.tables.layouts import Layout, Part, layout_of
from m2d_clap_jax.tables.names import Files, account_of, as_text, relative_to
from m2d_clap_jax.tables.reader import Row, plain, read_table
from m2d_clap_jax.tables.text import read_text


class Absent(UserError):
  """The place is not such a set at all."""


class _Value(str):
  """A field in the name of a file; '06d' and the like take it as a number."""

  def __format__(self, spec: str) -> str:
    return format(int(float(self)), spec) if spec.endswith('d') else format(str(self), spec)


def read_published(place, like: str, root, *, option: str = '--like', tenths: bool = False) -> Contents:
  """A published data set, or one of its tables -> its rows.

  Args:
    place: the folder of the unpacked set, or one of its tables.
    like: a key of layouts.LAYOUTS.
    root: folder that recordings are in, usually `root_of(place, like)`.
    option: what named `like`, for messages.
    tenths: a set without official parts gets ten folds of neighbouring numbers in the files' names.

  Raises:
    Absent: the place does not contain such a set.
    UserError: a table is not as published.
  """
  layout = layout_of(like, option)
  files = Files(root)
  if layout.classes:
    return _classes(files, layout, like, tenths and layout.tenths)
  found, account, notes = [], [], []
  for part, path in _tables(place, layout, like, notes):
    table = read_table(path, _names(layout, 'file_name')[0], header=layout.header,
                       others=[name for kind in layout.columns if kind != 'file_name' for name in _names(layout, kind)])
    needed = {plain(name) for kind in layout.columns if kind != 'split' for name in _names(layout, kind)}
    if table.rows and table.columns and not needed <= set(table.columns):
      raise UserError(f'{path}: has no column {sorted(needed - set(table.columns))[0]}, as {like} has; its columns are '
                      f'{", ".join(table.columns)[:200]}')
    account.append(f'{path}: {table.account}')
    foreign = [folder for other in layout.parts if other is not part for folder in other.folders]
    label = f'{os.path.basename(path)} ' if len(layout.parts) > 1 else ''
    found += [_entry(row, layout, part, files, foreign, label) for row in table.rows]
  if not found:
    raise UserError(f'{place}: the tables of {like} contain no rows')
  return Contents(found, account, notes + notes_of(files))


def root_of(place, like: str) -> str:
  """The folder of a set: the place itself, or what a table's place in its archive says."""
  place = os.fspath(place)
  layout = layout_of(like, '--like')
  if layout.classes or as_path(place).is_dir():
    return place
  known = [table for part in layout.parts for table in part.tables if f'/{place}'.endswith(f'/{table}')]
  return place.removesuffix(max(known, key=len)).rstrip('/') or '.' if known else os.path.dirname(place) or '.'


def _names(layout: Layout, kind: str) -> tuple[str, ...]:
  theirs = layout.columns[kind]
  return (theirs,) if isinstance(theirs, str) else theirs


def _tables(place, layout: Layout, like: str, notes: list[str]) -> list[tuple[Part, str]]:
  place = os.fspath(place)
  if not as_path(place).is_dir():
    base = os.path.basename(place)
    own = [part for part in layout.parts if base in map(posixpath.basename, part.tables)]
    return [(own[0] if own else layout.parts[0] if len(layout.parts) == 1 else Part((base,)), place)]
  found = []
  for part in layout.parts:
    path = next((path for path in (os.path.join(place, table) for table in part.tables) if as_path(path).exists()), None)
    if path:
      found.append((part, path))
    else:
      notes.append(f'{place}: has no {part.tables[0]}; its rows are left out')
  if not found:
    raise Absent(f'{place}: contains no table of {like} ({", ".join(part.tables[0] for part in layout.parts)}): name the '
                 'folder of the unpacked archive, or a table of it')
  return found


def _entry(row: Row, layout: Layout, part: Part, files: Files, foreign: list[str], label: str) -> Entry:
  where = label + row.where
  if row.reason:
    return Entry(where, reason=row.reason)
  entry = content_of(row, {kind: _names(layout, kind) for kind in layout.columns}, layout.labels)
  entry.where = where
  if entry.split is None:
    entry.split = part.split or None
  elif entry.split.lower() in layout.splits:
    entry.split = layout.splits[entry.split.lower()]
  else:
    entry.reason = f'split {entry.split[:50]!r} is none of {", ".join(layout.splits)}'
    return entry
  if not str(row.fields.get(plain(_names(layout, 'file_name')[0]), '')).strip():
    entry.reason = 'no file_name'
    return entry
  _find(entry, row, layout, part, files, foreign)
  return entry


def _find(entry: Entry, row: Row, layout: Layout, part: Part, files: Files, foreign: list[str]):
  """Fills in the recording of a row, or why there is none."""
  looked = []
  for name in _candidates(row, layout, part):
    inside = relative_to(name.removeprefix('**/'), files.root)
    looked.append(inside or name)
    if not inside:
      entry.file, entry.reason = name, OUTSIDE
      return
    if not name.startswith('**/'):
      found = [same] if (same := files.find(inside)) else []
    else:
      stem, ending = posixpath.splitext(inside)
      found = files.of_stem(stem if ending.lower() in ENDINGS else inside, part.folders, foreign)
    if len(found) == 1:
      entry.file, entry.reason = as_text(found[0])
      return
    if found:
      some = ', '.join(map(printable, found[:3]))
      entry.file, entry.reason = inside, f'several recordings have its name ({some})'
      return
  entry.file, entry.missing = looked[0] if looked else '', bool(looked)
  entry.reason = f'no such file (looked for {", ".join(looked[:4])})' if looked else 'its columns make no name of a file'


def _candidates(row: Row, layout: Layout, part: Part) -> Iterator[str]:
  values = {name: _Value(value.strip()) for name, value in row.fields.items() if isinstance(value, str)}
  for template in layout.files:
    try:
      yield template.format(**values | {'folder': part.folders[0] if part.folders else '.'})
    except (ValueError, OverflowError, KeyError):  # no number where one is needed, or a table without that column
      continue


def _classes(files: Files, layout: Layout, like: str, tenths: bool) -> Contents:
  """Folders of classes: every recording in them, and every one that the lists name."""
  names = files_under(files.root)
  base, clips = next(((base, found) for base in layout.classes if (found := _recordings(names, base, layout.left_out))),
                     ('', []))
  if not clips:
    raise Absent(f'{files.root}: contains no folders of classes with recordings, as {like} has: name the folder of the '
                 'unpacked archive')
  parts = _listed(files, layout, like)
  entries = []
  for name in [*clips, *sorted(set(parts) - set(clips))]:
    file, reason = as_text(name)
    entry = Entry(file, file, labels=[posixpath.basename(posixpath.dirname(file))], reason=reason,
                  split=parts.get(name, 'train') if layout.lists else None)
    if name in parts and name not in clips:
      entry.reason, entry.missing = 'no such file, though a list names it', True
    if tenths:
      number = tenth_of(name)
      entry.fold, entry.reason = str(number), entry.reason or ('' if number else 'no number in its name')
    entries.append(entry)
  return Contents(entries, [account_of(os.path.join(files.root, base), names, clips, 'recordings of classes')], [])


def _recordings(names: list[str], base: str, left_out: tuple[str, ...]) -> list[str]:
  found = []
  for name in names:
    inside = posixpath.relpath(name, base) if base else name
    folder, _, file = inside.partition('/')
    if (file and '/' not in file and not file.startswith('.') and not folder.startswith('.') and folder not in left_out
        and posixpath.splitext(file)[1].lower() in ENDINGS):
      found.append(name)
  return found


def _listed(files: Files, layout: Layout, like: str) -> dict[str, str]:
  """{recording: split} of the lists; those of no list are training clips."""
  parts: dict[str, str] = {}
  for name, split in layout.lists.items():
    path = os.path.join(files.root, name)
    if not as_path(path).exists():
      raise UserError(f'{path}: is missing, and says which recordings of {like} are {split}: unpack the archive whole')
    for line in read_text(path).split('\n'):
      if line.strip():
        file = relative_to(line.strip(), files.root) or line.strip()
        if parts.setdefault(file, split) != split:
          raise UserError(f'{path}: {file} is in the list of {parts[file]} too: a recording belongs to one part')
  return parts


def tenth_of(name: str) -> int | None:
  """'blues.00042.wav' -> one of ten folds: 1 for the first ten numbers, and so on; None without a number.

  Neighbours are often of one album, so they stay together.
  """
  number = re.search(r'\.(\d+)\.', name)
  return int(number[1]) // 10 % 10 + 1 if number else None
