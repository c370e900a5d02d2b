"""The one reader of tables: what it reads, what it refuses by name, and that no line is lost."""
import json
import os
import unicodedata

import pytest
import soundfile

from m2d_clap_jax.data.manifest import read_manifest
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.tables.reader import read_table
from m2d_clap_jax.tables.text import read_text
from m2d_clap_jax.tasks.metadata import open_task, read_metadata
from m2d_clap_jax.tasks.names import read_names
from tests.command_helpers import run
from tests.prepare_helpers import RATE, noise

ROWS = [('a.wav', 'a dog, barking', '1'), ('ü.wav', 'rain; "wet"', '2')]


def put(tmp_path, content, name='t.csv'):
  path = tmp_path / name
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return path


def read(tmp_path, content, name='t.csv', **options):
  """-> ([fields of good rows], {where: reason}, account)."""
  table = read_table(put(tmp_path, content, name), 'file_name', ['caption', 'label', 'split', 'fold'], **options)
  return ([row.fields for row in table.rows if not row.reason],
          {row.where: row.reason for row in table.rows if row.reason}, table.account)


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-32'])
@pytest.mark.parametrize('delimiter', [',', ';', '\t', '|'])
@pytest.mark.parametrize('end', ['\n', '\r\n', '\r'])
def test_delimiters_encodings_and_line_ends_are_read_by_what_the_file_shows(tmp_path, encoding, delimiter, end):
  lines = [delimiter.join(['File Name', ' CAPTION', 'fold '])]
  lines += [delimiter.join([name, '"' + caption.replace('"', '""') + '"', fold]) for name, caption, fold in ROWS]
  good, bad, account = read(tmp_path, (end.join(lines) + end).encode(encoding))
  assert [tuple(row.values()) for row in good] == ROWS and not bad
  assert list(good[0]) == ['file_name', 'caption', 'fold'] and account == '3 lines: 1 of the header, 2 rows'


@pytest.mark.parametrize('content, told', [
    (b'PK\x03\x04' + bytes(99), 'an Excel workbook (.xlsx)'),
    (b'\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1', 'an old Excel workbook (.xls)'),
    (b'\x1f\x8b\x08', 'compressed by gzip'), (b'PAR1abc', 'a Parquet file'),
    (b'version https://git-lfs.github.com/spec/v1\noid', 'git lfs pull'),
    (b'\n<!DOCTYPE html><html>', 'a web page'),
    ('file_name,caption\nx,y\na,é\n'.encode('latin1'), 'line 3 is not UTF-8 and looks like Latin-1 or Windows-1252'),
    ('file_name,caption\na,é\n'.encode('utf-16-le'), 'looks like UTF-16 without a byte order mark'),
    (b'\xff\xfea', 'is not UTF-16, though its byte order mark says so'),
])
def test_what_is_no_text_table_is_refused_by_the_name_of_what_it_is(tmp_path, content, told):
  with pytest.raises(UserError) as e:
    read_manifest(put(tmp_path, content), tmp_path)
  assert told in str(e.value) and 't.csv' in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('content, good, bad', [
    ('a.wav,"dog\nb.wav,x\nc.wav,x\nd.wav,x\n', ['b.wav', 'c.wav', 'd.wav'], {'line 2': 'is never closed'}),
    ('a.wav,"dog\nb.wav,x\nc.wav,x"\nd.wav,x\n', ['b.wav', 'c.wav', 'd.wav'], {'line 2': 'closed only after line 3'}),
    ('a.wav,"dog\nb.flac,x\nc.wav,x"\n', ['b.flac', 'c.wav'], {'line 2': 'closed only after line 3'}),
    ('a.wav,"dog" barks\nb.wav,x\n', ['b.wav'], {'line 2': 'text stands after a closing quote'}),
    ('a.wav,dog, barks\nb.wav\nc.wav,x\n', ['c.wav'], {'line 2': '3 fields where the header has 2', 'line 3': '1 fields'}),
    ('a.wav,"dog\nb.wav,x\n"c.wav,"x"\n', ['b.wav'], {'line 2': 'text stands after', 'line 4': 'text stands after'}),
    ('a\0.wav,dog\nb.wav,x\n', ['b.wav'], {'line 2': 'file_name contains a NUL character'}),
    ('a.wav,"two\nlines, or more"\n', ['a.wav'], {}),
    ('a.wav, "dog, cat"\n\n"b.wav", 5" nails\n', ['a.wav', 'b.wav'], {}),
])
def test_no_row_is_lost_in_quotes(tmp_path, content, good, bad):
  found, reasons, account = read(tmp_path, 'file_name,caption\n' + content)
  assert [row['file_name'] for row in found] == good
  assert reasons.keys() == bad.keys() and all(told in reasons[where] for where, told in bad.items())
  assert account.startswith(f'{content.count(chr(10)) + 1} lines: 1 of the header, {len(good) + len(bad)} row')


def test_an_unclosed_quote_costs_its_own_row_and_the_counts_say_so(tmp_path, capsys):
  for i in range(6):
    soundfile.write(tmp_path / f'{i}.wav', noise(0.05), RATE)
  table = put(tmp_path, 'file_name,caption\n0.wav,"a dog\n' + ''.join(f'{i}.wav,x\n' for i in range(1, 6)))
  assert run('prepare', f'--manifest={table}', f'--out={tmp_path}/out', '--text_encoder=none', '--workers=1') == 0
  out = capsys.readouterr().out
  assert '7 lines: 1 of the header, 6 rows' in out and 'rows: 6 = 5 written + 1 rejected' in out
  assert 'line 2: a quote ("") that opens here is never closed' in (tmp_path / 'out/rejected.csv').read_text()


def test_a_field_may_be_long_but_not_endless(tmp_path):
  found, reasons, _ = read(tmp_path, f'file_name,caption\na.wav,{"x" * 2 ** 20}\nb.wav,{"x" * (2 ** 24 + 1)}\nc.wav,x\n')
  assert [row['file_name'] for row in found] == ['a.wav', 'c.wav'] and 'more than 16,777,216' in reasons['line 3']


LINES = [{'file_name': 'a.wav', 'caption': 'x'}, {'file_name': 'b.wav', 'captions': ['y', 'z'], 'fold': 2}]


@pytest.mark.parametrize('content', [
    '\n'.join(map(json.dumps, LINES)), json.dumps(LINES), json.dumps(LINES, indent=2),
    '\n'.join(json.dumps(line, indent=2) for line in LINES), json.dumps({'count': 2, 'data': LINES})])
def test_json_is_read_however_it_is_printed(tmp_path, content):
  good, bad, account = read(tmp_path, content, 't.json')
  assert good == [LINES[0], LINES[1] | {'fold': '2'}] and not bad and account.startswith('2 ')


@pytest.mark.parametrize('content, bad', [
    ('{"file_name": "a.wav"\n{"file_name": "b.wav"}\n', {'line 1': 'not a JSON object'}),
    ('{"file_name": "b.wav"}\n{"file_name": "a", "file_name": "c"}\n', {'line 2': 'file_name stands in it twice'}),
    ('{"file_name": "b.wav"}\n{"file_name": "a", "x": ' + '[' * 99999 + ']' * 99999 + '}\n', {'line 2': 'nested too deeply'}),
    ('{"file_name": "b.wav"}\n{"file_name": "\\ud800"}\n', {'line 2': 'no valid Unicode'}),
    ('{"file_name": "b.wav"}\n{"file_name": {"a": 1}}\n[]\n', {'line 2': 'must be a string', 'line 3': 'not a JSON object'})])
def test_broken_json_lines_are_rejected_alone(tmp_path, content, bad):
  good, reasons, _ = read(tmp_path, content, 't.jsonl')
  assert good == [{'file_name': 'b.wav'}]
  assert reasons.keys() == bad.keys() and all(told in reasons[where] for where, told in bad.items())


@pytest.mark.parametrize('content, told', [
    ('[{"file_name": "a.wav"},\n {"file_name": }]', 'is one JSON array, and damaged'),
    ('[' * 99999, 'is one JSON array, and damaged (nested too deeply)'),
    ('{\n  "file_name": "a.wav",\n  "caption"\n}\n', 'is no JSON lines: no line is an object by itself'),
    ('{"a.wav": {"caption": "x"}}', 'columns are a.wav; expected file_name')])
def test_json_that_is_no_table_is_refused_by_what_it_is(tmp_path, content, told):
  with pytest.raises(UserError) as e:
    read_manifest(put(tmp_path, content, 't.json'), tmp_path)
  assert told in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('rows, told', [
    ('fold,label\na.wav,1,dog,bark\n', 'line 2: 4 fields where the header has 3'),
    ('label,split\na.wav,dog\n', 'line 2: 2 fields where the header has 3'),
    ('label,label,split\na.wav,dog,cat,test\n', 'column label stands in the header twice'),
    ('label,split\n../a.wav,dog,test\n', 'line 2: ../a.wav: path is outside the audio root'),
    ('label,split\n/etc/a.wav,dog,test\n', 'line 2: /etc/a.wav: path is outside the audio root'),
    ('label,split\na.wav,dog,train\n./x/../a.wav,dog,test\n', 'line 3: a.wav was in train above and is in test'),
])
def test_a_task_is_guarded_as_a_manifest_is(rows, told, tmp_path):
  with pytest.raises(UserError, match=told):
    read_metadata(str(put(tmp_path, 'file_name,' + rows)), str(tmp_path))


def test_display_names_are_guarded_too(tmp_path):
  head = 'index,mid,display_name\n'
  assert read_names(str(put(tmp_path, head + '0,/m/1,"Dog, bark"\n'))) == {'/m/1': 'Dog, bark'}
  for rows, told in (('0,/m/1,Dog, bark\n', 'line 2: 4 fields'), ('0,/m/1,Dog\n1,/m/1,Cat\n', 'line 3: /m/1 was Dog above'),
                     ('0,/m/1,\n', 'line 2: mid or display_name is empty')):
    with pytest.raises(UserError, match=told):
      read_names(str(put(tmp_path, head + rows)))


@pytest.mark.parametrize('there, meant', [('NFC', 'NFD'), ('NFD', 'NFC')])
def test_a_name_that_looks_the_same_is_matched_and_told(tmp_path, there, meant, capsys):
  there, meant = (unicodedata.normalize(form, 'é/grün.wav') for form in (there, meant))
  (tmp_path / there).parent.mkdir()
  (tmp_path / there).write_bytes(b'x')
  table = put(tmp_path, f'file_name,label,split\n{meant},dog,test\n', 'esc50.csv')
  assert [row.file_name for row in read_manifest(table, tmp_path)] == [there]
  assert [clip.file for clip in open_task('esc50', str(tmp_path)).clips] == [there]
  assert capsys.readouterr().err.count('1 names differ from those of the files in Unicode normalisation alone') == 2


def test_two_files_stay_two_however_alike_their_names_are(tmp_path):
  names = [unicodedata.normalize(form, 'grün.wav') for form in ('NFC', 'NFD')] + ['a.wav', ' a.wav', 'A.wav']
  for name in names:
    (tmp_path / name).write_bytes(b'x')
  table = put(tmp_path, 'file_name,label,split\n' + ''.join(f'{name},dog,test\n' for name in names), 'esc50.csv')
  assert [row.file_name for row in read_manifest(table, tmp_path)] == names
  assert [clip.file for clip in open_task('esc50', str(tmp_path)).clips] == names


def test_a_table_that_is_not_there_is_told(tmp_path):
  os.mkfifo(tmp_path / 'pipe.csv')
  for path, told in ((tmp_path / 'none.csv', 'cannot be read .*: check its name'), (tmp_path, 'is a folder: name a table in it'),
                     (tmp_path / 'pipe.csv', 'is a pipe or device'), ('/dev/zero', 'is a pipe or device')):
    with pytest.raises(UserError, match=told):
      read_text(path)
  reader, writer = os.pipe()
  with open(writer, 'w') as pipe:
    pipe.write('file_name,caption\na.wav,x\n')
  assert read_text(f'/dev/fd/{reader}').endswith('a.wav,x\n')
  os.close(reader)
