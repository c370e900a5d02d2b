"""An exported program gives what `load` gives, for any number of clips of any lengths, with jax alone."""
import dataclasses
import itertools
import json
import runpy
import subprocess
import sys
import wave

import numpy as np
import pytest

import m2d_clap_jax
from m2d_clap_jax import stablehlo
from m2d_clap_jax.models.posemb import sincos_2d
from m2d_clap_jax.weights.portable import save_portable
from tests.command_helpers import run
from tests.test_api import arpeggio, tiny_weights
from tests.test_cli import ROOT

EXAMPLE = ROOT / 'examples' / 'stablehlo_loader.py'
LENGTHS = (1, 150, 15359, 15360, 47011)  # samples: too short to reflect; one window of 96 frames, just not and just


def write_wav(path, samples: int, rate=16000):
  with wave.open(str(path), 'wb') as file:
    file.setnchannels(1)
    file.setsampwidth(2)
    file.setframerate(rate)
    file.writeframes((32767 * arpeggio(rate, seconds=1)[:samples]).astype('<i2').tobytes())
  return path


@pytest.fixture
def loaded(tmp_path, monkeypatch):
  """Function of weights -> (about, model) as the example loads them, from the file that the command writes."""
  def load(weights):
    save_portable(weights, tmp_path / 'model')
    assert run('convert', tmp_path / 'model', tmp_path / 'out', '--to', 'stablehlo') == 0
    monkeypatch.setattr(sys, 'argv', ['', str(tmp_path / 'out' / 'stablehlo.npz'), str(
        write_wav(tmp_path / 'a.wav', 8000, weights.sample_rate))])
    example = runpy.run_path(str(EXAMPLE), run_name='__main__')
    return example['about'], example['model']
  return load


def assert_equal(found, pipeline, clips, kinds):
  expected = {'embedding': pipeline.embed, 'clap': pipeline.encode_audio, 'logits': pipeline.logits}
  assert set(found) == set(kinds)
  for kind in kinds:
    value = expected[kind](clips)
    np.testing.assert_allclose(found[kind], value, rtol=0, atol=1e-4 * np.abs(value).max(), err_msg=kind)


@pytest.mark.parametrize('frames', [0, 96, 90], ids=['short clips as they are', 'padded to a crop', 'padded to part of a patch'])
def test_five_lengths_and_three_batch_sizes_are_equal_to_load(frames, loaded):
  weights = dataclasses.replace(tiny_weights(patch_size=(16, 16)), padded_to=frames)
  pipeline, (about, model) = m2d_clap_jax.load(weights), loaded(weights)
  assert about['fingerprint'] == pipeline.fingerprint and about['platforms'] == ['cpu', 'cuda', 'tpu']
  for length, batch in itertools.product(LENGTHS, (1, 2, 5)):
    clips = [arpeggio(16000, 1 + i / 9)[:length] for i in range(batch)]
    assert_equal(model(clips), pipeline, clips, ['embedding', 'clap'])
  clips = [arpeggio(16000)[:length] for length in LENGTHS]
  assert_equal(model(clips), pipeline, clips, ['embedding', 'clap'])


def head(width):
  rng = np.random.default_rng(2)
  return {'head': {'kernel': rng.standard_normal((width, 3), np.float32), 'bias': np.ones(3, np.float32)},
          'head_stats': {'mean': rng.standard_normal(width, np.float32), 'var': np.full(width, 4, np.float32)}}


@pytest.mark.parametrize('changes,kinds', [
    (dict(audio_projector='semantic', semantic_depth=2, input_size=(80, 100)), ['embedding', 'clap']),
    (dict(text_width=None, patch_size=(80, 2), head=480), ['embedding', 'logits']),
    (dict(text_width=None, head=96, table=True, rate=32000), ['embedding', 'logits'])],
    ids=['of 2025 with a crop that is no whole number of patches', 'fine-tuned', 'patchout, 32 kHz, a position table'])
def test_kinds_of_models_are_equal_to_load(changes, kinds, loaded):
  changes = dict(patch_size=(16, 16)) | changes
  width, table, rate = changes.pop('head', None), changes.pop('table', False), changes.pop('rate', 16000)
  weights = tiny_weights(**changes)
  trees = dict(weights.trees)
  if width:
    rows = 80 // changes['patch_size'][0]
    trees |= head(96 if width == 96 else rows * 96)
    weights = dataclasses.replace(weights, classes=('a', 'b', 'c'))
  if table:
    network = weights.network()
    trees['tables'] = {'pos_embed': sincos_2d(96, network.grid)[None, :, ::-1].copy()}
  weights = dataclasses.replace(weights, trees=trees, sample_rate=rate)
  clips = [arpeggio(rate)[:length] for length in (rate // 3, 2 * rate + 77)]
  assert_equal(loaded(weights)[1](clips), m2d_clap_jax.load(weights), clips, kinds)


def test_the_loader_needs_jax_and_numpy_alone(tmp_path):
  path = stablehlo.save(tiny_weights(patch_size=(16, 16)), tmp_path / 'stablehlo.npz')
  files = [str(write_wav(tmp_path / f'{samples}.wav', samples)) for samples in (9000, 12000)]
  blocked = ['m2d_clap_jax', 'flax', 'optax', 'transformers', 'tensorflow', 'torch', 'librosa', 'soundfile', 'soxr']
  code = f'''
import json, runpy, sys
for name in {blocked}:
  sys.modules[name] = None
sys.argv = ['', {str(path)!r}, *{files!r}]
found = runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')['results']
print(json.dumps({{kind: values.tolist() for kind, values in found.items()}}))
'''
  done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  *shapes, last = done.stdout.splitlines()
  assert shapes == ['clap (2, 96) float32', 'embedding (2, 480) float32']
  expected = m2d_clap_jax.load(tiny_weights(patch_size=(16, 16))).embed(files)
  np.testing.assert_allclose(json.loads(last)['embedding'], expected, atol=1e-4 * np.abs(expected).max())


def test_a_model_of_2025_takes_six_and_a_half_minutes_at_most_and_nothing_is_overwritten(loaded, tmp_path, capsys):
  weights = tiny_weights(patch_size=(16, 16), audio_projector='semantic')
  _, model = loaded(weights)
  with pytest.raises(ValueError, match='a clip of 420 s; this model takes 388'):
    model([np.zeros(7 * 60 * 16000, np.float32)])
  assert run('convert', tmp_path / 'model', tmp_path / 'out', '--to', 'stablehlo') == 2
  assert 'stablehlo.npz: already exists; remove it or give another folder' in capsys.readouterr().err
