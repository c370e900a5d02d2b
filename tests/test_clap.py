"""Whole runs of stage 2: from a model, prepared folders and a text encoder to a model with its own text encoder inside."""
import functools
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import soundfile
from ml_collections import ConfigDict

import m2d_clap_jax
from m2d_clap_jax import sharding
from m2d_clap_jax.data.prepare import prepare
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.models.classifier import position_table
from m2d_clap_jax.train import clap
from m2d_clap_jax.train.checkpoint import read_parameters
from m2d_clap_jax.weights import read
from m2d_clap_jax.weights.portable import save_portable
from m2d_clap_jax.weights.public import save_pth
from tests import launched
from tests.command_helpers import save_model
from tests.prepare_helpers import corpus, noise
from tests.test_clap_step import save_encoder
from tests.test_pretrain import ENVIRONMENT, losses, wait_for

ROOT = pathlib.Path(__file__).parent.parent
SIZES = {'a': 20, 'b': 12}


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  """Two prepared folders without embeddings, a model for crops of 96 frames, and a text encoder with dropout."""
  place = tmp_path_factory.mktemp('clap')
  for name, count in SIZES.items():
    manifest = corpus(place / 'audio' / name, count, seconds=1.4)
    prepare(manifest, place / 'audio' / name, place / name, text_encoder='none', workers=1)
  save_model(place / 'model', depth=1)
  (place / 'bert').mkdir()
  save_encoder(place / 'bert', 0.1)
  return place


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  monkeypatch.setattr(clap.sharding, 'make_mesh', functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))


def options(place, **changes):
  return {'init': str(place / 'model'), 'data.folder': f'{place}/a,{place}/b', 'text.encoder': str(place / 'bert'),
          'text.pooling': 'cls', 'model.frames': 128, 'mask_ratio': 0.3, 'batch_size': 8, 'steps': 4, 'log_every': 2,
          'save_every': 2, **changes}


def get_config(changes, variant='small_2s'):
  spec = importlib.util.spec_from_file_location('clap_config', ROOT / 'configs' / 'clap.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(variant)
  config.update_from_flattened_dict(changes)
  return config


@pytest.fixture(scope='module')
def trained(place, tmp_path_factory):
  """A finished run with the first-token encoder -> its workdir."""
  workdir = tmp_path_factory.mktemp('trained')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(clap.sharding, 'make_mesh', functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))
    config = get_config(options(place, evals_every=4, **{'schedule.base_learning_rate': 0.1, 'schedule.warmup_epochs': 0.0}))
    config.evals = ConfigDict({'found': {'kind': 'retrieval', 'split': 'train'},
                               'sound': {'kind': 'zeroshot', 'split': 'train', 'template': '{} kind'}})
    clap.run(config, workdir)
  return workdir


def test_the_audio_encoder_stays_and_the_rest_learns(place, trained):
  before, after = read(place / 'model'), read(trained)
  for path, value in before.trees['params'].items():
    if path.startswith(('cls_token', 'patch_embed/', 'encoder/')):
      np.testing.assert_array_equal(after.trees['params'][path], value, err_msg=path)
  np.testing.assert_array_equal(after.trees['tables']['pos_embed'], position_table(before.network(), 8))
  assert np.abs(after.trees['params']['audio_proj/token']).max() > 0
  assert not any(path.startswith('predictor') for path in after.trees['params'])
  rows = losses(trained)
  assert rows[4]['clips/a'] + rows[4]['clips/b'] == 32
  assert (rows[4]['clips/a'], rows[4]['clips/b']) == (20, 12)  # 4 batches of 8: each clip once
  assert {'loss', 'loss_clap', 'grad_norm', 'logit_scale', 'learning_rate', 'retrieval_text_to_audio'} <= set(rows[4])


def test_each_folder_has_its_own_loss_in_the_log_and_their_clips_that_of_the_whole(trained):
  rows = losses(trained)
  counts = {name: rows[4][f'clips/{name}'] - rows[2][f'clips/{name}'] for name in SIZES}
  assert sum(counts.values()) == 16
  of_each = {name: rows[4].get(f'loss_clap/{name}', 0) for name in SIZES}
  assert len(set(of_each.values())) == 2
  np.testing.assert_allclose(sum(counts[name] * of_each[name] for name in SIZES) / 16, rows[4]['loss_clap'], rtol=1e-5)


def test_evaluations_take_the_text_encoder_as_it_is_then(trained):
  rows = losses(trained)
  for name in ('found/text_to_audio/mAP@10', 'sound/accuracy'):
    assert 0 <= rows[0][name] <= 1 and 0 <= rows[4][name] <= 1
  assert rows[0]['found/text_to_audio/mAP@10'] != rows[4]['found/text_to_audio/mAP@10']


def test_a_finished_run_is_a_model_with_its_own_text_encoder(trained, tmp_path):
  model = m2d_clap_jax.load(trained)
  captions = ['sound number 3', 'kind 2']
  text, audio = model.encode_text(captions), model.encode_audio(noise(2.0)[None])
  assert text.shape == (2, 96) and audio.shape == (1, 96)
  assert model.classify(noise(1.0)[None], labels=['3', '4']).shape == (1, 2)
  untrained = m2d_clap_jax.text.TextEncoder(model.weights.text_encoder['name'], pooling='cls')
  assert np.abs(untrained(captions) - text).max() > 1e-3, 'the text encoder has learned'
  inside = {'text_encoder': model.weights.text_encoder['name'], 'heads': 3}  # what a file does not tell of so narrow a model
  for again in (m2d_clap_jax.load(save_portable(read(trained), tmp_path / 'portable')),
                m2d_clap_jax.load(save_pth(read(trained), tmp_path), **inside)):
    np.testing.assert_array_equal(again.encode_text(captions), text)
    np.testing.assert_array_equal(again.encode_audio(noise(2.0)[None]), audio)
    assert again.weights.text_encoder['pooling'] == 'cls'
    for name, value in read(trained).text.items():
      np.testing.assert_array_equal(again.weights.text[name], value, err_msg=name)
    assert 'pooler.dense.weight' in again.weights.text
  (tmp_path / 'portable').rename(tmp_path / 'elsewhere')
  alone = m2d_clap_jax.load(tmp_path / 'elsewhere')  # with its tokenizer inside
  assert alone.weights.text_encoder['name'] == str(tmp_path / 'elsewhere' / 'text_encoder')
  np.testing.assert_array_equal(alone.encode_text(captions), text)
  assert 'p16kpBpTI' in next(tmp_path.glob('m2d_clap_vit*')).name


def test_the_next_stage_goes_on_with_text_encoder_and_projector(trained, place, tmp_path):
  changes = options(place, init=str(trained), steps=1, **{'text.encoder': '', 'projector': 'init', 'mask_ratio': 0.0,
                                                          'model.frames': None, 'schedule.warmup_epochs': 5.0})
  clap.run(get_config(changes), tmp_path)  # of one step, at a rate of 0
  before, after = read(trained), read(tmp_path)
  for tree in ('params', 'tables'):
    for path, value in after.trees[tree].items():
      if path != 'logit_scale':
        np.testing.assert_array_equal(value, before.trees[tree][path], err_msg=path)
  for name, value in after.text.items():
    np.testing.assert_array_equal(value, before.text[name], err_msg=name)
  assert after.text_encoder == before.text_encoder and after.network() == before.network()
  assert after.trees['params']['logit_scale'] == np.float32(4.6052)


def test_killed_and_continued_a_run_is_the_same_bit_for_bit_dropout_included(place, tmp_path):
  changes = options(place, steps=8, log_every=1, save_every=2)
  command = ['--config=configs/clap.py:small_2s', *(f'--config.{key}={value}' for key, value in changes.items())]
  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  subprocess.run([sys.executable, 'main.py', *command, f'--workdir={whole}'], cwd=ROOT, env=ENVIRONMENT, check=True,
                 capture_output=True)
  process = launched.Main(*command, f'--workdir={broken}', env=ENVIRONMENT)
  history = broken / 'metrics.jsonl'
  wait_for(process, lambda: history.exists() and '"step": 3' in history.read_text())
  process.kill()
  process.communicate()
  launched.run(*command, f'--workdir={broken}', env=ENVIRONMENT)
  assert losses(broken) == losses(whole) and len(losses(whole)) == 9 - (0 not in losses(whole))
  jax.tree.map(np.testing.assert_array_equal, *(read_parameters(run)[1] for run in (whole, broken)))
  assert os.path.isdir(broken / 'checkpoints' / '8')


def test_other_data_in_the_workdir_of_a_run_are_reported_by_folder_or_refused(trained, place, tmp_path, capsys):
  workdir = shutil.copytree(trained, tmp_path / 'run')
  audio = tmp_path / 'audio'
  manifest = corpus(audio, SIZES['b'], seconds=1.4)
  soundfile.write(audio / '3.wav', noise(1.4, seed=77), 16000)
  prepare(manifest, audio, tmp_path / 'b', text_encoder='none', workers=1)
  changes = {'schedule.base_learning_rate': 0.1, 'schedule.warmup_epochs': 0.0}
  clap.run(get_config(options(place, **changes, **{'data.folder': f'{place}/a,{tmp_path}/b'})), workdir)
  notices = [line for line in capsys.readouterr().err.splitlines() if 'began with' in line]
  assert len(notices) == 1 and f': {tmp_path}/b has fingerprint' in notices[0] and 'keeps its own mean -7.1000' in notices[0]
  with pytest.raises(UserError, match='number of clips: 20, where the run in this --workdir began with 32'):
    clap.run(get_config(options(place, **{'data.folder': f'{place}/a'})), workdir)


@pytest.mark.parametrize('changes,words', [
    ({'init': ''}, 'config.init is empty'), ({'mask_ratio': 1.0}, 'mask_ratio=1.0'),
    ({'projector': 'old'}, "projector='old': unknown; known: new, init"),
    ({'projector': 'init'}, "has projectors for text embeddings 384 wide where the text encoder's are 96 wide"),
    ({'text.pooling': 'max'}, "pools by 'max'"), ({'batch_size': 64}, 'more than the 32 clips'),
])
def test_settings_that_do_not_fit_are_refused_by_name(changes, words, place, tmp_path):
  with pytest.raises(UserError, match=words):
    clap.run(get_config(options(place, **changes)), tmp_path)


def test_a_misspelt_key_is_named(place, tmp_path):
  for section, key in (('text', 'encodr'), ('model', 'frame'), ('loss', 'accumulat')):
    config = get_config(options(place)).unlock()
    config[section][key] = 1
    with pytest.raises(UserError, match=rf'config\.{section}\.{key}: unknown key'):
      clap.run(config, tmp_path)
