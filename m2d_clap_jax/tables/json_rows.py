"""JSON as tables: one object a line, one array of objects, one object that contains such an array, or objects pretty-printed."""
import json

from m2d_clap_jax.errors import UserError
from m2d_clap_jax.tables.text import split_lines


class _Damaged(ValueError):
  """Text that is no JSON."""


class _Pairs(list):
  """An object as its (key, value) pairs, in which a key may stand twice."""


def read(text: str, path: str) -> tuple[list[tuple[str, object, str]], str]:
  """-> [(where, [(key, value)] of an object, reason)] and the file's lines or entries in words.

  Raises:
    UserError: the file as a whole is no such JSON.
  """
  try:
    whole = _parse(text)
  except _Damaged as error:
    if text.lstrip().startswith('['):
      raise UserError(f'{path}: is one JSON array, and damaged ({error}): mend it, or write one object a line') from error
    return _lines(text, path)
  lists = [value for _, value in whole if _objects(value)] if isinstance(whole, _Pairs) else []
  if not isinstance(whole, _Pairs):
    entries = whole if isinstance(whole, list) else [whole]
  else:
    entries = lists[0] if len(lists) == 1 else [whole]
  found = [_object(f'entry {i}', value) for i, value in enumerate(entries, 1)]
  return found, f'{len(found):,} entries of JSON'


def _parse(text: str):
  try:
    return json.loads(text, object_pairs_hook=_Pairs)
  except RecursionError as error:
    raise _Damaged('nested too deeply') from error
  except ValueError as error:
    raise _Damaged(str(error)) from error


def _objects(value) -> bool:
  return isinstance(value, list) and not isinstance(value, _Pairs) and bool(value) and all(
      isinstance(entry, _Pairs) for entry in value)


def _object(where: str, value) -> tuple[str, object, str]:
  return (where, value, '') if isinstance(value, _Pairs) else (where, None, 'not a JSON object')


def _lines(text: str, path: str) -> tuple[list[tuple[str, object, str]], str]:
  found, blank, good, error = [], 0, 0, None
  lines = split_lines(text)
  for number, line in enumerate(lines, 1):
    if not line.strip():
      blank += 1
      continue
    try:
      found.append(_object(f'line {number}', _parse(line)))
      good += found[-1][1] is not None
    except _Damaged as problem:
      error = error or problem
      found.append((f'line {number}', None, 'nested too deeply' if 'deeply' in str(problem) else 'not a JSON object'))
  if found and not good and text.lstrip().startswith('{'):
    return _sequence(text, path, error)
  return found, f'{len(lines):,} lines: {len(found):,} rows' + (f', {blank} blank' if blank else '')


def _sequence(text: str, path: str, error) -> tuple[list[tuple[str, object, str]], str]:
  """Objects one after the other, each over several lines."""
  decoder = json.JSONDecoder(object_pairs_hook=_Pairs)
  found, place = [], 0
  try:
    while place < len(text):
      if text[place].isspace():
        place += 1
        continue
      value, place = decoder.raw_decode(text, place)
      found.append(_object(f'entry {len(found) + 1}', value))
  except (ValueError, RecursionError):
    raise UserError(f'{path}: is no JSON lines: no line is an object by itself ({error}); write each object on one line, '
                    'or all as one JSON array') from None
  return found, f'{len(found):,} entries of JSON'
