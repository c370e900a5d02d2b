"""Whether a run continues with the data that it began with: one check for every kind of training.

A run records a description of each part of its data, which are prepared folders or, in fine-tuning, single clips. Data that
change what a step is (other numbers, other classes) are refused; other contents are reported, and the run continues: a copy of
the same files may have other dates, and whether a corrected caption matters is for the user to say.
"""
import json
import sys
from collections.abc import Sequence

import jax

from m2d_clap_jax import fields
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.paths import read_bytes, write_text

RECORD = 'data.json'
# Of fine-tuning, in whose workdir several trainings have the same data. parts: as `check_parts` takes them.
SCHEMA = {'norm_stats': (fields.number(), fields.number()), 'classes': [fields.text()],
          'parts': {'file': [fields.text()], 'labels': [fields.text()], 'part': [fields.text()], 'bytes': [fields.whole()],
                    'modified': [fields.text()]}}


def refuse_other(place, what: str, now, before):
  """UserError where `now`, which is `what` of the data at `place`, is not what the run began with."""
  if now != before:
    raise UserError(f'{place}: {what}: {now}, where the run in this --workdir began with {before}: give it those data again, or '
                    'use another --workdir')


def check_parts(kind: str, place, names: Sequence[str], now: dict[str, list], before: dict[str, list], keeps: str):
  """Reports, in one line, parts of the data that are not those that a run began with.

  Args:
    kind: of part, for the message: 'folders' or 'clips'.
    place: of all parts.
    names: of the parts, for the message.
    now, before: {property: its value for each part}.
    keeps: what the run keeps all the same, for the message.

  Raises:
    UserError: there are more or fewer parts.
  """
  rows, known = list(zip(*now.values())), list(zip(*before.values()))
  refuse_other(place, f'number of {kind}', len(rows), len(known))
  changed = [i for i, (row, was) in enumerate(zip(rows, known)) if row != was]
  if not changed or jax.process_index():
    return
  first = changed[0]
  differs = ', '.join(f'{name} {new} instead of {old}' for name, new, old in zip(now, rows[first], known[first]) if new != old)
  more = f', and {len(changed) - 1:,} more' if len(changed) > 1 else ''
  print(f'notice: {place}: not all data are those that the run in this --workdir began with: {names[first]} has {differs}{more}; '
        f'it keeps {keeps}', file=sys.stderr)


def read_record(workdir, evidence: Sequence[str]) -> dict:
  """What fine-tuning recorded in its workdir; {} unless a training there has saved something.

  evidence: patterns of what it saves.
  """
  if not any(any(workdir.glob(pattern)) for pattern in evidence):
    return {}
  try:
    content = read_bytes(workdir / RECORD)
  except FileNotFoundError:
    return {}
  return fields.parse(content, SCHEMA, workdir / RECORD, 'restore it, or use another --workdir')


def write_record(workdir, record: dict):
  """Records it, by the first process of the run."""
  if not jax.process_index():
    write_text(workdir / RECORD, json.dumps(fields.sealed(record)) + '\n')
