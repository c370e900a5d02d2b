"""Data sets of TensorFlow Datasets: checked against the catalogue's own features, read in its own format, no download."""
import csv

import numpy as np
import pytest
import soundfile
import tensorflow_datasets as tfds

from m2d_clap_jax.errors import UserError
from m2d_clap_jax.tasks import fetch
from m2d_clap_jax.tasks.metadata import open_task
from m2d_clap_jax.tasks.table import CATALOGUE
from tests.command_helpers import run


def features_of(source, tmp_path):
  return tfds.builder(source.builder, data_dir=tmp_path / 'none').info.features


def store(tmp_path, task, examples):
  """Writes {split: examples} as the catalogue does, with the real builder's features -> its data_dir."""
  source = CATALOGUE[task]
  builder = tfds.builder(source.builder, data_dir=tmp_path / 'tfds')
  features = builder.info.features
  version = builder.version or '2.3.3'
  folder = tmp_path / 'tfds' / source.builder / str(version)
  folder.mkdir(parents=True)
  identity = tfds.core.DatasetIdentity(
      name=builder.name, version=tfds.core.Version(version), data_dir=str(folder), module_name='',
      config_name=builder.builder_config and builder.builder_config.name)
  writer = tfds.core.SequentialWriter(tfds.core.DatasetInfo(builder=identity, features=features), 2, overwrite=False)
  writer.initialize_splits(list(examples))
  for split, rows in examples.items():
    writer.add_examples({split: rows})
  writer.close_all()
  return str(tmp_path / 'tfds')


def noise(seed, size=800, high=32768):
  return np.random.default_rng(seed).integers(-high, high, size)


def speakers(count, seed):
  names = ('NEU', 'HAP', 'SAD', 'ANG', 'FEA', 'DIS')
  return [{'audio': noise(seed + i), 'label': names[i % 6], 'speaker_id': '1001'} for i in range(count)]


@pytest.mark.parametrize('task', CATALOGUE)
def test_the_mapping_fits_the_catalogues_features(task, tmp_path):
  source = CATALOGUE[task]
  features = features_of(source, tmp_path)
  fetch.check(features, list(source.splits), source)
  for change, message in ((dict(label=('nothing',)), 'no class label nothing'), (dict(label=('audio', 'x')), 'audio/x'),
                          (dict(rate=8000), 'Hz, not 8000'), (dict(splits={'dev': 'test'}), 'not dev')):
    with pytest.raises(UserError, match=f'^{source.builder}: .*{message}.*use that version'):
      fetch.check(features, list(source.splits), source._replace(**change))


def test_clips_arrive_bit_by_bit_with_their_classes_and_parts(tmp_path, capsys):
  examples = {'train': speakers(12, 0), 'validation': speakers(6, 20), 'test': speakers(6, 40)}
  examples['test'][2]['audio'] = noise(1, high=40000)
  data_dir = store(tmp_path, 'cremad', examples)
  assert run('fetch', 'cremad', '--out', tmp_path / 'out', '--data_dir', data_dir) == 0
  assert 'cremad.csv: 24 clips = 23 written + 1 rejected' in capsys.readouterr().out
  task = open_task('cremad', str(tmp_path / 'out'))
  assert [len(part) for part in task.splits().values()] == [12, 6, 5] and task.captions[0] == 'angry person talking can be heard'
  expected = sorted((row['label'], row['audio'].tolist()) for split in examples for row in examples[split]
                    if np.abs(row['audio']).max() <= 32768)
  found = sorted((clip.labels[0], soundfile.read(task.path(clip), dtype='int16')[0].tolist()) for clip in task.clips)
  assert found == expected
  with open(tmp_path / 'out' / 'rejected.csv', newline='') as file:
    assert [row['reason'] for row in csv.DictReader(file)] == ['its samples are beyond 16 bits']


def test_an_interrupted_call_continues_and_a_finished_one_is_left_alone(tmp_path, monkeypatch):
  data_dir = store(tmp_path, 'cremad', {'train': speakers(6, 0), 'validation': speakers(6, 6), 'test': speakers(6, 12)})
  written = []

  def stop_after(count):
    def save(path, wave, rate):
      if len(written) == count:
        raise KeyboardInterrupt
      written.append(path)
      whole(path, wave, rate)
    return save
  whole = fetch.save_flac
  monkeypatch.setattr(fetch, 'save_flac', stop_after(8))
  with pytest.raises(KeyboardInterrupt):
    fetch.fetch('cremad', tmp_path / 'out', data_dir=data_dir)
  assert not (tmp_path / 'out' / 'cremad.csv').exists()
  monkeypatch.setattr(fetch, 'save_flac', stop_after(100))
  assert '18 clips = 18 written' in fetch.fetch('cremad', tmp_path / 'out', data_dir=data_dir)
  assert len(written) == len(set(written)) == 18
  assert 'already exists' in fetch.fetch('cremad', tmp_path / 'out', data_dir=data_dir)


def test_genres_have_ten_folds_of_neighbours(tmp_path):
  rows = [{'audio': noise(i), 'label': genre, 'audio/filename': f'{genre}.{i:05d}.wav'}
          for genre in ('blues', 'rock') for i in range(0, 100, 5)]
  rows.append({'audio': noise(0), 'label': 'rock', 'audio/filename': 'rock.wav'})
  text = fetch.fetch('gtzan', tmp_path / 'out', data_dir=store(tmp_path, 'gtzan', {'train': rows}))
  assert '41 clips = 40 written + 1 rejected' in text
  task = open_task('gtzan', str(tmp_path / 'out'))
  assert task.folds == tuple(range(1, 11)) and len(task.splits(3)['test']) == 4
  assert soundfile.info(task.path(task.clips[0])).samplerate == 22050
  assert (fetch.fold_of('blues.00009.wav'), fetch.fold_of('blues.00010.wav')) == (1, 2)


def test_floats_are_kept_exactly_where_they_were_16_bit():
  whole = noise(0).astype(np.int16)
  np.testing.assert_array_equal(fetch.samples_of((whole / 32768).astype(np.float32)), whole)
  assert fetch.samples_of(whole.astype(np.int64)).dtype == np.int16
  fine = np.float32([0.1, -0.2])
  assert fetch.samples_of(fine) is fine
  for bad in (np.float32([0, np.nan]), np.float32([1.5]), np.zeros(0, np.int64)):
    with pytest.raises(fetch.Rejected):
      fetch.samples_of(bad)


def test_data_that_must_be_fetched_by_hand_and_unknown_names_are_told(tmp_path, capsys):
  assert run('fetch', 'vc1', '--out', tmp_path / 'out', '--data_dir', tmp_path, '--manual_dir', tmp_path / 'none') == 2
  line, = capsys.readouterr().err.strip().splitlines()
  assert 'voxceleb: its data are not available' in line and 'vox_dev_wav.zip' in line and '--manual_dir' in line
  with pytest.raises(UserError, match='esc50: unknown task; known: gtzan'):
    fetch.fetch('esc50', tmp_path)


def test_notes_have_the_family_of_their_instrument_as_class(tmp_path):
  families = ('bass', 'synth_lead')

  def note(i):
    features = features_of(CATALOGUE['nsynth'], tmp_path)
    return {'id': f'note {i}', 'audio': np.full(64000, (i + 1) / 64, np.float32), 'pitch': 60, 'velocity': 100,
            'instrument': {'label': features['instrument']['label'].names[0], 'family': families[i % 2],
                           'source': 'acoustic'},
            'qualities': dict.fromkeys(features['qualities'], False)}
  notes = {split: [note(i) for i in range(4)] for split in ('train', 'valid', 'test')}
  fetch.fetch('nsynth', tmp_path / 'out', data_dir=store(tmp_path, 'nsynth', notes))
  task = open_task('nsynth', str(tmp_path / 'out'))
  assert task.classes == families and task.captions[1] == 'the musical instrument sound of synth lead can be heard'
  assert [len(part) for part in task.splits().values()] == [4, 4, 4]
  waves = sorted(soundfile.read(task.path(clip))[0][0] for clip in task.splits()['valid'])
  assert waves == [1 / 64, 2 / 64, 3 / 64, 4 / 64]
