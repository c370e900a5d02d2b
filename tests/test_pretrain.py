"""The whole training run: files in, checkpoints, logs and figures out; killed, continued, and misused."""
import functools
import importlib.util
import json
import os
import pathlib
import signal
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import soundfile
from ml_collections import ConfigDict

from m2d_clap_jax import sharding
from m2d_clap_jax.data.prepare import prepare
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.train import pretrain
from m2d_clap_jax.train.checkpoint import Checkpoints
from m2d_clap_jax.train.prepared_data import open_data
from tests import launched
from tests.conftest import COMPILE_FAST
from tests.prepare_helpers import noise, write_manifest

ROOT = pathlib.Path(__file__).parent.parent
TINY = {'width': 32, 'depth': 1, 'heads': 2, 'predictor_width': 16, 'predictor_depth': 1, 'predictor_heads': 2,
        'input_size': (80, 32), 'text_width': 8}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  """Whole runs take one device; tests/test_step.py has what eight change, namely nothing."""
  monkeypatch.setattr(pretrain.sharding, 'make_mesh', functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))


def get_config(variant='small_2s'):
  spec = importlib.util.spec_from_file_location('pretrain_config', ROOT / 'configs' / 'pretrain.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(variant)


def tiny_config(data, **changes):
  config = get_config()
  config.data.folder = str(data)
  config.model.update(TINY)
  changes = {'batch_size': 16, 'steps': 4, 'log_every': 2, 'save_every': 2, 'statistics_every': 4, 'evals_every': 4,
             'schedule.warmup_steps': 1, **changes}
  config.update_from_flattened_dict(changes)
  return config


def flags(config):
  """The command that runs `config`: every difference from its variant as an option."""
  plain = get_config()
  options = [f'--config.data.folder={config.data.folder}']
  for section in ('model', 'schedule'):
    options += [f'--config.{section}.{k}={v}' for k, v in config[section].items() if v != plain[section][k]]
  options += [f'--config.{k}={v}' for k, v in config.items()
              if not isinstance(v, ConfigDict) and v is not None and v != plain[k]]
  return ['--config=configs/pretrain.py:small_2s', *options]


# One device: processes that are started again and again need not pretend to be eight.
ENVIRONMENT = {**os.environ, 'XLA_FLAGS': COMPILE_FAST}


def losses(workdir):
  """{step: values} of what a run computed, without its timings."""
  rows = {}
  for line in (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines():
    row = json.loads(line)
    step = row.pop('step')
    assert not set(row) & set(rows.get(step, {})), f'step {step} was logged twice'
    rows.setdefault(step, {}).update({k: v for k, v in row.items() if k not in ('samples_per_second', 'data_wait')})
  return rows


def test_a_run_leaves_checkpoints_logs_and_figures(data, tmp_path):
  pretrain.run(tiny_config(data), tmp_path)
  rows = losses(tmp_path)
  assert sorted(rows) == [2, 4]
  assert {'loss', 'loss_m2d', 'loss_clap', 'grad_norm', 'param_norm', 'logit_scale', 'ema_decay',
          'learning_rate', 'retrieval_audio_to_text', 'features/effective_rank'} <= set(rows[4])
  assert Checkpoints(tmp_path).latest() == 4
  for name in ('mask.png', 'curves.png'):
    assert (tmp_path / name).read_bytes()[:4] == b'\x89PNG'
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
  events = EventAccumulator(str(tmp_path))
  events.Reload()
  assert events.Tensors('loss')[-1].step == 4


def test_training_without_captions_and_by_pixels(data, tmp_path):
  for name, model in {'m2d': {}, 'msm_mae': {'predict': 'pixels', 'mask_ratio': 0.75}}.items():
    config = tiny_config(data, steps=2)
    config.model.update({'text_width': None, **model})
    pretrain.run(config, tmp_path / name)
    assert 'loss_clap' not in losses(tmp_path / name)[2]


def wait_for(process, reached, timeout=600):
  deadline = time.monotonic() + timeout
  while process.poll() is None and not reached():
    assert time.monotonic() < deadline, 'the run does not get on'
    time.sleep(0.002)


def test_killed_at_random_moments_and_during_a_save_a_run_continues_bit_for_bit(data, tmp_path):
  config = tiny_config(data, steps=40, log_every=7, save_every=5, statistics_every=20, evals_every=40)
  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  launched.run(*flags(config), f'--workdir={whole}', env=ENVIRONMENT)
  draw = np.random.default_rng(0)

  def saving():
    return any((broken / 'checkpoints').glob('*tmp*'))

  def reached_step(step):
    text = (broken / 'metrics.jsonl').read_text() if (broken / 'metrics.jsonl').exists() else ''
    return f'"step": {step}' in text
  moments = [saving, lambda: reached_step(14), saving]
  kills = 0
  while True:
    process = launched.Main(*flags(config), f'--workdir={broken}', env=ENVIRONMENT)
    if kills < len(moments):
      wait_for(process, moments[kills])
      time.sleep(draw.uniform(0, 0.05))
      process.send_signal(signal.SIGKILL)
    error = process.communicate()[1].decode()
    if process.returncode == 0:
      break
    assert process.returncode == -signal.SIGKILL, error
    kills += 1
  assert kills >= 2
  assert losses(broken) == losses(whole)


def one_line(result):
  lines = [line for line in result.stderr.strip().splitlines() if line]
  assert result.returncode == 2 and len(lines) == 1, result.stderr
  return lines[0]


@pytest.mark.parametrize('options,words', [
    (['--config=configs/pretrain.py:smal'], ['smal', 'unknown variant', 'small_2s']),
    (['--config=configs/nothing.py'], ['configs/nothing.py']),
    (['--config=configs/pretrain.py', '--config.batchsize=3'], ['batchsize', 'batch_size']),
    (['--config=configs/pretrain.py', '--config.batch_size=many'], ['batch_size', 'many']),
    (['--config=configs/pretrain.py', '--wordkir=x'], ['wordkir']),
    (['--config=configs/pretrain.py', 'extra'], ['extra']),
    ([], ['--config is missing']),
    (['--config=configs/pretrain.py', '--workdir=/dev/null/x'], ['/dev/null/x', 'choose another']),
    (['--config=configs/pretrain.py', '--workdir=WORKDIR'], ['config.data.folder is empty', 'm2d-clap prepare']),
])
def test_a_mistake_in_the_command_is_one_line_that_says_what_to_do(options, words, tmp_path):
  options = [option.replace('WORKDIR', str(tmp_path)) for option in options]
  line = one_line(launched.run(*options, env=ENVIRONMENT, check=False))
  for word in words:
    assert word in line


@pytest.mark.parametrize('text, message', [
    ('def get_config():\n  return no_such_name', "line 2: name 'no_such_name' is not defined"),
    ('import no_such_module', "line 1: No module named 'no_such_module'"),
    ('def get_config(:\n', 'line 1: invalid syntax'),
    ('x = 1', "has no attribute 'get_config'"),
    ('from m2d_clap_jax.configs import pretrain\ndef get_config():\n  config = pretrain.base()\n  config.batch_sise = 7\n'
     '  return config',
     "config.batch_sise: unknown key; did you mean 'batch_size'? (FILE line 4)"),
])
def test_a_mistake_in_a_configuration_is_reported_with_the_line_of_the_users_file(text, message, tmp_path):
  file = tmp_path / 'mine.py'
  file.write_text(text)
  line = one_line(launched.run(f'--config={file}', f'--workdir={tmp_path / "run"}', env=ENVIRONMENT, check=False))
  assert str(file) in line and message.replace('FILE', str(file)) in line


@pytest.mark.parametrize('changes,words', [
    ({'batch_size': 20}, ['batch_size=20', '8 devices', 'multiple of 8']),
    ({'batch_size': 48}, ['batch_size=48', '40 clips']),
    ({'loss.accumulate': 3}, ['accumulate=3', 'multiple of 24']),
    ({'model.text_width': 384}, ['8 wide', 'text_width']),
    ({'model.input_size': (64, 32)}, ['80 mel bins', 'input_size']),
    ({'model.input_size': (80, 10)}, ['10 frames', 'patch']),
    ({'model.mask_ratio': 1.0}, ['mask_ratio=1.0', '0 of 10 patches']),
    ({'model.predict': 'pixel'}, ['predict', 'pixels']),
    ({'model.dtype': 'bfloat'}, ['dtype', 'bfloat16']),
    ({'log_every': 0}, ['log_every=0']),
    ({'loss.accumulate': 0}, ['config.loss.accumulate=0', 'at least 1']),
    ({'checkpoints.keep': 0}, ['config.checkpoints.keep=0', 'at least 1']),
    ({'checkpoints.keep_every': 0}, ['config.checkpoints.keep_every=0']),
    ({'model.audio_projector': 'MLP'}, ['audio_projector', 'mlp, semantic']),
    ({'model.text_projector': 'Linear'}, ['text_projector', 'identity, linear, mlp']),
    ({'model.text_projector': 'identity'}, ['text_projector=identity', 'text_width=32', 'is 8']),
    ({'model.heads': 5}, ['config.model.width', 'heads']),
    ({'data.sample_rate': 32000}, ['16000', '32000']),
    ({'data.split': 'valid'}, ['valid', 'train']),
    ({'epochs': 0.1, 'steps': None}, ['no step']),
])
def test_settings_that_do_not_fit_are_refused_by_name(changes, words, data, tmp_path, monkeypatch):
  monkeypatch.undo()  # all eight devices
  with pytest.raises(UserError) as error:
    pretrain.run(tiny_config(data, **changes), tmp_path)
  assert '\n' not in str(error.value)
  for word in words:
    assert word in str(error.value)


@pytest.mark.parametrize('section,key,nearest', [
    ('optim', 'wieght_decay', 'weight_decay'), ('model', 'widht', 'width'), ('loss', 'clap_wieght', 'clap_weight'),
    ('schedule', 'warmup', 'warmup_'), ('ema', 'strat', 'start'), ('checkpoints', 'kep', 'keep'), (None, 'sed', 'seed')])
def test_a_misspelt_key_is_named_with_the_nearest_valid_one(section, key, nearest, data, tmp_path):
  config = tiny_config(data)
  (config[section] if section else config)[key] = 1
  with pytest.raises(UserError, match=rf"config\.{section + '.' if section else ''}{key}: unknown key; .*{nearest}"):
    pretrain.run(config, tmp_path)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(data, tmp_path):
  config = tiny_config(data, steps=20, **{'schedule.base_learning_rate': 1e30, 'schedule.warmup_steps': 0})
  with pytest.raises(UserError, match=r'became (nan|inf).*learning rate in config.schedule'):
    pretrain.run(config, tmp_path)
  assert Checkpoints(tmp_path).latest() == 0
  state = ocp.StandardCheckpointer().restore(tmp_path / 'checkpoints' / '0' / 'state')
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_a_loss_that_is_no_number_is_found_before_statistics_and_evaluations_are_made_of_it(data, tmp_path):
  config = tiny_config(data, steps=20, log_every=20, save_every=20, statistics_every=3, evals_every=20,
                       **{'schedule.base_learning_rate': 1e30, 'schedule.warmup_steps': 0})
  with pytest.raises(UserError, match=r'became (nan|inf).*learning rate in config.schedule'):
    pretrain.run(config, tmp_path)


def test_a_full_disk_during_a_save_is_one_line_and_the_last_checkpoint_stays(data, tmp_path, monkeypatch):
  pretrain.run(tiny_config(data, steps=2), tmp_path)

  def refuse(*args, **kwargs):
    raise OSError(28, 'No space left on device')
  with monkeypatch.context() as full:
    full.setattr('orbax.checkpoint.CheckpointManager.save', refuse)
    with pytest.raises(UserError, match='No space left on device.*continues from the last complete'):
      pretrain.run(tiny_config(data, steps=4), tmp_path)
  pretrain.run(tiny_config(data, steps=4), tmp_path)
  assert Checkpoints(tmp_path).latest() == 4


def test_another_model_than_the_checkpoints_is_refused(data, tmp_path):
  pretrain.run(tiny_config(data, steps=2), tmp_path)
  config = tiny_config(data)
  config.model.width = 64
  with pytest.raises(UserError, match='does not fit this configuration.*another --workdir'):
    pretrain.run(config, tmp_path)


def test_real_captions_and_zero_shot_evaluation_by_a_real_sentence_encoder(tmp_path):
  rows = []
  (tmp_path / 'audio').mkdir()
  for i in range(24):
    name = ('low hum', 'noise')[i % 2]
    wave = 0.3 * np.sin(np.arange(8000) * (0.02 + 0.001 * i)) if name == 'low hum' else noise(0.5, seed=i)
    soundfile.write(tmp_path / 'audio' / f'{i}.wav', wave, 16000)
    rows.append((f'{i}.wav', f'{name} can be heard', name, 'test' if i >= 16 else 'train'))
  manifest = write_manifest(tmp_path / 'audio' / 'manifest.csv', rows)
  prepare(manifest, tmp_path / 'audio', tmp_path / 'records', text_encoder='minilm', workers=2)
  config = tiny_config(tmp_path / 'records', steps=20, log_every=10, save_every=20, evals_every=20, statistics_every=20)
  config.model.text_width = 384
  config.evals = ConfigDict({
      'sound': {'kind': 'zeroshot'}, 'probe': {'kind': 'logistic'}, 'found': {'kind': 'retrieval'},
      'tags': {'kind': 'zeroshot', 'multi_label': True, 'template': ('{}', '{} can be heard')},
      'linear': {'kind': 'linear', 'protocol': {'runs': 2, 'learning_rate': 1e-2, 'max_epochs': 40}}})
  pretrain.run(config, tmp_path / 'run')
  rows = losses(tmp_path / 'run')
  assert rows[20]['sound/chance'] == 0.5
  assert rows[20]['probe/accuracy'] == rows[20]['linear/accuracy'] == 1.0
  assert rows[20]['tags/mAP'] >= rows[20]['tags/chance'] == 0.5
  # Two captions of four clips each: whichever clip a caption finds first, that is one clip for four equal queries.
  assert rows[20]['found/text_to_audio/R@1'] <= 0.25 and rows[20]['found/audio_to_text/median_rank'] >= 4
  assert {'sound_confusion.png', 'sound_similarity.png', 'sound.json'} <= set(os.listdir(tmp_path / 'run'))


def test_other_data_under_the_same_name_are_reported_or_refused(data, capsys):
  found = open_data(True, folder=str(data))
  before = found.about({}) | {'norm_stats': [-6.5, 3.5]}
  for checkpoint in ({}, before, {key: value for key, value in before.items() if key != 'data'}):
    pretrain.check_data(checkpoint, found)
  assert not capsys.readouterr().err
  changed = before | {'data': {**before['data'], 'fingerprints': ['0']}}
  pretrain.check_data(changed, found)
  line, = capsys.readouterr().err.splitlines()
  assert f'{data} has fingerprint {found.split.fingerprint} instead of 0; it keeps its own mean -6.5000 and ' in line
  assert found.about(changed)['data'] == changed['data'], 'it is reported each time'
  for change, message in (({'data': {'clips': 9999, 'fingerprints': ['0']}}, 'number of clips: .* began with 9999'),
                          ({'data': {**before['data'], 'fingerprints': ['0', '1']}}, 'number of folders: 1, .* began with 2'),
                          ({'text_encoder': None}, 'text encoder of the captions: .* began with None'),
                          ({'logmel': {**before['logmel'], 'n_fft': 800}}, 'log-mels')):
    with pytest.raises(UserError, match=message):
      pretrain.check_data(before | change, found)
