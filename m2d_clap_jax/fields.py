"""JSON data of files, checked before anything is made of them: types, ranges, and a checksum of their own.

A schema is a tree like the data. {key: schema} is an object; {str: schema} one of any keys; [schema] a list of any
length; (schema, schema) one of that length; a Rule a value. Keys that a schema does not name are left alone, as a later
version may have written them.
"""
import json
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import google_crc32c

from m2d_clap_jax.errors import UserError

CHECKSUM = 'checksum'


class Rule(NamedTuple):
  """What a single value must be."""
  expected: str  # in words
  fits: Callable[[Any], bool]


class Optional(NamedTuple):
  """The key may be missing."""
  schema: Any


class Nullable(NamedTuple):
  """The value may be null."""
  schema: Any


def whole(low: int = 0, high: int = 2 ** 53) -> Rule:
  """A whole number within bounds, both included."""
  return Rule(f'a whole number from {low} to {high}',
              lambda value: isinstance(value, numbers.Integral) and not isinstance(value, bool) and low <= value <= high)


def number(low: float = -1e30, high: float = 1e30) -> Rule:
  """A finite number within bounds, both included."""
  return Rule(f'a number from {low:g} to {high:g}', lambda value: isinstance(value, numbers.Real)
              and not isinstance(value, bool) and low <= value <= high)  # which NaN is not


def text(known: tuple[str, ...] = ()) -> Rule:
  """Any text, or one of those known."""
  return Rule('one of ' + ', '.join(known) if known else 'a text',
              lambda value: isinstance(value, str) and (not known or value in known))


def version(number: int) -> Rule:
  """Exactly this version of a format."""
  return Rule(f'{number}, the format that this version reads', lambda value: isinstance(value, int) and value == number)


FLAG = Rule('true or false', lambda value: isinstance(value, bool))


def check(value, schema, where: str, advice: str, key: str = ''):
  """Raises UserError that names key and value of the first thing that does not fit.

  where, advice: what the message begins with, e.g. 'config.json: ', and what to do.
  """
  def refuse(expected: str):
    shown = json.dumps(value, default=str)
    raise UserError(f'{where}{key or "its content"}={shown[:60]}{"…" * (len(shown) > 60)}: must be {expected}; {advice}')

  def inside(name) -> str:
    return f'{key}.{name}' if key else str(name)
  if isinstance(schema, Nullable):
    if value is not None:
      check(value, schema.schema, where, advice, key)
  elif isinstance(schema, Rule):
    if not schema.fits(value):
      refuse(schema.expected)
  elif isinstance(schema, dict):
    if not isinstance(value, dict):
      refuse('an object')
    for name, part in (dict.fromkeys(value, schema[str]) if str in schema else schema).items():
      if name in value:
        check(value[name], part.schema if isinstance(part, Optional) else part, where, advice, inside(name))
      elif not isinstance(part, Optional):
        raise UserError(f'{where}lacks {inside(name)}; {advice}')
  else:
    if not isinstance(value, list | tuple) or isinstance(schema, tuple) and len(value) != len(schema):
      refuse(f'a list of {len(schema)}' if isinstance(schema, tuple) else 'a list')
    for i, part in enumerate(schema if isinstance(schema, tuple) else schema * len(value)):
      check(value[i], part, where, advice, f'{key}[{i}]')


def sealed(data: dict) -> dict:
  """The same data with their checksum, as `parse` wants it."""
  return data | {CHECKSUM: _checksum(data)}


def parse(content: bytes, schema, file, advice: str) -> dict:
  """The bytes of a JSON file -> its object without the checksum.

  Raises:
    UserError: not JSON, not as the schema says, or not what its checksum belongs to. Files without one are taken.
  """
  try:
    data = json.loads(content)
  except (ValueError, RecursionError) as error:  # RecursionError: of a thousand brackets
    raise UserError(f'{file}: not valid JSON ({error}); {advice}') from None
  check(data, schema, f'{file}: ', advice)
  if not is_sealed(data):
    raise UserError(f'{file}: {CHECKSUM}={str(data[CHECKSUM])[:60]!r}: belongs to other content, so something was damaged; '
                    f'{advice}, or, if you changed it on purpose, delete the line "{CHECKSUM}"')
  return {key: value for key, value in data.items() if key != CHECKSUM}


def is_sealed(data: dict) -> bool:
  """Whether the checksum of data is theirs; True where they have none."""
  return CHECKSUM not in data or data[CHECKSUM] == _checksum(data)


def _checksum(data: dict) -> str:
  content = {key: value for key, value in data.items() if key != CHECKSUM}
  return checksum(json.dumps(content, sort_keys=True).encode())


def checksum(content: bytes) -> str:
  """CRC-32C as 8 hex digits."""
  return f'{google_crc32c.value(content):08x}'


def checksum_of_file(path) -> str:
  """The same of a local file, of which little is in memory at a time."""
  crc = 0
  with open(path, 'rb') as file:
    while chunk := file.read(1 << 24):
      crc = google_crc32c.extend(crc, chunk)
  return f'{crc:08x}'
