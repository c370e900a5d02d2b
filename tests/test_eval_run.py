"""Evaluations from audio files to tables: real decoding, a real sentence encoder, a small model with random weights."""
import json

import numpy as np
import pytest
import soundfile

import m2d_clap_jax
from m2d_clap_jax.audio import files
from m2d_clap_jax.audio.pool import STREAM, Pool
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.eval import report
from m2d_clap_jax.eval.finished import evaluate
from m2d_clap_jax.tasks import clips
from m2d_clap_jax.tasks.clips import extract, wave_of
from m2d_clap_jax.tasks.metadata import open_task
from m2d_clap_jax.weights.portable import save_portable
from tests.small_model import tiny_weights

LABELS = ('low_hum', 'noise', 'whistle')


def sound(label, i, rate=16000, seconds=0.5):
  rng = np.random.default_rng(i)
  time = np.arange(int(seconds * rate)) / rate
  if label == 'noise':
    return 0.1 * rng.standard_normal(len(time))
  return 0.3 * np.sin(2 * np.pi * {'low_hum': 120, 'whistle': 3000}[label] * rng.uniform(0.9, 1.1) * time)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """60 clips of three sounds in three folds, one of them damaged; the same with splits, several labels, captions."""
  folder = tmp_path_factory.mktemp('audio')
  folds, splits, many, captions = [['file_name,label,fold'], ['file_name,label,split'], ['file_name,label,split'],
                                   ['file_name,label,caption,split']]
  for i in range(60):
    label = LABELS[i % 3]
    soundfile.write(folder / f'{i}.flac', sound(label, i), 16000)
    split = ('train', 'train', 'valid', 'test')[i // 3 % 4]
    folds.append(f'{i}.flac,{label},{i // 3 % 3 + 1}')
    splits.append(f'{i}.flac,{label},{split}')
    many.append(f'{i}.flac,"{label}{",loud" if i % 2 else ""}",{split}')
    captions += [f'{i}.flac,{label},"{text} {label}",{split}' for text in ('a', 'the sound of')]
  (folder / '7.flac').write_bytes(b'fLaC, once')
  for name, lines in {'folds': folds, 'splits': splits, 'many': many, 'captions': captions}.items():
    (folder / f'{name}.csv').write_text('\n'.join(lines) + '\n')
  return folder


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  return save_portable(tiny_weights(), tmp_path_factory.mktemp('model'))


def run(root, model, workdir, job, task, **protocol):
  data = {'root': str(root), 'seconds': None if job == 'retrieval' else 0.5, 'damaged': 'skip'}
  evaluate(str(workdir), job=job, task=task, init=str(model), data=data, seed=42, model={}, protocol=protocol)
  return json.loads((workdir / 'results.json').read_text())


def test_linear_evaluation_over_folds(root, model, tmp_path, capsys):
  result = run(root, model, tmp_path, 'linear', 'folds', learning_rate=1e-2, max_epochs=40)
  assert result['score'] > 0.9 and [len(row['runs']) for row in result['scores']] == [3, 3, 3]
  assert result['clips']['used'] == 59 and list(result['clips']['rejected']) == ['7.flac']
  assert (tmp_path / 'rejected.csv').read_text().splitlines()[1].startswith('7.flac,')
  assert result['settings']['data']['damaged'] == 'skip'
  assert 'folds: 60 clips = 59 used + 1 that cannot be read' in capsys.readouterr().err
  for name in ('confusion', 'classes', 'embeddings'):
    assert (tmp_path / f'{name}.png').read_bytes()[:4] == b'\x89PNG'
  assert f'| folds | {result["model"]["source"]} | accuracy | {100 * result["score"]:.1f} | ± ' in (
      tmp_path / 'results.md').read_text()


def test_zero_shot_needs_and_embeds_the_test_clips_alone(root, model, tmp_path):
  expected = run(root, model, tmp_path / 'all', 'zeroshot', 'splits')
  for i in range(60):
    if i // 3 % 4 == 3:
      (tmp_path / 'test').mkdir(exist_ok=True)
      (tmp_path / 'test' / f'{i}.flac').write_bytes((root / f'{i}.flac').read_bytes())
  (tmp_path / 'test' / 'splits.csv').write_text((root / 'splits.csv').read_text())
  found = run(tmp_path / 'test', model, tmp_path / 'alone', 'zeroshot', 'splits')
  assert found['score'] == expected['score'] and found['clips'] == {'used': 15, 'rejected': {}}


@pytest.mark.parametrize('key', ['runs', 'batch_size', 'max_epochs'])
def test_a_protocol_of_nothing_is_refused(key, root, model, tmp_path):
  with pytest.raises(UserError, match=f'config.protocol.{key}=0: must be at least 1'):
    run(root, model, tmp_path, 'linear', 'folds', **{key: 0})


def test_results_of_another_model_are_not_overwritten(root, model, tmp_path):
  first = run(root, model, tmp_path / 'run', 'zeroshot', 'splits')
  assert run(root, model, tmp_path / 'run', 'zeroshot', 'splits') == first  # the same again is no harm
  other = save_portable(tiny_weights(seed=1), tmp_path / 'other')
  with pytest.raises(UserError, match='contains the results of another model'):
    run(root, other, tmp_path / 'run', 'zeroshot', 'splits')
  assert json.loads((tmp_path / 'run' / 'results.json').read_text()) == first


def test_linear_evaluation_of_several_labels_with_splits(root, model, tmp_path):
  result = run(root, model, tmp_path, 'linear', 'many', learning_rate=1e-2, max_epochs=40, runs=2)
  assert result['metric'] == 'mAP' and 0.5 < result['score'] <= 1 and len(result['scores']) == 1
  own = list(result['per_class_of_first_run'].values())
  assert np.mean(own) == pytest.approx(result['scores'][0]['runs'][0]) and (tmp_path / 'classes.png').exists()


@pytest.mark.parametrize('templates', [(), ('the sound of {}', '{}')])
def test_zero_shot_scores_are_those_of_the_pipeline(root, model, templates, tmp_path):
  result = run(root, model, tmp_path, 'zeroshot', 'splits', templates=templates)
  pipeline = m2d_clap_jax.load(model)
  task = open_task('splits', str(root), seconds=0.5)
  clips = [clip for clip in task.splits()['test'] if clip.file != '7.flac']
  cosines = pipeline.classify([sound(clip.labels[0], int(clip.file[:-5])) for clip in clips], labels=task.classes,
                              template=templates or '{} can be heard')
  expected = np.mean(cosines.argmax(1) == task.targets(clips).argmax(1))
  assert result['score'] == pytest.approx(expected, abs=0.07) and result['chance'] == pytest.approx(1 / 3)
  assert (tmp_path / 'similarity.png').exists()


def test_zero_shot_of_several_labels_is_scored_by_average_precision(root, model, tmp_path):
  result = run(root, model, tmp_path, 'zeroshot', 'many')
  assert result['metric'] == 'mAP' and set(result['per_class']) == {*LABELS, 'loud'} and 0 < result['score'] <= 1


def test_retrieval_in_both_directions(root, model, tmp_path):
  result = run(root, model, tmp_path, 'retrieval', 'captions')
  assert result['captions'] == 30 and result['metric'] == 'R@1' and set(result['text_to_audio']) == {
      'R@1', 'R@5', 'R@10', 'mAP@10', 'median_rank', 'chance'}
  assert result['text_to_audio']['chance'] == pytest.approx(1 / 15)
  assert result['text_to_audio']['R@1'] <= result['text_to_audio']['R@10'] <= 1
  table = (tmp_path / 'results.md').read_text()
  assert '| text to audio |' in table and '| audio to text |' in table


def test_a_csv_of_labels_and_captions_serves_all_three_evaluations(root, model, tmp_path):
  labels = run(root, model, tmp_path / 'labels', 'zeroshot', 'splits')
  assert run(root, model, tmp_path / 'both', 'zeroshot', 'captions')['score'] == labels['score']
  assert run(root, model, tmp_path / 'linear', 'linear', 'captions', max_epochs=2)['metric'] == 'accuracy'


def test_retrieval_without_captions_is_told(root, model, tmp_path):
  with pytest.raises(UserError, match='splits: has no captions: add the column caption to its CSV, or use'):
    run(root, model, tmp_path, 'retrieval', 'splits')


@pytest.mark.parametrize('projector', ['mlp', 'semantic'])
def test_retrieval_takes_whole_clips_of_any_length_and_tells_damaged_ones(projector, tmp_path, monkeypatch):
  pipeline = m2d_clap_jax.load(save_portable(tiny_weights(audio_projector=projector), tmp_path / 'model'))
  lengths = {'a.wav': 0.3, 'b.wav': 7.7, 'c.wav': 2.0, 'd.wav': 1.1, 'e.wav': 0.5}
  for i, (file, seconds) in enumerate(lengths.items()):
    soundfile.write(tmp_path / file, sound('noise', i, seconds=seconds), 16000, subtype='FLOAT')
  (tmp_path / 'c.wav').write_bytes((tmp_path / 'c.wav').read_bytes()[:-4000])  # told only when it has been decoded
  (tmp_path / 'd.wav').write_bytes(b'RIFF')
  (tmp_path / 'clotho.csv').write_text('file_name,caption,split\n' + ''.join(f'{file},hiss,test\n' for file in lengths))
  monkeypatch.setattr(clips, 'GROUP', 2)
  task, found = extract(pipeline, open_task('clotho', str(tmp_path), whole=True), tmp_path / 'cache')
  assert found.files == ['a.wav', 'b.wav', 'e.wav'] and list(found.rejected) == ['c.wav', 'd.wav']
  assert len(task.clips) == 3 and 'cut' in found.rejected['c.wav']
  for i, file in enumerate(found.files):
    wave = sound('noise', list(lengths).index(file), seconds=lengths[file])
    np.testing.assert_allclose(found.audio[i], pipeline.encode_audio(wave.astype(np.float32))[0], atol=1e-4)


def test_whole_clips_are_decoded_in_groups_of_bounded_size(root, monkeypatch):
  task = open_task('captions', str(root), whole=True)
  monkeypatch.setattr(files, 'MOST_BYTES', 40e3)
  groups = list(clips._whole(task, Pool(STREAM)))
  sizes = [sum((root / file).stat().st_size for file in group) for group in groups]
  assert len(groups) > 1 and max(sizes) <= 40e3 and [file for group in groups for file in group] == [
      clip.file for clip in task.clips]


def test_features_are_extracted_once_and_again_when_a_file_changes(root, model, tmp_path):
  pipeline = m2d_clap_jax.load(model)
  task = open_task('splits', str(root), seconds=0.5)
  _, first = extract(pipeline, task, tmp_path)
  before = {path.name for path in tmp_path.iterdir()}
  pipeline.features = None  # whoever calls it now fails
  _, again = extract(pipeline, task, tmp_path)
  np.testing.assert_array_equal(first.features, again.features)
  assert first.files == again.files and first.rejected == again.rejected
  (root / '0.flac').touch()
  with pytest.raises(TypeError):
    extract(pipeline, open_task('splits', str(root), seconds=0.5), tmp_path)
  assert {path.name for path in tmp_path.iterdir()} == before


def test_test_clips_begin_at_their_start_and_training_clips_anywhere(tmp_path):
  soundfile.write(tmp_path / 'ramp.wav', np.arange(16000) / 16000, 16000, subtype='FLOAT')
  (tmp_path / 'x.csv').write_text('file_name,label,split\nramp.wav,a,train\n')
  clip = open_task('x', str(tmp_path), seconds=0.5).clips[0]
  starts = {wave_of(str(tmp_path / 'ramp.wav'), clip, 0.5, 16000, seed)[0] for seed in range(5)}
  assert len(starts) == 5 and len(wave_of(str(tmp_path / 'ramp.wav'), clip, 0.5, 16000, 0)) == 8000
  test = wave_of(str(tmp_path / 'ramp.wav'), clip.__class__('ramp.wav', ('a',), 'test'), 2.0, 16000, 0)
  np.testing.assert_array_equal(test, np.r_[np.arange(16000) / 16000, np.zeros(16000)].astype(np.float32))


def test_reports_are_merged_and_bad_ones_named(root, model, tmp_path):
  run(root, model, tmp_path / 'a', 'zeroshot', 'splits')
  paper = {'job': 'zeroshot', 'task': 'esc50', 'metric': 'accuracy', 'score': 0.7, 'model': {'source': 'runs/f'}}
  (tmp_path / 'b').mkdir()
  report.write(tmp_path / 'b', paper)
  text = report.merge([tmp_path])
  assert '| esc50 | runs/f | accuracy | 70.0 |  |  | 75.5 | -5.5 |' in text
  assert text.index('| esc50 |') < text.index('| splits |')
  (tmp_path / 'b' / 'results.json').write_text('{"job": 1}')
  with pytest.raises(UserError, match='b/results.json: is not a result'):
    report.merge([tmp_path])
  with pytest.raises(UserError, match='nowhere: contains no results.json'):
    report.merge([tmp_path / 'nowhere'])


@pytest.mark.parametrize('change, message', [
    (dict(init=''), 'config.init is empty'), (dict(data={}), 'config.data.root is empty'),
    (dict(protocol={'run': 3}), 'config.protocol.run: unknown key'), (dict(job='retrieval'), 'retrieval is of whole clips')])
def test_mistakes_are_told(change, message, root, model, tmp_path):
  settings = dict(job='linear', task='splits', init=str(model), data={'root': str(root), 'seconds': 0.5}, seed=0,
                  model={}, protocol={})
  with pytest.raises(UserError, match=message):
    evaluate(str(tmp_path), **settings | change)


def test_missing_and_damaged_clips_end_an_evaluation_unless_told_to_go_on(root, model, tmp_path):
  settings = dict(job='linear', task='splits', init=str(model), seed=0, model={}, protocol={})
  with pytest.raises(UserError, match=r'1 of 60 clips cannot be read \(7.flac; all .*rejected.csv\): restore'):
    evaluate(str(tmp_path), data={'root': str(root), 'seconds': 0.5}, **settings)
  assert (tmp_path / 'rejected.csv').read_text().startswith('file_name,reason\n7.flac,')
  folder = tmp_path / 'gone'
  folder.mkdir()
  for path in root.glob('*.flac'):
    if path.name not in ('7.flac', '10.flac', '23.flac'):
      (folder / path.name).write_bytes(path.read_bytes())
  data = {'root': str(folder), 'csv': str(root / 'splits.csv'), 'seconds': 0.5}
  with pytest.raises(UserError, match=r'3 of 60 clips cannot be read \(7.flac, 10.flac, 23.flac; all'):
    evaluate(str(tmp_path), data=data, **settings | {'init': str(tmp_path / 'not looked at yet')})
  with pytest.raises(UserError, match="config.data.damaged='maybe': unknown; use fail or skip"):
    evaluate(str(tmp_path), data=data | {'damaged': 'maybe'}, **settings)


def test_a_model_without_text_is_told_before_anything_is_extracted(root, tmp_path):
  silent = save_portable(tiny_weights(text_width=None), tmp_path / 'silent')
  with pytest.raises(UserError, match='no CLAP head, which zeroshot needs'):
    run(root, silent, tmp_path, 'zeroshot', 'splits')
  assert not (tmp_path / 'features').exists()


def test_features_that_are_no_numbers_are_told_with_their_clip(root, model, tmp_path):
  pipeline = m2d_clap_jax.load(model)
  compute = pipeline.features
  pipeline.features = lambda waves: (compute(waves)[0] + np.where(np.arange(len(waves)) == 3, np.nan, 0)[:, None], None)
  with pytest.raises(UserError, match='^3.flac: the model gives NaN'):
    extract(pipeline, open_task('splits', str(root), seconds=0.5), tmp_path)
  assert not list(tmp_path.iterdir())
