"""Arrays are guarded as files are: what would be another sound than meant is refused, with what to do."""
import numpy as np
import pytest

from m2d_clap_jax.audio.inputs import as_clips
from m2d_clap_jax.errors import UserError

X = (0.1 * np.random.default_rng(0).normal(size=16000)).astype(np.float32)


def waves(array, rate=16000):
  return [np.concatenate(list(clip.blocks(16000))) for clip in as_clips(array, rate)]


@pytest.mark.parametrize('array, count', [
    (X, 1), (X[:, None], 1), (np.stack([X, 0 * X], 1), 1), (np.stack([X, X]), 2), (np.zeros((3, 2, 16000)), 3),
    (np.zeros((3, 16000, 2)), 3), ([X, X[:100]], 2)])
def test_one_clip_is_one_clip_whichever_axis_counts_channels(array, count):
  found = waves(array)
  assert len(found) == count and all(len(wave) in (16000, 100) for wave in found)


def test_channels_of_an_interleaved_array_are_averaged():
  np.testing.assert_allclose(waves(np.stack([X, 0 * X], 1))[0], X / 2, atol=1e-7)


@pytest.mark.parametrize('dtype', ['>i2', '<i2', '>i4', '>f4', '<f8'])
def test_either_byte_order_is_the_same_sound(dtype):
  scale = {'i2': 2 ** 15, 'i4': 2.0 ** 31}.get(dtype[1:], 1)
  np.testing.assert_allclose(waves((X * scale).astype(dtype))[0], X, atol=1e-4)


@pytest.mark.parametrize('rate', [44.1, 0, -16000, float('nan'), float('inf'), 22050.5, '16000', None, 5_000_000])
def test_a_rate_that_is_none_is_refused(rate):
  with pytest.raises(UserError, match='sample_rate=.*give a whole number of Hz'):
    as_clips(X, rate)


@pytest.mark.parametrize('array, message', [
    (X * 1e21, 'full scale is 1'), (X * 32768, 'Divide them by 32768'), (np.full(100, np.nan), 'NaN'),
    (np.zeros((4, 4, 4, 4)), 'not supported'), ([], 'empty'), (np.zeros((2, 0)), 'empty'),
    (np.zeros(100, np.int64), 'int64 is not supported')])
def test_what_is_no_sound_is_refused(array, message):
  with pytest.raises(UserError, match=message):
    as_clips(array, 16000)
