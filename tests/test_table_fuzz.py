"""Mutated tables: an error of one line or counts that add up, never a traceback, a hang or a lost row."""
import csv
import io
import json

import numpy as np
import pytest

from m2d_clap_jax.data.manifest import read_manifest
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.tables.reader import read_table
from m2d_clap_jax.tasks.metadata import read_metadata

PIECES = [b'"', b'""', b',', b';', b'\t', b'\n', b'\r', b'\r\n', b'\0', b'\xff', b'\xef\xbb\xbf', b'\xff\xfe', b'../', b'/', b'{',
          b'[', b'}', b']', b'\\', b'\\ud800', b'null', b'file_name', b'caption', b'label', b'split', b'train', b'val', b'all',
          'e\u0301'.encode(), b'\xe9', b' ', b'[' * 2000, b'1e999', b'PK\x03\x04', b'"x\ny.wav,z"', b'a.wav']


def rows(rng, kind):
  """A good table of some rows, as bytes."""
  names = ['file_name', 'label', 'caption', 'split' if kind != 'folds' else 'fold']
  parts = ['1', '2', '3'] if kind == 'folds' else ['train', 'valid', 'test']
  found = [[f'{i}.wav', rng.choice(['dog', 'dog,rain', 'a "b"']), rng.choice(['it barks', 'two, three', 'line\nline']),
            rng.choice(parts)] for i in range(int(rng.integers(1, 12)))]
  found = [[str(field) for field in row] for row in found]
  if kind == 'json':
    return '\n'.join(json.dumps(dict(zip(names, row))) for row in found).encode()
  text = io.StringIO(newline='')
  csv.writer(text, delimiter=str(rng.choice([',', ';', '\t']))).writerows([names, *found])
  return text.getvalue().encode(str(rng.choice(['utf-8', 'utf-8-sig', 'utf-16'])))


def mutate(rng, data):
  for _ in range(int(rng.integers(1, 5))):
    place, kind = int(rng.integers(len(data) + 1)), int(rng.integers(4))
    length = int(rng.integers(1, 30))
    piece = PIECES[rng.integers(len(PIECES))]
    data = [data[:place] + piece + data[place:], data[:place] + data[place + length:], data[:place],
            data[:place] + bytes(rng.integers(256, size=1, dtype=np.uint8)) + data[place + 1:]][kind]
  return data


@pytest.mark.parametrize('kind', ['splits', 'json', 'folds'])
def test_of_mutated_tables_every_row_is_accounted_for(kind, tmp_path):
  rng = np.random.default_rng(17)
  outcomes = {'read': 0, 'refused': 0}
  for i in range(100 if kind == 'json' else 200):
    path = tmp_path / f'{i}.{"jsonl" if kind == "json" else "csv"}'
    path.write_bytes(mutate(rng, rows(rng, kind)))
    for read in (read_manifest, read_metadata):
      try:
        found = read(path, str(tmp_path))
      except UserError as error:
        assert '\n' not in str(error) and len(str(error)) < 2000
        outcomes['refused'] += 1
        continue
      outcomes['read'] += 1
      table = read_table(path, 'file_name', ['label', 'caption', 'split', 'fold'])
      if read is read_manifest:
        assert sum(row.rows for row in found) == len(table.rows)
        assert all(row.reason or row.rows for row in found)
      else:
        assert len(found) <= len(table.rows) and not any(row.reason for row in table.rows)
  assert min(outcomes.values()) > 20, outcomes
