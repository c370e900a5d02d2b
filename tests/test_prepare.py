"""Preparation: real audio in, a folder that TFDS and our own reader understand out; what cannot be used is told."""
import csv
import json
import os

import numpy as np
import pytest
import soundfile

from m2d_clap_jax import paths
from m2d_clap_jax.audio import LogMel, decode
from m2d_clap_jax.cli import main
from m2d_clap_jax.data import embeddings, prepare
from m2d_clap_jax.data.manifest import Row
from m2d_clap_jax.data.read import Folder
from m2d_clap_jax.errors import UserError
from tests.prepare_helpers import FakeEncoder, corpus, noise, write_manifest


@pytest.fixture(scope='module')
def mixed(tmp_path_factory):
  """A prepared folder of wav, flac and opus files in two splits, by the real CLI and the real MiniLM."""
  root = tmp_path_factory.mktemp('mixed')
  audio = root / 'audio'
  (audio / 'sub').mkdir(parents=True)
  soundfile.write(audio / 'a.wav', noise(1.0, 44100, channels=2), 44100)
  soundfile.write(audio / 'sub/b.flac', noise(0.5, seed=1), 16000)
  soundfile.write(audio / 'c.opus', noise(1.2, 48000, 2), 48000, format='OGG', subtype='OPUS')
  soundfile.write(audio / 'long.wav', noise(2.5), 16000)
  write_manifest(root / 'm.csv', [
      ('a.wav', 'a dog barks', '', 'train'), ('a.wav', 'barking', 'dog', 'train'),
      ('sub/b.flac', '', 'rain,wind,sea', 'train'), ('c.opus', ' ', 'flute, pipe', 'test'),
      ('long.wav', 'hiss ' * 10_000, '', 'train'), ('gone.wav', 'x', '', 'train'),
      ('a.wav', 'barking', 'dog', 'train'), ('long.wav', '', '', 'test'), ('../out.wav', 'x', '', 'train')])
  code = main.main(['prepare', f'--manifest={root}/m.csv', f'--audio_root={audio}', f'--out={root}/out', '--workers=2',
                   '--text_encoder=minilm', '--num_shards=2', '--max_seconds=2'])
  assert code == 0
  return root


def test_tfds_reads_the_folder(mixed):
  import tensorflow_datasets as tfds
  builder = tfds.builder_from_directory(str(mixed / 'out'))
  assert {name: info.num_examples for name, info in builder.info.splits.items()} == {'train': 3, 'test': 1}
  train = {r['key'].decode(): r for r in tfds.as_numpy(builder.as_dataset(split='train'))}
  a = train['a.wav']
  assert a['logmel'].shape == (80, 101) == (80, a['num_frames']) and a['logmel'].dtype == np.float16
  wave, _ = decode.load(mixed / 'audio/a.wav', 16000)
  np.testing.assert_array_equal(a['logmel'], LogMel().numpy(wave).astype(np.float16))
  assert a['captions'].tolist() == [b'a dog barks', b'barking'] and a['labels'].tolist() == [b'dog']
  assert a['caption_embeddings'].shape == (2, 384) and a['caption_embeddings'].dtype == np.float16
  assert train['sub/b.flac']['captions'].tolist() == [b'The sound of rain, wind, and sea.']
  assert train['sub/b.flac']['labels'].tolist() == [b'rain', b'wind', b'sea']
  assert train['long.wav']['logmel'].shape == (80, 201)
  (test,) = tfds.as_numpy(builder.as_dataset(split='test'))
  assert test['captions'].tolist() == [b'The sound of flute, and pipe.']


def test_embeddings_are_those_of_the_text_encoder(mixed):
  from m2d_clap_jax.text import TextEncoder
  folder = Folder(mixed / 'out')
  split = folder.split('train')
  clip = next(c for c in map(split.clip, range(3)) if c.key == 'a.wav')
  encoder = TextEncoder('minilm')
  np.testing.assert_allclose(clip.caption_embeddings, encoder(clip.captions), atol=1e-3)
  assert folder.meta['text_encoder'] == {'name': 'minilm', 'hash': encoder.weights_hash, 'width': 384}


def test_counts_add_up_and_rejections_are_listed(mixed):
  meta = json.loads((mixed / 'out/prepare.json').read_text())
  train, test = meta['splits']['train'], meta['splits']['test']
  assert (train['rows'], train['files'], train['clips'], train['rejected'], train['rejected_rows']) == (7, 5, 3, 2, 2)
  assert (test['rows'], test['files'], test['clips'], test['rejected'], test['rejected_rows']) == (2, 2, 1, 1, 1)
  assert (train['captions'], train['truncated']) == (4, 1)
  rows = list(csv.reader((mixed / 'out/rejected.csv').read_text().splitlines()))
  assert rows == [['file', 'reason', 'split', 'rows'], ['long.wav', 'no caption and no label', 'test', '1'],
                  ['../out.wav', 'path is outside the audio root', 'train', '1'],
                  ['gone.wav', 'no such file; correct the path or drop its row', 'train', '1']]


def test_mean_and_std_are_those_of_the_stored_train_clips(mixed):
  folder = Folder(mixed / 'out')
  split = folder.split('train')
  values = np.concatenate([split.clip(i).logmel.ravel() for i in range(3)]).astype(np.float64)
  np.testing.assert_allclose([folder.meta['mean'], folder.meta['std']], [values.mean(), values.std()], rtol=1e-10)


BAD = {
    'missing.wav': None, 'empty.wav': b'', 'text.wav': b'this is not audio at all', 'corrupt.flac': 'corrupt',
    'cut.wav': 'cut', 'cut.flac': 'cut', 'cut.opus': 'cut', 'zero.wav': np.zeros(0), 'nan.wav': np.full(1600, np.nan),
}
GOOD = {  # name: (wave, rate, format's subtype, frames expected)
    'silent.wav': (np.zeros(16000), 16000, None, 101),
    '8bit.wav': (noise(0.5), 16000, 'PCM_U8', 51),
    'surround.wav': (noise(0.5, 48000, channels=6), 48000, None, 51),
    'short.wav': (noise(0.001), 16000, None, 1),
    'hour.flac': (np.concatenate([noise(5, 8000), np.zeros(3595 * 8000)]).astype(np.float32), 8000, 'PCM_16', 3001),
}


def test_bad_audio_is_rejected_and_odd_audio_is_kept(tmp_path):
  for name, what in BAD.items():
    path = tmp_path / name
    if isinstance(what, bytes):
      path.write_bytes(what)
    elif isinstance(what, np.ndarray):
      soundfile.write(path, what, 16000, subtype='FLOAT')
    elif what:
      soundfile.write(path, noise(3, 48000), 48000, format='OGG' if path.suffix == '.opus' else None,
                      subtype='OPUS' if path.suffix == '.opus' else None)
      data = path.read_bytes()
      middle = len(data) // 2
      path.write_bytes(data[:middle] + (os.urandom(middle) if what == 'corrupt' else b''))
  for name, (wave, rate, subtype, _) in GOOD.items():
    soundfile.write(tmp_path / name, wave, rate, subtype=subtype)
  os.mkfifo(tmp_path / 'pipe.wav')
  names = [*BAD, *GOOD, 'pipe.wav']
  write_manifest(tmp_path / 'm.csv', [(name, 'sound') for name in names], ('file_name', 'caption'))
  meta = prepare.prepare(tmp_path / 'm.csv', tmp_path, tmp_path / 'out', text_encoder=None, workers=2)
  split = Folder(tmp_path / 'out').split('train')
  clips = {clip.key: clip for clip in map(split.clip, range(split.num_clips))}
  assert {key: c.logmel.shape[1] for key, c in clips.items()} == {name: frames for name, (*_, frames) in GOOD.items()}
  np.testing.assert_allclose(clips['silent.wav'].logmel, -15.94, atol=0.01)
  counts = meta['splits']['train']
  assert (counts['clips'], counts['rejected'], counts['truncated'], counts['files']) == (5, 10, 1, 15)
  reasons = {row['file']: row['reason'] for row in csv.DictReader(open(tmp_path / 'out/rejected.csv'))}
  assert set(reasons) == set(names) - set(GOOD) and all(reasons.values())
  assert not any(str(tmp_path) in reason for reason in reasons.values())


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  corpus(tmp_path / 'wavs', 3)
  assert main.main(['prepare', '--manifest=~/wavs/manifest.csv', '--audio_root=~/wavs', '--out=~/out', '--workers=1',
                   '--text_encoder=none']) == 0
  assert Folder('~/out').split('train').num_clips == 3
  assert paths.files_under('~/wavs')[:2] == ['0.wav', '1.wav'] and len(paths.glob('~/wavs/*.wav')) == 3
  assert set(paths.stamps('~/wavs', ['0.wav', 'none.wav'])) == {'0.wav'}


def test_captions_of_any_number_keep_no_files_open(tmp_path, monkeypatch):
  monkeypatch.setattr(embeddings, 'BLOCK', 2)
  rows = [Row(f'{i}.wav', captions=[f'sound number {i}']) for i in range(100)]
  bank = embeddings.CaptionBank(tmp_path, [row.captions[0] for row in rows], FakeEncoder(), 'float16')
  bank.embed(rows, lambda done, total: None)
  before = len(os.listdir('/proc/self/fd'))
  kept = [bank(row) for row in rows]
  assert len(kept) == 100 and len(os.listdir('/proc/self/fd')) - before < 5


def test_when_everything_is_rejected_the_most_frequent_reason_is_told(tmp_path):
  for i in range(3):
    (tmp_path / f'{i}.wav').write_bytes(b'nonsense')
  (tmp_path / '3.wav').write_bytes(b'')
  manifest = write_manifest(tmp_path / 'm.csv', [(f'{i}.wav', 'x') for i in range(4)], ('file_name', 'caption'))
  with pytest.raises(UserError, match=r'every file .* most often \(3 of 4\) .*\.wav: .*not readable'):
    prepare.prepare(manifest, tmp_path, tmp_path / 'out', text_encoder=None, workers=1)
  for i in range(4):  # once fixed, the same command works
    soundfile.write(tmp_path / f'{i}.wav', noise(0.1), 16000)
  meta = prepare.prepare(manifest, tmp_path, tmp_path / 'out', text_encoder=None, workers=1)
  assert meta['splits']['train']['clips'] == 4


def test_a_wrong_root_is_told_at_once(tmp_path):
  manifest = corpus(tmp_path / 'a', 2)
  with pytest.raises(UserError, match='no such folder: check --audio_root'):
    prepare.prepare(manifest, tmp_path / 'b', tmp_path / 'out', text_encoder=None)
  with pytest.raises(UserError, match='holds none of the files .* 0.wav: check --audio_root'):
    prepare.prepare(manifest, tmp_path, tmp_path / 'out', text_encoder=None)
  assert not (tmp_path / 'out').exists()


def test_the_command_tells_mistakes_in_one_line(tmp_path, capsys):
  manifest = corpus(tmp_path / 'a', 2)
  (tmp_path / 'file').write_text('')
  common = ['prepare', '--text_encoder=none', f'--manifest={manifest}']
  for arguments, told in [(['--out=' + str(tmp_path / 'file')], 'cannot be written'),
                          (['--out=' + str(tmp_path / 'file/sub')], 'cannot be written'),
                          (['--out=' + str(tmp_path / 'out'), '--workers=0'], '--workers=0'),
                          (['--out=' + str(tmp_path / 'out'), '--max_seconds=nan'], '--max_seconds=nan'),
                          (['--out=' + str(tmp_path / 'out'), '--sample_rate=8000'], '16000 and 32000'),
                          (['--out=' + str(tmp_path / 'out'), '--caption_embeddings=x'], 'takes the place of --text_encoder')]:
    assert main.main(common + arguments) == 2
    error = capsys.readouterr().err
    assert told in error and error.count('\n') == 1, error
