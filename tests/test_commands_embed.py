"""`m2d-clap embed`: what is written equals the Pipeline, and no file can lose the rest."""
import csv
import json
import os

import numpy as np
import pyarrow.parquet
import pytest
import soundfile

import m2d_clap_jax
from benchmarks.recordings import encode
from m2d_clap_jax.audio import decode, files
from m2d_clap_jax.cli import embedding_files
from tests.command_helpers import run, save_model, save_recordings


@pytest.fixture(scope='module')
def here(tmp_path_factory):
  """A folder with model/ and audio/; `here.usable`, `here.model` (Pipeline)."""
  class Here:
    root = tmp_path_factory.mktemp('embed')
    folder = save_model(root / 'model')
    usable = save_recordings(root / 'audio')
    model = m2d_clap_jax.load(folder)
  return Here


def embed(here, out, *options, paths=None):
  return run('embed', *(paths or [here.root / 'audio']), '--model', here.folder, '-o', out, *options)


def close(actual, expected):
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize('options,method', [([], 'embed'), (['--clap'], 'encode_audio')])
def test_clip_embeddings_of_a_folder_equal_the_pipeline_in_both_formats(here, options, method, tmp_path):
  assert embed(here, tmp_path / 'x.npz', *options) == embed(here, tmp_path / 'x.parquet', *options) == 0
  expected = getattr(here.model, method)(here.usable)
  data = np.load(tmp_path / 'x.npz')
  assert list(data['files']) == here.usable
  close(data['embeddings'], expected)
  about = json.loads(str(data['about']))
  assert about['fingerprint'] == here.model.fingerprint and about['kind'] == ('clap' if options else 'clip')
  table = pyarrow.parquet.read_table(tmp_path / 'x.parquet')
  assert table['file'].to_pylist() == here.usable
  assert json.loads(table.schema.metadata[b'm2d_clap_jax']) == about
  np.testing.assert_array_equal(np.stack(table['embedding'].to_numpy()), data['embeddings'])


def test_frames_and_their_times_equal_the_pipeline_in_both_formats(here, tmp_path, monkeypatch):
  monkeypatch.setattr(embedding_files, 'ROWS', 16)  # several row groups
  assert embed(here, tmp_path / 'x.npz', '--frames') == embed(here, tmp_path / 'x.parquet', '--frames') == 0
  frames, times = here.model.encode_frames(here.usable)
  data = np.load(tmp_path / 'x.npz')
  assert list(data['files']) == here.usable
  for i in range(len(frames)):
    close(data[f'frames/{i}'], frames[i])
    np.testing.assert_allclose(data[f'times/{i}'], times[i])
  with pyarrow.parquet.ParquetFile(tmp_path / 'x.parquet') as file:
    assert file.num_row_groups > 1
  table = pyarrow.parquet.read_table(tmp_path / 'x.parquet')
  assert table['file'].to_pylist() == [name for name, own in zip(here.usable, frames) for _ in own]
  np.testing.assert_array_equal(table['time_ms'], np.concatenate([data[f'times/{i}'] for i in range(len(frames))]))
  np.testing.assert_array_equal(np.stack(table['embedding'].to_numpy()),
                                np.concatenate([data[f'frames/{i}'] for i in range(len(frames))]))


def test_unusable_files_are_told_and_listed_and_lose_nothing(here, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(files, 'STREAM', 'tests.decoders:small_blocks')
  audio = here.root / 'audio'
  cut, text, none = (str(audio / name) for name in ('more/cut.flac', 'more/text.wav', 'none.wav'))
  bad = {cut: 'lost sync', text: 'not readable as audio', none: 'no such file'}
  assert embed(here, tmp_path / 'x.npz', paths=[audio, audio / 'none.wav', audio / 'a.wav']) == 0
  printed = capsys.readouterr()
  with open(tmp_path / 'x.npz.rejected.csv', newline='') as f:
    rows = list(csv.reader(f))
  assert rows[0] == ['file', 'reason'] and {name for name, _ in rows[1:]} == set(bad)
  for name, reason in rows[1:]:
    assert bad[name] in reason and 'row' not in reason
    assert f'left out: {name}: {reason}\n' in printed.err
  assert '4 of 7 files' in printed.out and '3 left out' in printed.out
  data = np.load(tmp_path / 'x.npz')
  assert list(data['files']) == here.usable, 'a file that is named twice counts once'
  close(data['embeddings'], here.model.embed(here.usable))
  assert embed(here, tmp_path / 'x.npz', paths=here.usable) == 0
  assert not (tmp_path / 'x.npz.rejected.csv').exists(), 'the list of an earlier run is gone'


@pytest.mark.parametrize('limit', ['MOST_FILES', 'MOST_BYTES'])
def test_files_are_run_in_groups_of_bounded_size(here, limit, tmp_path, monkeypatch):
  monkeypatch.setattr(files, limit, 2)
  groups = []
  names = sorted([*here.usable, str(here.root / 'audio' / 'more' / 'cut.flac')])
  for _ in files.results(names, lambda clips: groups.append(len(clips)) or [None] * len(clips)):
    pass
  assert groups == ([2, 2, 1] if limit == 'MOST_FILES' else [1] * 5)
  assert embed(here, tmp_path / 'x.npz') == 0
  close(np.load(tmp_path / 'x.npz')['embeddings'], here.model.embed(here.usable))


def test_what_cannot_work_is_one_line_and_leaves_nothing_behind(here, tmp_path, capsys):
  (tmp_path / 'empty' / '.trash').mkdir(parents=True)
  (tmp_path / 'empty' / '.trash' / 'a.wav').write_text('')
  (tmp_path / 'file').write_text('')
  (tmp_path / 'folder.npz').mkdir()
  audio, text = here.root / 'audio', here.root / 'audio' / 'more' / 'text.wav'
  out = tmp_path / 'x.npz'
  before = sorted(os.listdir(tmp_path))
  for paths, name, message in (([tmp_path / 'empty'], out, 'empty: the folder contains no audio files'),
                               ([audio], tmp_path / 'x.csv', 'x.csv: unknown kind of output'),
                               ([audio], tmp_path / 'folder.npz', 'folder.npz: unknown kind of output'),
                               ([audio], tmp_path / 'file' / 'x.npz', 'x.npz: cannot be written'),
                               ([text], out, 'none of the 1 files can be used')):
    assert embed(here, name, paths=paths) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith('m2d-clap: ') and message in last
  assert run('embed', audio, '--model', tmp_path / 'none', '-o', out) == 2
  assert 'no such file' in capsys.readouterr().err
  plain = save_model(here.root / 'plain', text_width=None)
  assert run('embed', audio, '--model', plain, '-o', out, '--clap') == 2
  assert 'has no CLAP head' in capsys.readouterr().err
  assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize('ending', embedding_files.WRITERS)
def test_a_full_disk_keeps_the_file_that_was_there(here, ending, tmp_path, monkeypatch, capsys):
  out = tmp_path / f'x{ending}'
  out.write_text('of an earlier run')
  def full(self, name, *embedding):
    raise OSError(28, 'No space left on device')
  monkeypatch.setattr(embedding_files.WRITERS[ending], 'add', full)
  assert embed(here, out) == 2
  assert f'{out}: cannot be written (No space left on device)' in capsys.readouterr().err
  assert out.read_text() == 'of an earlier run' and os.listdir(tmp_path) == [out.name]


def test_two_names_that_are_no_unicode_stay_two_in_every_output(here, tmp_path, capsys):
  names = [os.fsdecode(os.fsencode(tmp_path) + b'/caf' + byte + b'.wav') for byte in (b'\xe9', b'\xea')]
  for name in names:
    with open(here.usable[0], 'rb') as source, open(name, 'wb') as copy:
      copy.write(source.read())
  spelled = [rf'{tmp_path}/caf\x{byte}.wav' for byte in ('e9', 'ea')]
  assert embed(here, tmp_path / 'x.parquet', paths=names) == 0
  assert pyarrow.parquet.read_table(tmp_path / 'x.parquet')['file'].to_pylist() == spelled
  assert embed(here, tmp_path / 'x.npz', paths=names) == 0
  assert np.load(tmp_path / 'x.npz')['files'].tolist() == spelled
  capsys.readouterr()
  assert run('classify', *names, '--model', here.folder, '--labels', 'dog', '--json') == 0
  assert [json.loads(line)['file'] for line in capsys.readouterr().out.splitlines()] == spelled


def test_a_folder_from_a_phone_is_read_and_what_cannot_be_decoded_is_counted(here, tmp_path, capsys):
  rate, draw = 44100, np.random.default_rng(0)
  wave = np.sin(2 * np.pi * 440 * np.arange(3 * rate) / rate) * np.linspace(0.1, 0.3, 3 * rate)
  wave = (wave + 0.1 * np.convolve(draw.standard_normal(3 * rate), np.ones(8) / 8, 'same')).astype(np.float32)
  soundfile.write(tmp_path / 'a.wav', wave, rate)
  encode(tmp_path / 'a.m4a', wave, rate)
  for name in ('b.mid', 'c.mid', 'd.dss', 'notes.txt'):
    (tmp_path / name).write_bytes(b'x')
  os.mkfifo(tmp_path / 'pipe.wav')
  assert embed(here, tmp_path / 'x.npz', paths=[tmp_path]) == 0
  error = capsys.readouterr().err
  assert '3 files cannot be decoded and are skipped (2 .mid, 1 .dss)' in error
  assert 'pipe.wav: is not a regular file' in error
  data = np.load(tmp_path / 'x.npz')
  assert [os.path.basename(name) for name in data['files']] == ['a.m4a', 'a.wav']
  # The weights are random and tell nothing of sounds; what they see of the two must be alike.
  m4a, wav = (here.model.logmel.numpy(decode.load(tmp_path / name, 16000)[0])[:, :300] for name in ('a.m4a', 'a.wav'))
  assert np.corrcoef(m4a.ravel(), wav.ravel())[0, 1] > 0.99
