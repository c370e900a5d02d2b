"""Log-mel spectrograms: equal to the reference, the same from numpy and jax, fit for long and very short waves."""

import pathlib
import subprocess
import sys
import tracemalloc

import jax
import librosa.filters
import numpy as np
import pytest

from m2d_clap_jax.audio import SILENCE, LogMel
from m2d_clap_jax.errors import UserError

GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'logmel.npz'


@pytest.fixture(scope='module')
def noise():
  return (np.random.default_rng(0).standard_normal(16000 * 10) * 0.1).astype(np.float32)


@pytest.mark.parametrize('rate', [16000, 32000])
@pytest.mark.parametrize('backend', ['numpy', 'jax'])
def test_log_mels_equal_the_reference(rate, backend):
  golden = np.load(GOLDEN)
  waves, expected = (golden[f'{kind}_{rate // 1000}k'].astype(np.float32) for kind in ('wav', 'logmel'))
  spec = LogMel.for_rate(rate)
  got = np.stack([spec.numpy(wave) for wave in waves]) if backend == 'numpy' else np.asarray(jax.jit(spec.jax)(waves))
  assert got.shape == expected.shape and got.dtype == np.float32
  assert np.linalg.norm(got - expected) < 2e-5 * np.linalg.norm(expected)
  assert np.abs(got - expected).max() < 5e-3  # the largest differences are in bins at the rounding noise of silence


def test_a_wave_of_many_blocks_agrees_with_the_definition_in_double_precision(noise):
  padded = np.pad(noise.astype(np.float64), 200, mode='reflect')
  frames = np.stack([padded[t * 160:t * 160 + 400] for t in range(1001)])
  power = np.abs(np.fft.rfft(frames * np.hanning(401)[:400])) ** 2
  mel = librosa.filters.mel(sr=16000, n_fft=400, n_mels=80, fmin=50, fmax=8000)
  np.testing.assert_allclose(LogMel().numpy(noise), np.log(mel @ power.T + 1.1920929e-07), atol=1e-4)


def test_ten_seconds_at_16_khz_give_80_by_1001(noise):
  assert LogMel().numpy(noise).shape == (80, 1001)
  assert jax.eval_shape(LogMel().jax, jax.ShapeDtypeStruct((2, 3, 160000), np.float32)).shape == (2, 3, 80, 1001)


def test_digital_silence_becomes_the_logarithm_of_epsilon():
  np.testing.assert_allclose(LogMel().numpy(np.zeros(4000)), SILENCE, rtol=1e-6)
  assert SILENCE == pytest.approx(-15.942385)


@pytest.mark.parametrize('samples', [0, 1, 16, 159, 160, 200, 201, 400])
def test_waves_too_short_to_reflect_give_their_frames(noise, samples):
  wave = noise[:samples]
  got = LogMel().numpy(wave)
  assert got.shape == (80, samples // 160 + 1) and np.isfinite(got).all()
  np.testing.assert_allclose(got, LogMel().jax(wave), atol=2e-3)


def test_a_frame_has_the_same_bits_however_long_the_recording_is(noise):
  whole = LogMel().numpy(noise)
  for seconds in (1, 2.57, 7.3):
    start = LogMel().numpy(noise[:int(seconds * 16000)])
    np.testing.assert_array_equal(start[:, :-3], whole[:, :start.shape[1] - 3])  # the last frames saw the reflected end


def test_extra_memory_does_not_grow_with_the_length(noise):
  wave = np.tile(noise, 60)  # ten minutes, 38 MB
  LogMel().numpy(noise[:1000])
  tracemalloc.start()
  out = LogMel().numpy(wave)
  peak = tracemalloc.get_traced_memory()[1] - out.nbytes
  tracemalloc.stop()
  assert peak < 8e6


def test_the_gradient_reaches_the_wave(noise):
  grad = jax.grad(lambda wave: LogMel().jax(wave).sum())(noise[:3200])
  assert np.isfinite(grad).all() and np.abs(grad).max() > 0


def test_an_unsupported_rate_is_refused_with_the_remedy():
  with pytest.raises(UserError, match='44100.*16000 and 32000'):
    LogMel.for_rate(44100)


def test_importing_and_using_audio_needs_neither_jax_nor_tensorflow_nor_transformers():
  code = ('import sys, m2d_clap_jax.audio.decode\n'
          'm2d_clap_jax.audio.LogMel().numpy([0.0] * 16000)\n'
          'print({"jax", "tensorflow", "transformers", "torch", "librosa"} & set(sys.modules))\n')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                        cwd=pathlib.Path(__file__).parents[1])
  assert done.stdout.strip() == 'set()', done.stderr
