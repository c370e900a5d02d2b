"""Bytes of a table -> text, or the name of what they are instead."""
import codecs
import io
import os

from m2d_clap_jax.errors import UserError
from m2d_clap_jax.paths import as_path, is_remote, read_bytes

# Longest first: the mark of UTF-32 begins with that of UTF-16.
MARKS = ((codecs.BOM_UTF32_LE, 'utf-32'), (codecs.BOM_UTF32_BE, 'utf-32'), (codecs.BOM_UTF8, 'utf-8-sig'),
         (codecs.BOM_UTF16_LE, 'utf-16'), (codecs.BOM_UTF16_BE, 'utf-16'))
OTHERS = ((b'PK\x03\x04', 'an Excel workbook (.xlsx) or another zip archive: save the sheet as CSV, or unpack it'),
          (b'\xd0\xcf\x11\xe0', 'an old Excel workbook (.xls): save the sheet as CSV'),
          (b'\x1f\x8b', 'compressed by gzip: unpack it'), (b'PAR1', 'a Parquet file: write it as CSV or JSON lines'),
          (b'%PDF', 'a PDF file: give a CSV'), (b'SQLite format 3', 'an SQLite database: export a CSV'),
          (b'version https://git-lfs', 'a pointer of Git LFS: fetch the file itself by `git lfs pull`'))


def read_text(path) -> str:
  """A table's text. UTF-8, or UTF-16 and UTF-32 with their byte order mark.

  Raises:
    UserError: it cannot be read, or is of another kind, which is named.
  """
  _refuse_endless(path)
  try:
    data = read_bytes(path)
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror or error}): check its name') from error
  for magic, kind in OTHERS:
    if data.startswith(magic):
      raise UserError(f'{path}: is {kind}')
  if data[:200].lstrip().lower().startswith((b'<!doctype html', b'<html')):
    raise UserError(f'{path}: is a web page: fetch the table itself (often its "raw" or "download" link)')
  encoding = next((name for mark, name in MARKS if data.startswith(mark)), 'utf-8')
  try:
    return data.decode(encoding)
  except UnicodeDecodeError as error:
    line = data.count(b'\n', 0, error.start) + 1
    raise UserError(f'{path}: line {line} is not {encoding.upper().removesuffix("-SIG")}{_looks_like(data, encoding)}: '
                    'save it as UTF-8') from error


def _refuse_endless(path):
  """A folder, or a pipe or device, which might be waited for without end; a pipe of the shell's own (<(...)) is read."""
  if is_remote(path):
    return
  name = os.fspath(as_path(path))
  if os.path.isdir(name):
    raise UserError(f'{path}: is a folder: name a table in it, or with --like the published data set that it is')
  if os.path.exists(name) and not os.path.isfile(name) and not name.startswith(('/dev/fd/', '/dev/stdin', '/proc/')):
    raise UserError(f'{path}: is a pipe or device: save it as a file')


def _looks_like(data: bytes, encoding: str) -> str:
  if encoding != 'utf-8':
    return ', though its byte order mark says so'
  if data.count(0) > len(data) // 5:
    return ' and looks like UTF-16 without a byte order mark'
  try:
    data.decode('cp1252')
  except UnicodeDecodeError:
    return ' (byte order mark: none)'
  return ' and looks like Latin-1 or Windows-1252'


def split_lines(text: str) -> list[str]:
  """Lines with their ends, which are \\n, \\r\\n or \\r alone (str.splitlines knows more, which captions may hold)."""
  return list(io.StringIO(text, newline=''))
