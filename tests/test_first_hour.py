"""What a newcomer meets in the first hour: names, versions, scores beside chance, and mistakes told in one line."""
import collections
import configparser
import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import librosa.filters
import numpy as np
import pytest
import soundfile
import yaml
from huggingface_hub import constants

import m2d_clap_jax
from m2d_clap_jax import huggingface
from m2d_clap_jax.audio.logmel import LogMel, mel_filters
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.eval import finished, metrics, report
from m2d_clap_jax.models import SIZES
from m2d_clap_jax.startup import CACHE
from m2d_clap_jax.train import pretrain
from m2d_clap_jax.train.prepared_data import open_data
from m2d_clap_jax.weights import family, read
from m2d_clap_jax.weights.portable import save_portable
from m2d_clap_jax.weights.public import model_name
from tests.command_helpers import run, save_model
from tests.small_model import tiny_weights
from tests.test_commands_plot import write_run
from tests.test_pretrain import get_config, one_device, tiny_config  # noqa: F401

ROOT = pathlib.Path(__file__).parent.parent


def version_in_setup_cfg():
  parser = configparser.ConfigParser()
  parser.read(ROOT / 'setup.cfg')
  return parser['metadata']['version']


def test_the_version_is_that_of_setup_cfg_installed_or_not(capsys):
  code = ('import importlib.metadata as m\n'
          'def missing(_): raise m.PackageNotFoundError\n'
          'm.version = missing\n'
          'import m2d_clap_jax; print(m2d_clap_jax.__version__)')
  bare = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  assert bare.stdout.strip() == version_in_setup_cfg(), bare.stderr
  with pytest.raises(SystemExit) as stopped:
    run('--version')
  assert stopped.value.code == 0 and capsys.readouterr().out == f'm2d-clap {m2d_clap_jax.__version__}\n'


def test_dir_lists_the_public_names():
  assert {'load', 'Pipeline', '__version__'} <= set(dir(m2d_clap_jax))


def test_a_model_says_what_it_is():
  shown = repr(m2d_clap_jax.load(tiny_weights()))
  weights = tiny_weights()
  for part in (family(weights), '16 kHz', f'chunks of {weights.model["input_size"][1] / 100:g} s', 'captions by minilm'):
    assert part in shown
  assert 'no captions' in repr(m2d_clap_jax.load(dataclasses.replace(tiny_weights(text_width=None), text_encoder=None)))


def test_a_size_has_its_name_by_width_and_depth():
  narrow = {key: SIZES['tiny'][key] for key in ('width', 'heads')}
  assert '(tiny, ' in family(tiny_weights(**narrow, depth=12))
  six = tiny_weights(**narrow, depth=6)
  assert '(width 192, 6 blocks, ' in family(six) and model_name(six) == 'm2d_clap_vit_w192d6'


def test_tables_name_models_by_path_and_have_chance_beside_every_score():
  ranks = metrics.audio_text_retrieval(np.eye(20), np.arange(20))
  common = {'task': 'mine', 'metric': 'accuracy', 'model': {'source': 'runs/a', 'fingerprint': '0123456789abcdef'}}
  text = report.tables([{'job': 'linear', 'score': 0.5, 'chance': metrics.chance(np.eye(8)), **common},
                        {'job': 'retrieval', 'score': 1.0, **ranks, **common}])
  assert '| mine | runs/a | accuracy | 50.0 |  | 12.5 |' in text and '0123' not in text
  assert text.count('| R@1 by chance |') == 1 and text.count(' | 5.0 |\n') == 2


def test_chance_is_what_random_scores_get():
  rng = np.random.default_rng(0)
  targets = (rng.random((4000, 5)) < [0.1, 0.2, 0.3, 0.4, 0.5]).astype(np.float32)
  assert metrics.mean_average_precision(targets, rng.random((4000, 5))) == pytest.approx(metrics.chance(targets), abs=0.01)
  relevant = np.repeat(np.eye(10, dtype=bool), 3, axis=1)
  drawn = np.mean([metrics.retrieval(rng.random((10, 30)), relevant)['R@1'] for _ in range(300)])
  assert drawn == pytest.approx(metrics.retrieval(1.0 * relevant, relevant)['chance'], abs=0.02)


@pytest.mark.parametrize('rate', [16000, 32000])
def test_the_mel_filters_are_librosas_to_the_bit(rate):
  spec = LogMel.for_rate(rate)
  theirs = librosa.filters.mel(sr=rate, n_fft=spec.n_fft, n_mels=spec.n_mels, fmin=spec.f_min, fmax=spec.f_max,
                               htk=False, norm='slaney', dtype=np.float32)
  np.testing.assert_array_equal(mel_filters(spec), theirs)


def test_opening_a_model_compiles_nothing(caplog, tmp_path):
  folder = save_model(tmp_path / 'model', input_size=(80, 112))  # a size that nothing else here has
  with jax.log_compiles():
    read(folder)
  assert 'Compiling' not in caplog.text


def test_a_model_keeps_the_frequent_labels_of_its_training_data(data, tmp_path):
  found = open_data(False, folder=str(data))
  counts = collections.Counter(label for clip in found.split.clips(range(found.split.num_clips)) for label in clip.labels)
  labels = found.about({})['data']['labels']
  assert labels and sorted(counts[label] for label in labels) == sorted(counts.values())[-len(labels):]
  weights = dataclasses.replace(tiny_weights(patch_size=(16, 16)), labels=tuple(labels))
  assert read(save_portable(weights, tmp_path / 'model')).labels == tuple(labels)


def test_another_number_of_labels_compiles_nothing(caplog):
  model = m2d_clap_jax.load(tiny_weights())
  with jax.log_compiles():
    model.encode_labels(['dog', 'rain', 'church bells'])
    assert 'Compiling' in caplog.text
    caplog.clear()
    model.encode_labels(['cat', 'wind', 'street music', 'siren', 'a baby'])
  assert 'Compiling' not in caplog.text


@pytest.mark.parametrize('given, kept', [(None, True), ('', False), ('own', False)])
def test_compiled_programs_are_kept_in_the_users_cache_unless_told_otherwise(given, kept, tmp_path):
  env = {**os.environ, 'XDG_CACHE_HOME': str(tmp_path)} | ({} if given is None else {CACHE: given})
  if given is None:
    del env[CACHE]
  code = ('from m2d_clap_jax.startup import prepare_process; prepare_process()\n'
          'import jax, jax.numpy as jnp\n'
          'jax.jit(lambda x: jnp.linalg.svd(jnp.sort(x @ x.T)))(jnp.ones((8, 8)))')
  env['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
  done = subprocess.run([sys.executable, '-c', code], env=env | {'PYTHONPATH': str(ROOT)}, cwd=tmp_path, capture_output=True,
                        text=True)
  assert done.returncode == 0 and done.stderr == ''
  assert any(path.is_file() for path in (tmp_path / 'm2d_clap_jax').rglob('*')) == kept


@pytest.mark.parametrize('variant, steps, warmup', [('small_2s', 1960, 196), ('demo', 480, 48), ('small_2s', 100, 10)])
def test_small_variants_warm_up_for_a_tenth_of_any_run(variant, steps, warmup, capsys):
  options = get_config(variant).schedule.to_dict()
  rate = pretrain.make_schedule(batch_size=256, epoch=10.0, total=steps, **options)
  peak = options['base_learning_rate']
  assert float(rate(warmup)) == pytest.approx(peak) and float(rate(warmup - 1)) == pytest.approx(peak * (1 - 1 / warmup))
  assert capsys.readouterr().err == ''


def test_a_run_that_is_all_warm_up_is_told(capsys):
  recipe = get_config('base').schedule.to_dict()
  pretrain.make_schedule(batch_size=2048, epoch=100.0, total=30000, **recipe)
  assert capsys.readouterr().err == ''
  pretrain.make_schedule(batch_size=2048, epoch=100.0, total=2000, **recipe)
  assert 'the warm-up, 2000 steps, is no shorter than the run, 2000 steps' in capsys.readouterr().err


def test_training_says_that_it_compiles_and_shows_the_first_step_at_once(data, tmp_path, capsys, one_device):  # noqa: F811
  pretrain.run(tiny_config(data, steps=2, log_every=2, save_every=2, statistics_every=9, evals_every=9), str(tmp_path))
  told = capsys.readouterr().err
  assert told.index('compiling the update ...') < told.index('step 1/2  loss ') < told.index('step 2/2  loss ')
  assert [json.loads(line)['step'] for line in (tmp_path / 'metrics.jsonl').read_text().splitlines() if '"loss"' in line
          ] == [2], 'the row is shown, not logged: means are over log_every steps'


def test_figures_are_named_after_runs_and_lie_with_the_first(tmp_path, monkeypatch):
  runs = [write_run(tmp_path / name, 1.0) for name in ('a', 'b')]
  other = write_run(tmp_path / 'deep', 2.0).rename(tmp_path / 'b' / 'a')
  (tmp_path / 'a' / 'curves.png').write_bytes(b'of the run itself')
  monkeypatch.chdir(tmp_path)
  assert run('plot', 'a') == 0 and run('plot', *runs) == 0 and run('plot', 'a', other.relative_to(tmp_path)) == 0
  drawn = {path.name for path in (tmp_path / 'a').glob('*_curves.png')}
  assert drawn == {'a_curves.png', 'a+b_curves.png', 'a+b_a_curves.png'} and not list(tmp_path.glob('*.png'))
  assert (tmp_path / 'a' / 'curves.png').read_bytes() == b'of the run itself'


def main_py(*options, **env):
  return subprocess.run([sys.executable, str(ROOT / 'main.py'), *options], capture_output=True, text=True,
                        env={**os.environ, **env}, cwd=ROOT.parent)


def test_a_device_that_is_not_there_is_told_in_a_line(tmp_path):
  code = 'import sys; from m2d_clap_jax.cli import main; sys.exit(main.main())'
  soundfile.write(tmp_path / 'a.wav', np.zeros(16000), 16000)
  command = ['embed', tmp_path / 'a.wav', '--model', save_model(tmp_path / 'model'), '-o', tmp_path / 'a.npz']
  done = subprocess.run([sys.executable, '-c', code, *command], capture_output=True, text=True,
                        env={**os.environ, 'JAX_PLATFORMS': 'rocm', 'PYTHONPATH': str(ROOT)})
  assert done.returncode == 2 and done.stderr.startswith('m2d-clap: JAX_PLATFORMS=rocm: there is no such device')
  assert done.stderr.count('\n') == 1


def test_a_configuration_outside_the_checkout_builds_on_ours_and_is_shown_whole(tmp_path):
  (tmp_path / 'mine.py').write_text('from m2d_clap_jax.configs import pretrain\n\n\ndef get_config():\n'
                                    "  config = pretrain.get_config('small_2s')\n  config.steps = 7\n  return config\n")
  done = main_py(f'--config={tmp_path}/mine.py', '--config.batch_size=9', '--config.print=True')
  assert done.returncode == 0, done.stderr
  shown = yaml.safe_load(done.stdout.replace('!!python/tuple', ''))
  assert shown['batch_size'] == 9 and shown['steps'] == 7 and shown['model']['width'] == 192
  wrong = main_py(f'--config={tmp_path}/mine.py', '--config.bach_size=9', '--config.print=True')
  assert wrong.stderr == 'error: --config: there is no setting bach_size; did you mean batch_size?\n'


@pytest.mark.parametrize('option,message', [
    ('optim.learning_rate=1', '--config: there is no setting learning_rate; did you mean config.schedule.base_learning_rate?'),
    ('steps=1e3', "--config.steps=1e3: '1e3' is no whole number"),
    ('schedule.base_learning_rate=x', "--config.schedule.base_learning_rate=x: 'x' is no number")])
def test_a_wrong_setting_is_said_in_one_line_with_what_may_have_been_meant(option, message):
  done = main_py('--config=configs/pretrain.py:small_2s', f'--config.{option}')
  assert (done.returncode, done.stderr) == (2, f'error: {message}\n')


def test_a_dry_run_opens_data_and_model_and_trains_nothing(data, tmp_path, capsys, one_device):  # noqa: F811
  config = tiny_config(data)
  pretrain.run(config, str(tmp_path / 'run'), dry_run=True)
  told = capsys.readouterr().out
  assert 'MB/device' in told and '40 clips' in told and 'steps 0 to 4' in told and 'nothing was trained' in told
  assert not [path for path in (tmp_path / 'run').rglob('*') if path.is_file() and path.name != '.lock']
  config.model.text_width = 9
  with pytest.raises(UserError, match='8 wide'):
    pretrain.run(config, str(tmp_path / 'run'), dry_run=True)


def test_retrieval_of_clips_without_captions_is_told_before_the_model_is_opened(tmp_path):
  soundfile.write(tmp_path / 'a.wav', np.zeros(1600), 16000)
  (tmp_path / 'mine.csv').write_text('file_name,label,split\na.wav,dog,test\n')
  settings = dict(job='retrieval', task='mine', init='nowhere', data={'root': str(tmp_path)}, seed=0, model={}, protocol={})
  with pytest.raises(UserError, match='mine: has no captions: add the column caption'):
    finished.evaluate(str(tmp_path / 'run'), **settings)
  assert not (tmp_path / 'run').exists()


def test_a_hub_that_never_answers_is_given_up_on(monkeypatch):
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
  with socket.socket() as silent:
    silent.bind(('127.0.0.1', 0))
    silent.listen()
    monkeypatch.setattr(constants, 'ENDPOINT', f'http://127.0.0.1:{silent.getsockname()[1]}')
    start = time.monotonic()
    assert huggingface.is_silent(seconds=0.3) and time.monotonic() - start < 5
