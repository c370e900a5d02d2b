"""HEAR's common API by its published rules: names, attributes, shapes, types, timestamps."""
import importlib
import inspect
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import m2d_clap_jax
from m2d_clap_jax import hear
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.weights.portable import save_portable
from tests.command_helpers import save_model
from tests.small_model import arpeggio, tiny_weights

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return save_model(tmp_path_factory.mktemp('hear'))


@pytest.fixture(scope='module')
def model(folder):
  return hear.load_model(folder)


@pytest.fixture(scope='module')
def audio():
  """Three different sounds of 2 seconds."""
  return np.stack([arpeggio(16000, shift)[:32000] for shift in (1, 1.3, 1.7)])


def library(name):
  """-> (array to tensor, tensor type, float32 of the library)."""
  if name == 'numpy':
    return np.asarray, np.ndarray, np.float32
  module = importlib.import_module(name)
  convert = module.from_numpy if name == 'torch' else module.convert_to_tensor
  return convert, module.Tensor, module.float32


@pytest.mark.parametrize('name', ['numpy', 'torch', 'tensorflow'])
def test_names_attributes_shapes_and_types_are_those_of_the_specification(name, folder, audio):
  convert, kind, float32 = library(name)
  model = hear.load_model(folder)
  assert list(inspect.signature(hear.load_model).parameters) == ['model_file_path']
  for function in (hear.get_scene_embeddings, hear.get_timestamp_embeddings):
    assert list(inspect.signature(function).parameters) == ['audio', 'model']
  assert model.sample_rate in (16000, 22050, 32000, 44100, 48000)
  assert type(model.scene_embedding_size) is type(model.timestamp_embedding_size) is int
  tensor = convert(audio)
  scenes = hear.get_scene_embeddings(tensor, model)
  frames, stamps = hear.get_timestamp_embeddings(tensor, model)
  assert all(isinstance(x, kind) for x in (scenes, frames, stamps)) and scenes.dtype == frames.dtype == float32
  assert tuple(scenes.shape) == (3, model.scene_embedding_size)
  assert tuple(frames.shape) == (*stamps.shape, model.timestamp_embedding_size) and stamps.shape[0] == 3
  if name == 'torch':
    assert not (scenes.requires_grad or frames.requires_grad or stamps.requires_grad)
    np.testing.assert_array_equal(hear.get_scene_embeddings(tensor.clone().requires_grad_(), model), scenes)


def test_the_model_is_a_module_of_the_library_in_use(folder):
  import torch
  assert isinstance(hear.load_model(folder).to('cpu').eval(), torch.nn.Module)
  code = '''
import sys
{}
from m2d_clap_jax import hear
import numpy as np
model = hear.load_model(sys.argv[1])
hear.get_timestamp_embeddings(np.ones((1, 20000), np.float32), model)
{}
'''
  for first, last in (('import tensorflow as tf', 'assert isinstance(model, tf.Module)'),
                      ('', 'assert "torch" not in sys.modules and "tensorflow" not in sys.modules')):
    done = subprocess.run([sys.executable, '-c', code.format(first, last), folder], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr


def test_the_community_validator_is_content(folder):
  from hearvalidator import validate
  validate.ValidateModel('m2d_clap_jax.hear', folder, 'cpu')()


def test_timestamps_are_regular_centres_within_the_sound(model, audio):
  for samples in (1, 160, 16000, 16 * 160 * 12 - 1, 16 * 160 * 12, 32000):
    frames, stamps = hear.get_timestamp_embeddings(audio[:, :samples], model)
    count = frames.shape[1]
    np.testing.assert_allclose(stamps, np.tile(75 + 160 * np.arange(count), (3, 1)), atol=1e-3)
    assert count == 1 or stamps.max() <= samples / 16
    assert samples / 16 - stamps.max() < 160, 'no column is missing'


@pytest.mark.parametrize('changes,rate,first,step', [
    (dict(patch_size=(80, 2)), 16000, 5, 20), (dict(patch_size=(16, 4)), 16000, 15, 40),
    (dict(patch_size=(16, 16)), 32000, 75, 160)])
def test_timestamps_follow_patch_and_rate(changes, rate, first, step, tmp_path):
  weights = tiny_weights(**changes)
  save_portable(type(weights)(**{**vars(weights), 'sample_rate': rate}), tmp_path)
  model = hear.load_model(str(tmp_path))
  _, stamps = hear.get_timestamp_embeddings(np.zeros((1, rate), np.float32), model)
  assert model.sample_rate == rate
  np.testing.assert_allclose(stamps[0, :3], [first, first + step, first + 2 * step], atol=1e-3)


def test_embeddings_are_the_pipelines_the_same_each_time_and_in_each_batch(folder, model, audio):
  pipeline = m2d_clap_jax.load(folder)
  scenes, (frames, _) = hear.get_scene_embeddings(audio, model), hear.get_timestamp_embeddings(audio, model)
  np.testing.assert_array_equal(scenes, pipeline.embed(audio))
  np.testing.assert_array_equal(frames, pipeline.encode_frames(audio)[0][:, :frames.shape[1]])
  np.testing.assert_array_equal(hear.get_scene_embeddings(audio, model), scenes)
  np.testing.assert_allclose(hear.get_scene_embeddings(audio[1:2], model), scenes[1:2], atol=1e-6 * scenes.max())
  assert np.abs(scenes[0] - scenes[1]).max() > 1e-3


def test_audio_of_another_shape_is_refused(model, audio):
  for wrong in (audio[0], audio[None], audio[:0], audio[:, :0]):
    with pytest.raises(UserError, match=r'give \[sounds, samples\]'):
      hear.get_scene_embeddings(wrong, model)
