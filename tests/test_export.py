"""From a training run to files that others open, and from files to a run that starts from them."""
import dataclasses

import numpy as np
import pytest

import m2d_clap_jax
from m2d_clap_jax import weights
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.models.posemb import sincos_2d
from m2d_clap_jax.train import pretrain
from m2d_clap_jax.train.prepared_data import open_data
from m2d_clap_jax.weights import portable, public
from tests import reference
from tests.test_pretrain import one_device, tiny_config  # noqa: F401
from tests.test_weights import torch_module

# Of the golden list of names and shapes; the captions of the test data are 8 wide, hence one more projector.
GOLDEN = dict(width=96, depth=2, heads=3, predictor_width=64, predictor_depth=2, predictor_heads=4, input_size=(80, 96),
              text_width=8)


def trained(data, workdir, **changes):  # noqa: F811
  config = tiny_config(data, steps=2, evals_every=2, statistics_every=2)
  config.model.update(GOLDEN)
  config.update_from_flattened_dict(changes)
  pretrain.run(config, str(workdir))
  return workdir


@pytest.fixture(scope='module')
def run(data, tmp_path_factory):  # noqa: F811
  with pytest.MonkeyPatch.context() as patch:
    one_device.__wrapped__(patch)
    return trained(data, tmp_path_factory.mktemp('run'))


def test_a_run_exports_exactly_the_public_names_and_shapes(run, tmp_path):
  import torch
  found = weights.read(run)
  assert found.complete and found.step == 2 and found.text_encoder['name'] == 'fake'
  shapes = reference.shapes('clap_tiny') | {'text_proj.weight': [96, 8], 'text_proj.bias': [96]}
  path = public.save_pth(found, tmp_path, found.step)
  content = torch.load(path, weights_only=False)['model']  # a Namespace of arguments is beside it
  assert {name: list(value.shape) for name, value in content.items()} == shapes
  torch_module(torch, shapes).load_state_dict(content, strict=True)
  np.testing.assert_array_equal(content['pos_embed'][0], sincos_2d(96, (5, 6)))
  again = weights.read(path, heads=3, predictor_heads=4)
  for tree in ('params', 'target'):
    for name, value in found.trees[tree].items():
      np.testing.assert_array_equal(again.trees[tree][name], value, err_msg=name)


def test_run_portable_folder_and_pth_give_the_same_embeddings(run, tmp_path):
  found = weights.read(run)
  wave = np.random.default_rng(0).standard_normal(30000).astype(np.float32)
  expected = m2d_clap_jax.load(run).features(wave)
  folder = portable.save_portable(found, tmp_path / 'portable')
  pth = public.save_pth(found, tmp_path)
  for model in (m2d_clap_jax.load(folder), m2d_clap_jax.load(pth, heads=3)):
    for value, reference_value in zip(model.features(wave), expected):
      np.testing.assert_array_equal(value, reference_value)
  assert '| Pre-training can continue | yes |' in (folder / 'README.md').read_text()


@pytest.mark.parametrize('part', ['complete', 'encoder only'])
def test_a_run_starts_from_exported_weights_of_another_clip_length(part, run, data, tmp_path, capsys):  # noqa: F811
  found = weights.read(run)
  if part == 'encoder only':
    found = found.encoder_only()
  folder = portable.save_portable(found, tmp_path / 'portable')
  config = tiny_config(data, steps=1, batch_size=16, evals_every=1, statistics_every=1, save_every=1)
  config.model.update(GOLDEN | {'input_size': (80, 48)})
  config.schedule.base_learning_rate = 1e-12  # so that what was taken is still there after one update
  config.ema.update({'start': 1.0, 'end': 1.0})
  config.init = str(folder)
  pretrain.run(config, str(tmp_path / 'next'))
  note = capsys.readouterr().err
  assert ('at random: predictor' in note) == (part == 'encoder only')
  after = weights.read(tmp_path / 'next')
  assert after.network().input_size == (80, 48)
  assert after.network().norm_stats == found.network().norm_stats
  for path, value in found.trees['params'].items():
    np.testing.assert_allclose(after.trees['params'][path], value, atol=1e-6, err_msg=path)
  source = found.trees.get('target') or {path.removeprefix('encoder/'): value for path, value in
                                         found.trees['params'].items() if path.startswith('encoder/')}
  for path, value in source.items():
    np.testing.assert_allclose(after.trees['target'][path], value, atol=1e-6, err_msg=path)


def test_weights_of_another_size_are_refused_by_name(run, data, tmp_path):  # noqa: F811
  config = tiny_config(data)
  config.init = str(run)
  with pytest.raises(UserError, match=r'do not fit config.model: .*instead of'):
    pretrain.run(config, str(tmp_path / 'next'))
  found = weights.read(run)
  config.model.update(GOLDEN)
  config.init = str(portable.save_portable(dataclasses.replace(found, sample_rate=32000), tmp_path / 'of another rate'))
  with pytest.raises(UserError, match='is for audio of 32000 Hz where the log-mels in .* are of 16000 Hz'):
    pretrain.run(config, str(tmp_path / 'next'))
  config.init = str(tmp_path / 'nowhere')
  with pytest.raises(UserError, match='nowhere: no such file'):
    pretrain.run(config, str(tmp_path / 'next'))


@pytest.mark.parametrize('name, told', [('fake', False), ('another', True)])
def test_captions_of_another_text_encoder_than_that_of_the_weights_are_noticed(name, told, run, data, capsys):  # noqa: F811
  found = weights.read(run)
  other = found.text_encoder if name == 'fake' else found.text_encoder | {'name': name, 'hash': None}
  pretrain.check_source(dataclasses.replace(found, text_encoder=other), open_data(True, folder=str(data)))
  assert ('by another, those in' in capsys.readouterr().err) == told


def test_models_of_2025_are_trained_further_with_settings_alone(data, tmp_path):  # noqa: F811
  changes = {'model.audio_projector': 'semantic', 'model.semantic_depth': 2, 'model.text_projector': 'mlp'}
  run = trained(data, tmp_path / 'first', **changes)
  config = tiny_config(data, steps=1, init=str(run))
  config.model.update(GOLDEN)
  with pytest.raises(UserError, match='do not fit config.model'):
    pretrain.run(config, str(tmp_path / 'next'))
  config.update_from_flattened_dict(changes)
  pretrain.run(config, str(tmp_path / 'next'))
  assert weights.read(tmp_path / 'next').model['semantic_depth'] == 2


def test_a_workdir_without_a_checkpoint_says_so(tmp_path):
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(UserError, match='holds no complete checkpoint'):
    weights.read(tmp_path)
