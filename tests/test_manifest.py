"""Manifests: what becomes of every row, and what is said of wrong ones."""
import json

import pytest

from m2d_clap_jax.data.captions import label_caption
from m2d_clap_jax.data.manifest import read_manifest
from m2d_clap_jax.errors import UserError


def read(tmp_path, text, name='m.csv'):
  path = tmp_path / name
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  return read_manifest(path, '/root')


def by_name(rows):
  return {(row.split, row.file_name): row for row in rows}


def test_label_captions_are_those_of_the_authors_data_preparation():
  assert label_caption(['A']) == 'The sound of A.'
  assert label_caption(['A', 'B']) == 'The sound of A, and B.'
  assert label_caption(['A', 'B', 'C']) == 'The sound of A, B, and C.'
  with pytest.raises(ValueError):
    label_caption([])


def test_rows_of_one_file_become_its_captions_without_repetitions(tmp_path):
  rows = read(tmp_path, 'file_name,caption,other,label\na.wav,"one, two",x,"flute, pipe"\nb.wav,b,x,\n'
                        './x/../a.wav,three,x,flute\na.wav,three,x,\n')
  assert [(r.file_name, r.captions, r.labels, r.split, r.rows) for r in rows] == [
      ('a.wav', ['one, two', 'three'], ['flute', 'pipe'], 'train', 3), ('b.wav', ['b'], [], 'train', 1)]


def test_a_file_in_two_splits_is_a_clip_of_each(tmp_path):
  rows = by_name(read(tmp_path, 'split,file_name,label\ntrain,a.wav,x\ntest,a.wav,x\n'))
  assert set(rows) == {('train', 'a.wav'), ('test', 'a.wav')}


def test_json_lines_take_lists_and_strings(tmp_path):
  lines = [{'file_name': 'a', 'captions': ['one', 'two'], 'labels': ['x, y']},
           {'file_name': 'b', 'caption': 'c', 'label': 'x,y'}]
  a, b = read(tmp_path, '\n'.join(map(json.dumps, lines)), 'm.jsonl')
  assert (a.captions, a.labels, b.captions, b.labels) == (['one', 'two'], ['x, y'], ['c'], ['x', 'y'])


def test_unusable_rows_come_back_with_a_reason(tmp_path):
  rows = read(tmp_path, 'file_name,caption,split\na.wav,one, two,train\n,c,train\nb.wav,c,\n'
                        '../b.wav,c,test\n/etc/passwd,c,test\nok,c,test\n')
  reasons = {row.file_name: row.reason for row in rows}
  assert reasons == {'(line 2)': 'line 2: 4 fields where the header has 3 (quote captions that contain commas)',
                     '(line 3)': 'line 3: no file_name', 'b.wav': 'line 4: no split',
                     '../b.wav': 'path is outside the audio root', '/etc/passwd': 'path is outside the audio root',
                     'ok': ''}
  assert sum(row.rows for row in rows) == 6


def test_unusable_json_lines_come_back_with_a_reason(tmp_path):
  rows = read(tmp_path, '{"file_name": "a"}\nnonsense\n{"file_name": true}\n{"file_name": "b", "captions": [1]}\n'
                        '{"file_name": "c", "caption": "\\ud800"}\n', 'm.jsonl')
  assert [bool(row.reason) for row in rows] == [False, True, True, True, True]


def test_captions_of_ten_thousand_words_are_kept(tmp_path):
  long = ' '.join(['word'] * 10_000 + ['x' * 200_000])
  assert read(tmp_path, f'file_name,caption\na,{long}\n')[0].captions == [long]


@pytest.mark.parametrize('text, told', [
    ('name,caption\na,b\n', ['name, caption', 'expected file_name']),
    ('file_name,split\na,b\n', ['file_name, split', 'caption and/or label']),
    ('file_name,caption,caption\na,b,c\n', ['twice']),
    ('', ['columns are none']),
    ('file_name,caption\n', ['no rows']),
    ('file_name,caption\na,\xe9\n'.encode('latin1'), ['not UTF-8']),
    ('file_name,caption,split\na,b,../x\n', ["split '../x'"]),
])
def test_wrong_manifests_are_told_in_one_line(tmp_path, text, told):
  with pytest.raises(UserError) as e:
    read(tmp_path, text)
  assert 'm.csv' in str(e.value) and '\n' not in str(e.value)
  assert all(part in str(e.value) for part in told), str(e.value)


def test_wrong_json_keys_and_missing_manifests_are_told(tmp_path):
  with pytest.raises(UserError, match='columns are caption, path; expected file_name'):
    read(tmp_path, '{"path": "a", "caption": "b"}', 'm.jsonl')
  with pytest.raises(UserError, match='none.csv: cannot be read'):
    read_manifest(tmp_path / 'none.csv', '/root')


def test_byte_order_marks_and_windows_line_ends_do_no_harm(tmp_path):
  assert read(tmp_path, b'\xef\xbb\xbffile_name,caption\r\na,b\r\n')[0].captions == ['b']
