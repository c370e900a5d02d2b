"""One reader of tables: CSV of any usual delimiter, JSON lines, and JSON.

Every line of the file is accounted for: it is the header, blank, part of a row, or a row that cannot be read and says why.
"""
import csv
import dataclasses
import functools
import posixpath
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from m2d_clap_jax.audio.names import ENDINGS
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.tables import json_rows
from m2d_clap_jax.tables.text import read_text, split_lines

# A caption of 10,000 words fits; the default of 131,072 characters is there for other people's mistakes.
MAX_FIELD = 2 ** 24
DELIMITERS = {',': 'commas', ';': 'semicolons', '\t': 'tabs', '|': 'bars'}


class Row(NamedTuple):
  """where: 'line 7' (from 1, the first of its lines) or 'entry 7'; fields: {column: value}, strings, or lists of strings from
  JSON; reason: why it cannot be read, '' if it can."""
  where: str
  fields: dict[str, str | list[str]]
  reason: str = ''


@dataclasses.dataclass(frozen=True)
class Table:
  """columns: names as `plain` gives them; account: lines and rows of the file, in words, which add up."""
  path: str
  rows: list[Row]
  columns: list[str]
  account: str


@functools.lru_cache(1024)
def plain(name: str) -> str:
  """A column's name without what people vary: ' # YouTube ID' is 'youtube_id'."""
  return re.sub(r'[\s-]+', '_', name.strip().lstrip('#').strip().lower())


def read_table(path, key: str, others: Sequence[str] = (), *, header: Sequence[str] = ()) -> Table:
  """Reads a table.

  Args:
    path: CSV (delimited by commas, semicolons, tabs or bars, as its header shows), JSON lines or JSON.
    key: the column that names a row's file.
    others: further columns that will be used; as `key`, they may stand in the header once only.
    header: names of the columns, for a table that has no header.

  Raises:
    UserError: the file as a whole is none of these.
  """
  path = str(path)
  text = read_text(path)
  wanted = [plain(name) for name in (key, *others)]
  if text.lstrip()[:1] in ('{', '[') or path.lower().endswith(('.json', '.jsonl', '.ndjson')):
    found, account = json_rows.read(text, path)
    rows = [_json_row(where, value, reason, wanted) for where, value, reason in found]
    return Table(path, rows, sorted({name for row in rows for name in row.fields}), account)
  return _read_csv(split_lines(text), path, wanted, [plain(name) for name in header])


def _json_row(where: str, value, reason: str, wanted: list[str]) -> Row:
  if reason:
    return Row(where, {}, reason)
  fields = {}
  for name, content in value:
    name = plain(name)
    if name in wanted and name in fields:
      return Row(where, {}, f'{name} stands in it twice')
    if isinstance(content, int | float) and not isinstance(content, bool):
      content = str(content)
    if isinstance(content, str) or isinstance(content, list) and all(isinstance(text, str) for text in content):
      fields[name] = content
    elif name not in wanted:
      fields.setdefault(name, '')
    elif content is not None:
      return Row(where, {}, f'{name} must be a string or a list of strings')
  return Row(where, fields, _unusable(fields, wanted))


def _unusable(fields: dict, wanted: list[str]) -> str:
  for name in wanted:
    value = fields.get(name, '')
    text = value if isinstance(value, str) else ''.join(value)
    if '\0' in text:
      return f'{name} contains a NUL character'
    try:
      text.encode()
    except UnicodeEncodeError:  # JSON can spell half a character
      return f'{name} is no valid Unicode'
  return ''


def _read_csv(lines: list[str], path: str, wanted: list[str], header: list[str]) -> Table:
  csv.field_size_limit(MAX_FIELD)
  start = next((i for i, line in enumerate(lines) if line.strip()), len(lines))
  delimiter = _delimiter(lines[start] if lines[start:] else '', wanted, header)
  heads, blank, rows = 0, start, []
  if not header and lines[start:]:
    names, heads, reason = _record(lines, start, delimiter)
    if reason:
      raise UserError(f'{path}: the header cannot be read: {reason}')
    header = [plain(name) for name in names]
  twice = [name for name in wanted if header.count(name) > 1]
  if twice:
    raise UserError(f'{path}: column {twice[0][:50]} stands in the header twice: rename one')
  place = header.index(wanted[0]) if wanted[0] in header else 0
  covered = start + heads
  for at, used, fields, reason in _records(lines, covered, delimiter, len(header), place):
    covered += used
    if fields:
      values = dict(zip(header, fields))
      rows.append(Row(f'line {at + 1}', values, _unusable(values, wanted)))
    elif reason:
      rows.append(Row(f'line {at + 1}', {}, reason))
    else:
      blank += used
  assert covered == len(lines), f'{path}: {covered} of {len(lines)} lines accounted for'
  account = _count(len(lines), 'line') + ': ' + ', '.join(filter(None, [
      heads and f'{heads} of the header', _count(len(rows), 'row') + _over(len(rows), len(lines) - heads - blank),
      blank and f'{blank} blank']))
  return Table(path, rows, header, account)


def _count(number: int, what: str) -> str:
  return f'{number:,} {what}' + 's' * (number != 1)


def _over(rows: int, lines: int) -> str:
  return f' over {_count(lines, "line")}' if lines != rows else ''


def _delimiter(line: str, wanted: list[str], header: list[str]) -> str:
  """That which makes most of the wanted columns of a header, then most columns."""
  def score(delimiter):
    fields = _fields(line, delimiter)
    return (len(fields) == len(header) if header else len({plain(name) for name in fields} & set(wanted)), len(fields))
  return max(DELIMITERS, key=score)


def _fields(line: str, delimiter: str) -> list[str]:
  """Of a line alone, whatever its quotes."""
  try:
    return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
  except csv.Error:
    return []


def _records(lines: list[str], start: int, delimiter: str, width: int,
             place: int) -> Iterator[tuple[int, int, list[str] | None, str]]:
  """-> (index of its first line, number of its lines, fields or None, reason) of every record from line `start`.

  A record that cannot be read is its first line alone, and the lines after it are read as rows of their own: a quote that is
  never closed, or closed by another stray one many rows later, takes no other rows with it.
  """
  while start < len(lines):
    fields, used, reason = _record(lines, start, delimiter)
    if fields and len(fields) != width:
      reason = f'{len(fields)} fields where the header has {width} (quote captions that contain {DELIMITERS[delimiter]})'
    if fields and used > 1 and not reason:
      inside = next((i for i in range(start + 1, start + used) if _is_row(lines[i], fields, delimiter, width, place)), None)
      if inside is not None:
        reason = (f'a quote (") that opens here is closed only after line {inside + 1}, which looks like a row: '
                  'remove or double it')
    if reason:
      fields, used = None, 1
    yield start, used, fields, reason
    start += used


def _record(lines: list[str], start: int, delimiter: str) -> tuple[list[str] | None, int, str]:
  """-> fields, or None; number of lines; why it cannot be read."""
  spaced = delimiter != '\t' and re.search(re.escape(delimiter) + ' +"', lines[start])
  reader = csv.reader((lines[i] for i in range(start, len(lines))), delimiter=delimiter, strict=True,
                      skipinitialspace=bool(spaced))  # after a space, csv takes quotes for text
  try:
    return next(reader), reader.line_num, ''
  except csv.Error as error:
    return None, 1, _quoting(str(error))


def _quoting(error: str) -> str:
  if 'unexpected end' in error:
    return 'a quote (") that opens here is never closed'
  if 'field larger' in error:
    return f'a field of more than {MAX_FIELD:,} characters (is a quote not closed?)'
  return 'text stands after a closing quote (double the quotes inside a quoted field)'


def _is_row(line: str, record: list[str], delimiter: str, width: int, place: int) -> bool:
  """A line inside quotes that would be a row by itself: as many fields, and a recording's name, or one like the record's."""
  fields = _fields(line, delimiter)
  if len(fields) != width:
    return False
  name = fields[place].strip()
  ending, own = (posixpath.splitext(text)[1].lower() for text in (name, record[place]))
  return ending in ENDINGS or bool(name) and ending == own and bool(ending or not re.search(r'\s', name))
