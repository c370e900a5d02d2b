"""X-ARES opens an encoder from a file, its check passes, and long audio takes bounded memory."""
import subprocess
import sys

import numpy as np
import pytest

import m2d_clap_jax
from m2d_clap_jax import xares
from tests.command_helpers import save_model
from tests.test_api import arpeggio
from tests.test_pretrain import ROOT

torch = pytest.importorskip('torch')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return save_model(tmp_path_factory.mktemp('xares'))


@pytest.fixture(scope='module')
def encoder(folder):
  class ArpeggioEncoder(xares.Model):
    path = folder
  return ArpeggioEncoder()


def test_frames_are_those_of_the_pipeline_one_for_each_hop_in_tensors(folder, encoder):
  audio = torch.from_numpy(np.stack([arpeggio(16000, shift)[:50000] for shift in (1, 1.5)]))
  found = encoder(audio)
  assert isinstance(found, torch.Tensor) and found.dtype == torch.float32 and not found.requires_grad
  np.testing.assert_array_equal(found, m2d_clap_jax.load(folder).encode_frames(audio.numpy())[0])
  assert (encoder.sampling_rate, encoder.output_dim, encoder.hop_size_in_ms) == (16000, 480, 160)
  assert found.shape == (2, -(-3125 // 160), 480)
  np.testing.assert_allclose(encoder(audio[0]), found[:1], atol=1e-5)


def test_its_own_check_passes_for_a_file_as_documented(folder, tmp_path, monkeypatch):
  check = pytest.importorskip('xares.audio_encoder_checker', reason="needs xares: pip install -e '.[xares]'")
  from xares.utils import attr_from_py_path
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / 'clips_encoder.py').write_text(
      f'from m2d_clap_jax import xares\n\nclass ClipsEncoder(xares.Model):\n  path = {folder!r}\n')
  encoder = attr_from_py_path('clips_encoder.py', endswith='Encoder')()
  assert check.check_audio_encoder(encoder) is True


def test_ten_minutes_take_little_more_memory_than_one(folder):
  """In a process of its own: the growth of the peak, beyond the audio and the features themselves."""
  code = f'''
import resource, torch
from m2d_clap_jax import xares
class LongEncoder(xares.Model):
  path = {folder!r}
def peak(minutes):
  features = LongEncoder()(torch.rand(1, minutes * 960000) - 0.5)
  assert features.shape[1] == minutes * 375 + 1, features.shape
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - features.nbytes / 2 ** 20
first = peak(1)
print(peak(10) - first)
'''
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert float(done.stdout) < 250, 'MB; ten minutes are 37 MB of audio, in several copies'
