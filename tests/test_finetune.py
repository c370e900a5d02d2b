"""Fine-tuning from files to scores: it learns, continues after a kill, and leaves a model that others open."""
import csv
import json
import re
import signal

import numpy as np
import pytest
import soundfile

import m2d_clap_jax
from m2d_clap_jax import weights
from m2d_clap_jax.configs.finetune import VARIANTS, get_config
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.eval import linear_protocol
from m2d_clap_jax.train import finetune, task_data
from m2d_clap_jax.train.faults import EXIT_PREEMPTED
from m2d_clap_jax.weights import public
from tests import launched
from tests.test_pretrain import ENVIRONMENT, losses, one_device, wait_for  # noqa: F401

RATE = 16000
CLASSES = {'low': 300, 'middle': 1200, 'high': 4000}
TINY = {'width': 32, 'depth': 1, 'heads': 2}
# 48 training, 12 validation and 18 test clips of three classes.
ROWS = [(f'{i}.wav', [list(CLASSES)[i % 3]], 'split', part)
        for i, part in enumerate(['train'] * 48 + ['valid'] * 12 + ['test'] * 18)]


def tones(folder, rows, seconds=0.5):
  """Writes (name, labels, column, part) as tones in noise, with their metadata -> folder."""
  folder.mkdir(parents=True, exist_ok=True)
  column = rows[0][2]
  with open(folder / 'mine.csv', 'w', newline='') as file:
    table = csv.writer(file)
    table.writerow(['file_name', 'label', column])
    table.writerows((name, ','.join(labels), part) for name, labels, _, part in rows)
  for i, (name, labels, _, _) in enumerate(rows):
    draw = np.random.default_rng(i)
    time = np.arange(int(seconds * RATE)) / RATE
    wave = 0.02 * draw.standard_normal(len(time))
    for label in labels:
      wave += 0.2 * np.sin(2 * np.pi * CLASSES[label] * draw.uniform(0.9, 1.1) * time)
    soundfile.write(folder / name, wave, RATE)
  return folder


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  return tones(tmp_path_factory.mktemp('tones'), ROWS)


def tiny_config(root, **changes):
  config = get_config('small')
  config.data.update({'root': str(root), 'seconds': 0.5})
  config.model.update(TINY)
  config.augmentation.update({'spec_frequency': 8, 'spec_time': 8})
  config.schedule.update({'learning_rate': 3e-3, 'warmup_epochs': 1.0})
  config.update_from_flattened_dict({'runs': 1, 'batch_size': 16, 'epochs': 6, 'log_every': 2, **changes})
  return config


@pytest.fixture(scope='module')
def run(data, tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    one_device.__wrapped__(patch)
    workdir = tmp_path_factory.mktemp('run')
    finetune.run(tiny_config(data, runs=2), str(workdir))
  return workdir


def test_it_learns_and_reports_runs_with_their_interval(run):
  results = json.loads((run / 'results.json').read_text())
  assert results['job'] == 'finetune' and results['metric'] == 'accuracy'
  assert results['score'] > 0.8 and len(results['trials']) == 2  # chance is a third
  assert results['score'] == pytest.approx(np.mean([row['score'] for row in results['trials']]))
  assert results['interval'] is not None and [row['seed'] for row in results['trials']] == [0, 1]
  assert 'Fine-tuning' in (run / 'results.md').read_text()
  rows = losses(run / 'run0')
  assert rows[18]['loss'] < rows[2]['loss']
  best = max(row['valid/accuracy'] for row in rows.values() if 'valid/accuracy' in row)
  first = min(step for step, row in rows.items() if row.get('valid/accuracy') == best)
  assert results['trials'][0]['best_valid'] == best and results['trials'][0]['epoch'] == first // 3
  assert {'curves.png', 'confusion.png', 'classes.png'} <= {path.name for path in (run / 'run0').iterdir()}


def test_the_best_classifier_opens_elsewhere_and_has_the_score_reported(run, data, tmp_path):
  model = m2d_clap_jax.load(run / 'run0' / 'best')
  assert model.classes == tuple(sorted(CLASSES))
  names = [f'{i}.wav' for i in range(60, 78)]
  logits = model.logits([data / name for name in names])
  truth = [model.classes.index(list(CLASSES)[i % 3]) for i in range(60, 78)]
  reported = json.loads((run / 'run0' / 'result.json').read_text())['score']
  assert np.mean(logits.argmax(axis=1) == truth) == reported
  short = soundfile.read(data / names[0])[0][:RATE // 8].astype(np.float32)
  longer = np.pad(short, (0, round(0.4 * RATE) - len(short)))  # the training's seconds, by silence
  np.testing.assert_allclose(model.logits(short, RATE), model.logits(longer, RATE), atol=0.05)
  as_is = m2d_clap_jax.load(run / 'run0' / 'best', pad_short=False)
  assert np.abs(as_is.logits(short, RATE) - model.logits(short, RATE)).max() > 0.1
  path = public.save_pth(weights.read(run / 'run0' / 'best'), tmp_path)
  assert np.abs(m2d_clap_jax.load(path, heads=2).logits([data / names[0]]) - logits[:1]).max() < 1e-6


def test_a_finished_run_is_not_done_again(run, data):
  before = (run / 'run1' / 'metrics.jsonl').stat().st_mtime_ns
  finetune.run(tiny_config(data, runs=2), str(run))
  assert (run / 'run1' / 'metrics.jsonl').stat().st_mtime_ns == before
  with pytest.raises(UserError, match=r'result.json: was made with other settings \(epochs\)'):
    finetune.run(tiny_config(data, runs=2, epochs=3), str(run))
  with pytest.raises(UserError, match='fine-tuning run.*best'):
    weights.read(run / 'run0')


def test_other_data_in_the_workdir_are_reported_or_refused_and_its_statistics_kept(tmp_path, one_device, capsys):  # noqa: F811
  root, workdir = tones(tmp_path / 'tones', ROWS), tmp_path / 'run'
  finetune.run(tiny_config(root, epochs=1), str(workdir))
  soundfile.write(root / '5.wav', 0.5 * np.random.default_rng(5).standard_normal(9000), RATE)
  table = (root / 'mine.csv').read_text()
  (root / 'mine.csv').write_text(table.replace('\n7.wav,middle', '\n7.wav,high'))
  capsys.readouterr()
  finetune.run(tiny_config(root, epochs=1, runs=2), str(workdir))
  notice, = [line for line in capsys.readouterr().err.splitlines() if 'began with' in line]
  assert '5.wav has bytes 18044 instead of 16044, modified' in notice and ', and 1 more; it keeps its own mean' in notice
  first, second = (weights.read(workdir / name / 'best').network().norm_stats for name in ('run0', 'run1'))
  assert first == second == tuple(json.loads((workdir / 'data.json').read_text())['norm_stats'])
  for text, told in ((table.replace('\n7.wav,middle,train', ''), 'number of clips: 77, .* began with 78'),
                     (table.replace('middle', 'mid'), "classes that differ: .'mid'., .* began with .'middle'.")):
    (root / 'mine.csv').write_text(text)
    with pytest.raises(UserError, match=told):
      finetune.run(tiny_config(root, epochs=1, runs=2), str(workdir))


def test_several_labels_in_folds_with_patchout_and_weights_from_before(run, tmp_path, one_device):  # noqa: F811
  sets = [['low'], ['high'], ['low', 'high'], ['middle', 'high']]
  root = tones(tmp_path / 'tones', [(f'{i}.wav', sets[i % 4], 'fold', 1 + i // 4 % 2) for i in range(32)], seconds=0.9)
  (root / '5.wav').write_bytes(b'nothing')
  config = tiny_config(root, epochs=2, batch_size=4, init=str(run / 'run0' / 'best'))
  config.data.seconds = 0.9
  config.data.damaged = 'skip'
  config.optim.name = 'sgd'
  config.freeze_patch_embed = True
  config.model.dtype = 'bfloat16'
  config.augmentation.update({'patchout': 0.5, 'mixup_on': 'logmel'})
  config.sampling.update({'weighted': True, 'per_epoch': 12})
  finetune.run(config, str(tmp_path / 'run'))
  results = json.loads((tmp_path / 'run' / 'results.json').read_text())
  assert results['metric'] == 'mAP' and [row['fold'] for row in results['trials']] == [1, 2]
  assert results['interval'] is None and list(results['clips']['rejected']) == ['5.wav']
  assert max(losses(tmp_path / 'run' / 'run0_fold1')) == 6
  after, before = weights.read(tmp_path / 'run' / 'run0_fold1' / 'best'), weights.read(run / 'run0' / 'best')
  assert after.network().grid == (5, 6) and before.network().grid == (5, 4)
  assert after.network().norm_stats == before.network().norm_stats
  assert after.trees['head']['kernel'].shape == (32, 3)
  kept, moved = 'patch_embed/kernel', 'encoder/blocks_0/mlp/fc1/kernel'
  np.testing.assert_array_equal(after.trees['params'][kept], before.trees['params'][kept])
  assert np.abs(after.trees['params'][moved] - before.trees['params'][moved]).max() > 0


def test_a_linear_head_starts_with_the_score_of_linear_evaluation(run, data, tmp_path, one_device, capsys):  # noqa: F811
  config = tiny_config(data, epochs=1, head='linear', init=str(run / 'run0' / 'best'))
  config.schedule.update({'learning_rate': 1e-9, 'warmup_epochs': 0.0})  # nothing moves
  finetune.run(config, str(tmp_path / 'run'))
  said = float(re.search(r'head starts from linear evaluation: ([\d.]+)% on validation', capsys.readouterr().err)[1])
  model = m2d_clap_jax.load(run / 'run0' / 'best')
  features = model.embed([data / f'{i}.wav' for i in range(60)])
  problem = linear_protocol.Problem(np.arange(48), np.arange(48, 60), np.arange(60))
  expected, = linear_protocol.run(features, np.eye(3)[[model.classes.index(list(CLASSES)[i % 3]) for i in range(60)]],
                                  [problem], seed=config.seed)
  assert said == pytest.approx(100 * expected.valid_score, abs=0.01)
  head = weights.read(tmp_path / 'run' / 'run0' / 'best').trees['head']
  np.testing.assert_allclose(head['kernel'], expected.kernel, atol=1e-4)
  np.testing.assert_allclose(head['bias'], expected.bias, atol=1e-4)
  for changes, message in (({'init': ''}, "config.head='linear'.*config.init"), ({'head': 'mine'}, 'config.head=.mine.')):
    with pytest.raises(UserError, match=message):
      finetune.run(tiny_config(data, **{'head': 'linear', **changes}), str(tmp_path / 'other'))


def test_recordings_are_kept_whole_but_for_test_clips(data, tmp_path):
  found, rate = task_data.open_data(tmp_path, 'mine', None, beat=print, root=str(data), seconds=0.3)
  assert rate == RATE and found.waves.samples == 4800
  for clip in found.task.clips:
    assert found.waves.lengths[found.places[clip.file]] == (4800 if clip.split == 'test' else 8000)
  folds = tones(tmp_path / 'folds', [(f'{i}.wav', [list(CLASSES)[i % 3]], 'fold', 1 + i % 2) for i in range(12)])
  assert set(task_data.open_data(tmp_path, 'mine', None, beat=print, root=str(folds), seconds=0.3)[0].waves.lengths) == {8000}


def flags(config, plain):
  flat, known = ({f'{name}.{key}' if isinstance(value, dict) else name: each
                  for name, value in tree.to_dict().items()
                  for key, each in (value.items() if isinstance(value, dict) else [('', value)])}
                 for tree in (config, plain))
  return [f'--config.{key}={value}' for key, value in flat.items() if value is not None and value != known[key]]


def test_killed_or_preempted_and_continued_it_ends_as_if_nothing_had_happened(data, tmp_path):
  config = tiny_config(data, epochs=9, save_every=2, log_every=2, evals_every=3)
  config.data.seconds = 0.4  # of 0.5: crops are drawn
  config.augmentation.patchout = 0.5  # and counts of patches
  options = ['--config=configs/finetune.py:small', *flags(config, get_config('small'))]
  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  launched.run(*options, f'--workdir={whole}', env=ENVIRONMENT)
  history, codes = broken / 'run0' / 'metrics.jsonl', []
  for step, sent in ((10, signal.SIGKILL), (14, signal.SIGTERM), (None, None)):
    process = launched.Main(*options, f'--workdir={broken}', env=ENVIRONMENT)
    if step:
      wait_for(process, lambda s=step: history.exists() and f'"step": {s}' in history.read_text())
      process.send_signal(sent)
    error = process.communicate()[1].decode()
    codes.append(process.returncode)
  assert codes == [-signal.SIGKILL, EXIT_PREEMPTED, 0], error
  assert losses(broken / 'run0') == losses(whole / 'run0')
  assert (broken / 'run0' / 'result.json').read_text() == (whole / 'run0' / 'result.json').read_text()
  a, b = (weights.read(folder / 'run0' / 'best').fingerprint for folder in (broken, whole))
  assert a == b


@pytest.mark.parametrize('changes, words', [
    ({'batch_size': 64}, ['batch_size=64', '48 clips']),
    ({'data.root': ''}, ['config.data.root']),
    ({'optim.name': 'sdg'}, ['sdg', 'adamw_amsgrad']),
    ({'optim.momentum': 0.9}, ['config.optim.momentum']),
    ({'augmentation.mixup_on': 'spectrum'}, ['mixup_on', 'waves']),
    ({'last_patch': 'cut'}, ['last_patch', 'drop']),
    ({'last_patch': 'drop', 'data.seconds': 0.1}, ["last_patch='drop'", '11 frames']),
    ({'augmentation.patchout': 1.0}, ['patchout=1.0']),
    ({'sampling.per_epoch': 7}, ['per_epoch=7', 'weighted']),
    ({'epochs': 0}, ['config.epochs=0']),
    ({'data.sample_rate': 44100}, ['44100']),
    ({'model.heads': 5}, ['config.model.width', 'heads']),
    ({'task': 'nothing'}, ['nothing.csv']),
])
def test_settings_that_do_not_fit_are_refused_by_name(changes, words, data, tmp_path, one_device):  # noqa: F811
  with pytest.raises(UserError) as error:
    finetune.run(tiny_config(data, **changes), str(tmp_path))
  for word in words:
    assert word in str(error.value)


def test_variants_are_the_papers_table():
  table = {name: make() for name, make in VARIANTS.items()}
  rows = {name: (c.optim.name, c.schedule.learning_rate, c.batch_size, c.epochs, c.schedule.warmup_epochs,
                 c.augmentation.mixup, c.augmentation.spec_frequency, c.augmentation.spec_time, c.augmentation.patchout,
                 c.augmentation.resize_crop, c.freeze_patch_embed, c.runs) for name, c in table.items()}
  assert rows['as2m'] == ('lars_as_run', 2.0, 64, 70, 15, 0.5, 30, 192, 0.5, False, False, 3)
  assert rows['as20k'] == ('sgd', 0.5, 64, 200, 5, 0.3, 30, 192, 0.5, True, False, 3)
  assert rows['esc50'] == ('sgd', 0.5, 128, 200, 5, 0.0, 15, 48, 0.5, True, True, 3)
  assert rows['spcv2'] == ('sgd', 0.5, 128, 200, 5, 0.3, 30, 48, 0.5, True, False, 3)
  assert rows['vc1'] == ('adamw_amsgrad', 5e-4, 64, 50, 5, 0.0, 30, 48, 0.0, False, False, 3)
  assert {name for name, c in table.items() if c.last_patch == 'drop'} == {'as2m', 'as20k', 'esc50', 'vc1'}
  assert table['as2m'].sampling.per_epoch == 200_000 and table['as2m'].augmentation.mixup_on == 'logmel'
