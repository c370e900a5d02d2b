"""`m2d-clap info` and `m2d-clap convert`: what a model is, and the same model in another form."""
import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2d_clap_jax import paths, weights
from m2d_clap_jax.train.checkpoint import Checkpoints
from m2d_clap_jax.train.step import TrainState
from m2d_clap_jax.weights.portable import save_portable
from tests.command_helpers import run, save_model
from tests.small_model import tiny_weights
from tests.test_cli import ROOT


@pytest.fixture(scope='module')
def complete():
  """Weights with predictor and target."""
  own = tiny_weights(patch_size=(16, 16))
  target = {path.removeprefix('encoder/'): 2 * value for path, value in own.trees['params'].items()
            if path.startswith('encoder/')}
  return dataclasses.replace(own, trees=own.trees | {'target': target})


@pytest.fixture(scope='module')
def model(complete, tmp_path_factory):
  """The same as a portable folder."""
  return save_portable(complete, tmp_path_factory.mktemp('model'))


def facts(capsys, *arguments):
  capsys.readouterr()
  assert run('info', '--json', *arguments) == 0
  return json.loads(capsys.readouterr().out)


def same_weights(actual, expected):
  actual, expected = (weights.read(source) for source in (actual, expected))
  assert actual.fingerprint == expected.fingerprint
  for tree in expected.trees:
    assert set(actual.trees[tree]) == set(expected.trees[tree])
    for path, value in expected.trees[tree].items():
      np.testing.assert_array_equal(actual.trees[tree][path], value)


def test_info_tells_people_and_programs_the_same(complete, model, capsys):
  own = facts(capsys, model)
  sizes = {path: value.size for path, value in complete.trees['params'].items()}
  parts = own['parameters']
  assert parts['total'] == sum(sizes.values()) == parts['encoder'] + parts['predictor'] + parts['clap_head']
  assert parts['predictor'] == sum(size for path, size in sizes.items() if path.startswith('predictor/'))
  assert parts['target_not_in_total'] == sum(value.size for value in complete.trees['target'].values())
  assert own['input'] == {'mel_bins': 80, 'frames': 96, 'seconds': 0.96} and own['grid'] == {'rows': 5, 'columns': 6}
  assert own['fingerprint'] == complete.fingerprint and own['pretraining_can_continue'] is True
  assert own['norm_stats'] == {'mean': -7.1, 'deviation': 4.2} and own['classes'] is None
  assert run('info', model) == 0
  printed = capsys.readouterr().out
  for text in ('M2D-CLAP (width 96, 2 blocks, 80x96, patches 16x16, 16 kHz)', f'total {parts["total"]:,}', 'mean -7.1, deviation',
               'name minilm, pooling mean', complete.fingerprint, 'pretraining can continue  yes'):
    assert text in printed


def test_portable_to_pth_and_back_is_the_same_model_in_every_tensor(model, tmp_path, capsys):
  overrides = ['--heads', 3, '--text_encoder', 'minilm']
  assert run('convert', model, tmp_path / 'pth', '--to', 'pth') == 0
  path, = (tmp_path / 'pth').glob('m2d_clap_vit_w96d2-80x96p16x16-*/checkpoint-0.pth')
  assert str(path) in capsys.readouterr().out
  assert run('convert', path, tmp_path / 'back', *overrides) == 0
  same_weights(tmp_path / 'back', model)
  own = facts(capsys, path, *overrides)
  assert own['encoder']['heads'] == 3 and own['text_encoder']['name'] == 'minilm'
  assert run('convert', model, tmp_path / 'pth', '--to', 'pth') == 2
  assert f'{path}: already exists' in capsys.readouterr().err


def test_info_says_that_a_logit_scale_is_a_default(complete, model, tmp_path, capsys):
  assert facts(capsys, model)['logit_scale']['is_a_default'] is False
  encoder = complete.encoder_only()
  params = {path: value for path, value in encoder.trees['params'].items() if path != 'logit_scale'}
  save_portable(dataclasses.replace(encoder, trees={'params': params}), tmp_path / 'small')
  assert facts(capsys, tmp_path / 'small')['logit_scale'] == {'value': 2.6593, 'is_a_default': True}
  assert run('info', tmp_path / 'small') == 0
  assert 'value 2.6593, is a default yes' in capsys.readouterr().out


def test_the_name_of_an_export_tells_the_text_encoder(model, tmp_path, capsys):
  assert run('convert', model, tmp_path, '--to', 'pth', '--encoder_only', '--text_encoder', 'bert-base-uncased') == 0
  path, = tmp_path.glob('m2d_clap_vit_w96d2-80x96p16x16p16kpB-*/checkpoint-0.pth')
  encoder = facts(capsys, path, '--heads', 3)['text_encoder']
  assert (encoder['name'], encoder['pooling']) == ('bert-base-uncased', 'cls')


def test_encoder_only_leaves_out_what_only_pre_training_needs(model, tmp_path, capsys):
  assert run('convert', model, tmp_path / 'small', '--encoder_only') == 0
  assert 'pre-training cannot continue' in capsys.readouterr().out
  own = weights.read(tmp_path / 'small')
  assert not own.complete and 'target' not in own.trees and 'decoder_pos_embed' not in own.trees['tables']
  assert not [path for path in own.trees['params'] if path.startswith('predictor/')]
  assert own.fingerprint == weights.read(model).fingerprint
  files = [folder / 'model.safetensors' for folder in (tmp_path / 'small', model)]
  assert paths.size(files[0]) < 0.55 * paths.size(files[1])


def test_a_folder_that_holds_something_else_is_not_touched(model, tmp_path, capsys):
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'README.md').write_text('my notes')
  (tmp_path / 'file').write_text('')
  for dst, message in (('full', 'full: has other contents (README.md)'), ('file', 'file: is a file'),
                       ('x.pth', 'give one without .pth, and --to pth')):
    assert run('convert', model, tmp_path / dst) == 2
    assert message in capsys.readouterr().err
  assert (tmp_path / 'full' / 'README.md').read_text() == 'my notes'
  assert run('convert', model, model, '--encoder_only') == 2
  assert 'DST and SRC are the same' in capsys.readouterr().err
  (tmp_path / 'new').mkdir()
  assert run('convert', model, tmp_path / 'new') == 0
  assert run('convert', save_model(tmp_path / 'other', width=48), tmp_path / 'new') == 0, 'a model may be replaced'
  same_weights(tmp_path / 'new', tmp_path / 'other')


def test_sources_and_numbers_that_are_none_are_one_line(tmp_path, capsys):
  for command in (['info', tmp_path / 'none'], ['convert', tmp_path / 'none', tmp_path / 'out']):
    assert run(*command) == 2
    assert 'none: no such file' in capsys.readouterr().err
  assert not (tmp_path / 'out').exists()
  with pytest.raises(SystemExit):
    run('info', tmp_path, '--input_size', '608')
  assert "'608' is not two numbers" in capsys.readouterr().err


def test_a_run_is_described_and_converted_without_a_word_from_orbax(complete, tmp_path):
  state = TrainState(np.int32(300), complete.nested('params'), complete.nested('target'), {}, np.zeros(2, np.uint32))
  how = {'dtype': 'bfloat16', 'scan': False, 'remat': False}  # as earlier versions wrote it
  model = {key: value for key, value in complete.model.items() if key != 'norm_stats'} | how
  checkpoints = Checkpoints(tmp_path / 'run')
  checkpoints.save(jax.tree.map(jnp.asarray, state), {
      'settings': {'model': model}, 'norm_stats': [-7.1, 4.2], 'logmel': {'sample_rate': 16000},
      'text_encoder': complete.text_encoder})
  checkpoints.close()
  for arguments in (['info', 'run', '--json'], ['convert', 'run', 'portable']):
    done = subprocess.run([sys.executable, '-m', 'm2d_clap_jax.cli', *arguments], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0 and done.stderr == ''
    assert arguments[0] != 'info' or json.loads(done.stdout)['updates_made_here'] == 300
  same_weights(tmp_path / 'portable', tmp_path / 'run')
