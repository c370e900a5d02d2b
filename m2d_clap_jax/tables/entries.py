"""Rows of tables as entries: which recording has which captions, labels and split."""
import dataclasses
import re
from collections.abc import Mapping, Sequence

from m2d_clap_jax.errors import UserError
from m2d_clap_jax.tables.layouts import COLUMNS, WITH_FOLDS
from m2d_clap_jax.tables.names import Files, relative_to
from m2d_clap_jax.tables.reader import Row, Table, plain, read_table

OUTSIDE = 'path is outside the audio root'


@dataclasses.dataclass
class Entry:
  """What one row says.

  Attributes:
    where: such as 'line 7', with the table's name where a set has several.
    file: the recording, relative to the root, as the disk spells it; '' where the row names none.
    split, fold: None where the table has no such column.
    reason: why it cannot be used; '' if it can.
    missing: that is because the recording is not there.
  """
  where: str
  file: str = ''
  captions: list[str] = dataclasses.field(default_factory=list)
  labels: list[str] = dataclasses.field(default_factory=list)
  split: str | None = None
  fold: str | None = None
  reason: str = ''
  missing: bool = False


@dataclasses.dataclass
class Contents:
  """entries: one for every row; account: lines and rows of the tables, which add up; notes: further reports, a line each."""
  entries: list[Entry]
  account: list[str]
  notes: list[str]


def parse_columns(text: str, option: str = '--columns') -> dict[str, tuple[str, ...]]:
  """'file_name:path,caption:text_1,caption:text_2' -> {ours: their names}; UserError, naming the option, for anything else."""
  found: dict[str, tuple[str, ...]] = {}
  for part in filter(None, text.split(',')):
    ours, colon, theirs = part.partition(':')
    if ours not in WITH_FOLDS or not colon or not theirs.strip():
      raise UserError(f'{option}={text}: {part!r} is not OURS:THEIRS with OURS one of {", ".join(WITH_FOLDS)}')
    found[ours] = (*found.get(ours, ()), theirs)
  several = next((ours for ours in ('file_name', 'split', 'fold') if len(found.get(ours, ())) > 1), None)
  if several:
    raise UserError(f'{option}={text}: {several} is one column, and {len(found[several])} are named')
  if 'split' in found and 'fold' in found:
    raise UserError(f'{option}={text}: a row belongs to a split or to a fold: name one of the two columns')
  return found


def read_entries(path, root, columns: Mapping[str, Sequence[str]] | None = None, *, folds: bool = False,
                 option: str = '--columns') -> Contents:
  """A table of one's own -> its rows.

  Args:
    path: CSV, JSON lines or JSON (see `reader`).
    root: folder that file names are relative to.
    columns: {ours: their names} where they are not called file_name, caption, label, split (and fold); one of the last two
      makes the other, if the table has it, one that is not read.
    folds: a column `fold` is read, too.
    option: what named `columns`, for messages.

  Raises:
    UserError: the table as a whole cannot be read, or lacks a column.
  """
  columns = columns or {}
  known = (WITH_FOLDS if folds else COLUMNS) | {name: tuple(theirs) for name, theirs in columns.items()}
  for part, other in (('split', 'fold'), ('fold', 'split')):
    if part in columns:
      known[other] = ()
  table = read_table(path, known['file_name'][0], [name for ours, theirs in known.items() if ours != 'file_name'
                                                   for name in theirs])
  _check_columns(table, known, columns, folds, option)
  files = Files(root)
  entries = [_entry(row, known, files) for row in table.rows]
  return Contents(entries, [f'{table.path}: {table.account}'], notes_of(files))


def notes_of(files: Files) -> list[str]:
  """Reports the names that were matched with differently spelled files."""
  if not files.respelled:
    return []
  theirs, ours = next(iter(files.respelled.items()))
  return [f'{files.root}: {len(files.respelled)} names differ from those of the files in Unicode normalisation alone, such as '
          f'{ascii(theirs)} for {ascii(ours)}: these files are used']


def _check_columns(table: Table, known: Mapping, given: Mapping, folds: bool, option: str):
  has = set(table.columns)
  expected = 'file_name, caption and/or label, optional split' + ' or fold' * folds
  some = ', '.join(table.columns)[:200] or 'none'
  for ours, theirs in given.items():
    missing = [name for name in theirs if plain(name) not in has]
    if missing:
      raise UserError(f'{option}={ours}:{missing[0]}: {table.path} has no such column; its columns are {some}')
  needed = known['file_name'], (*known['caption'], *known['label'])
  if (has or not table.rows) and not all(has & {plain(name) for name in names} for names in needed):
    raise UserError(f'{table.path}: columns are {some}; expected {expected}'
                    f'; if yours have other names, say so: {option}=file_name:NAME,caption:NAME,label:NAME' + ',fold:NAME' * folds)
  if not table.rows:
    raise UserError(f'{table.path}: no rows below the header: give it {expected}')


def _entry(row: Row, columns: Mapping[str, Sequence[str]], files: Files) -> Entry:
  if row.reason:
    return Entry(row.where, reason=row.reason)
  entry = content_of(row, columns, ',')
  name = _first(row, columns['file_name'])
  if not name.strip():
    entry.reason = 'no file_name'
    return entry
  if name != name.strip() and not files.exact(relative_to(name, files.root) or ''):
    name = name.strip()
  inside = relative_to(name, files.root)
  entry.file, entry.reason = (files.spelled(inside), '') if inside else (name, OUTSIDE)
  return entry


def content_of(row: Row, columns: Mapping[str, Sequence[str]], separator: str) -> Entry:
  """A row's captions, labels and part; its file is still to be found."""
  def texts(kind):
    return [row.fields[plain(name)] for name in columns.get(kind, ()) if plain(name) in row.fields]
  captions = [text for value in texts('caption') for text in (value if isinstance(value, list) else [value])]
  labels = [text for value in texts('label') for text in (value if isinstance(value, list) else _parts(value, separator))]
  return Entry(row.where, captions=_cleaned(captions), labels=_cleaned(labels),
               **{kind: _first(row, columns[kind]).strip() for kind in ('split', 'fold')
                  if any(plain(name) in row.fields for name in columns.get(kind, ()))})


def _parts(text: str, separator: str) -> list[str]:
  if separator == '[]':
    return quoted(text)
  return text.split(separator) if separator else [text]


def quoted(text: str) -> list[str]:
  """"['pop', \\"child's voice\\"]" -> ['pop', "child's voice"]."""
  return [one or other for one, other in re.findall(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"", text)]


def _first(row: Row, names: Sequence[str]) -> str:
  value = next((row.fields[plain(name)] for name in names if plain(name) in row.fields), '')
  return value if isinstance(value, str) else ''


def _cleaned(texts: list[str]) -> list[str]:
  """Without repetitions, empty ones and line ends."""
  return list(dict.fromkeys(filter(None, (' '.join(text.split()) for text in texts))))
