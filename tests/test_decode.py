"""Decoding: real files of every format come out as the sound that went in, and damaged ones say what is wrong."""

import struct
import tracemalloc

import numpy as np
import pytest
import soundfile

from m2d_clap_jax.audio import decode
from m2d_clap_jax.errors import UserError
from tests.small_model import arpeggio


def tone(rate, seconds=2.0, hz=440.0):
  return (0.5 * np.sin(2 * np.pi * hz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def write(path, wave, rate, **how):
  soundfile.write(path, wave, rate, **how)
  return path


def middle(wave):
  """Without the ends, where lossy codecs and resampling filters have their transients."""
  return wave[1600:-1600]


@pytest.mark.parametrize('name, rate, how, error', [
  ('a.wav', 16000, {'subtype': 'PCM_U8'}, 0.01),
  ('a.wav', 22050, {'subtype': 'PCM_16'}, 2e-4),
  ('a.wav', 44100, {'subtype': 'PCM_24'}, 2e-4),
  ('a.wav', 48000, {'subtype': 'PCM_32'}, 2e-4),
  ('a.wav', 8000, {'subtype': 'FLOAT'}, 2e-4),
  ('a.wav', 96000, {'subtype': 'DOUBLE'}, 2e-4),
  ('a.flac', 44100, {'subtype': 'PCM_24'}, 2e-4),
  ('a.ogg', 44100, {'format': 'OGG', 'subtype': 'VORBIS'}, 0.05),
  ('a.opus', 48000, {'format': 'OGG', 'subtype': 'OPUS'}, 0.05),
  ('a.mp3', 44100, {'format': 'MP3', 'subtype': 'MPEG_LAYER_III'}, 0.05),
])
def test_every_format_and_rate_comes_out_as_the_sound_that_went_in(tmp_path, name, rate, how, error):
  stereo = np.stack([tone(rate), tone(rate)], axis=1)
  wave, truncated = decode.load(write(tmp_path / name, stereo, rate, **how), 16000)
  assert wave.dtype == np.float32 and len(wave) == 32000 and not truncated
  assert np.abs(middle(wave - tone(16000))).max() < error


def test_channels_are_averaged(tmp_path):
  six = np.zeros((16000, 6), np.float32)
  six[:, 2] = tone(16000, 1.0)
  wave, _ = decode.load(write(tmp_path / 'surround.wav', six, 16000, subtype='FLOAT'), 16000)
  np.testing.assert_allclose(wave, tone(16000, 1.0) / 6, atol=1e-6)


def test_resampling_does_not_alias(tmp_path):
  wave, _ = decode.load(write(tmp_path / 'a.wav', tone(44100, hz=10000.0), 44100, subtype='FLOAT'), 16000)
  assert np.abs(middle(wave)).max() < 1e-4  # 10 kHz cannot be represented at 16 kHz: it must vanish (below -74 dB)


def test_decoding_in_blocks_equals_resampling_at_once(tmp_path):
  noise = (np.random.default_rng(0).standard_normal(44100 * 15) * 0.1).astype(np.float32)  # more than two blocks
  wave, _ = decode.load(write(tmp_path / 'a.wav', noise, 44100, subtype='FLOAT'), 16000)
  np.testing.assert_array_equal(wave, decode.resample(noise, 44100, 16000))


def test_an_mp3_of_variable_rate_in_blocks_equals_itself_at_once(tmp_path):
  wave = np.concatenate([arpeggio(44100, 1 + i / 7)[:44100] for i in range(20)])
  with soundfile.SoundFile(tmp_path / 'a.mp3', 'w', 44100, 1, bitrate_mode='VARIABLE', compression_level=0.7) as file:
    for part in np.array_split(wave, 20):
      file.write(part)
  at_once = soundfile.read(tmp_path / 'a.mp3', dtype='float32')[0]
  np.testing.assert_allclose(decode.load(tmp_path / 'a.mp3', 44100)[0], at_once, atol=1e-6)


def test_max_seconds_is_the_beginning_of_the_whole(tmp_path):
  noise = (np.random.default_rng(0).standard_normal(44100 * 3) * 0.1).astype(np.float32)
  path = write(tmp_path / 'a.flac', noise, 44100)
  whole, _ = decode.load(path, 16000)
  start, truncated = decode.load(path, 16000, max_seconds=1.5)
  assert truncated and len(start) == 24000
  np.testing.assert_allclose(start, whole[:24000], atol=1e-6)
  for seconds in (3.0, 4.0):
    wave, truncated = decode.load(path, 16000, max_seconds=seconds)
    assert not truncated and len(wave) == 48000


def test_max_seconds_reads_only_its_part_of_an_hour(tmp_path):
  path = write(tmp_path / 'hour.wav', np.zeros((1, 2)), 48000, subtype='PCM_16')
  size = 3600 * 48000 * 4
  with path.open('r+b') as file:
    file.seek(4)
    file.write(struct.pack('<I', size + 36))
    file.seek(40)
    file.write(struct.pack('<I', size))
    file.truncate(44 + size)  # a sparse file: it takes no room on the disk
  tracemalloc.start()
  wave, truncated = decode.load(path, 16000, max_seconds=10.0)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert truncated and len(wave) == 160000 and peak < 2e7


def test_one_millisecond_and_silence_are_sound(tmp_path):
  wave, _ = decode.load(write(tmp_path / 'ms.wav', tone(16000, 0.001), 16000), 16000)
  assert len(wave) == 16
  wave, _ = decode.load(write(tmp_path / 'silent.wav', np.zeros(8000), 8000), 16000)
  assert len(wave) == 16000 and not wave.any()


@pytest.mark.parametrize('name, how', [
  ('a.wav', {}), ('a.flac', {}), ('a.ogg', {'format': 'OGG', 'subtype': 'VORBIS'}),
  ('a.opus', {'format': 'OGG', 'subtype': 'OPUS'}), ('a.mp3', {'format': 'MP3', 'subtype': 'MPEG_LAYER_III'}),
])
@pytest.mark.parametrize('kept', [0.2, 0.5, 0.9])
def test_a_file_that_was_cut_off_is_refused(tmp_path, name, how, kept):
  noise = np.random.default_rng(0).standard_normal(48000 * 5) * 0.1
  path = write(tmp_path / name, noise, 48000, **how)
  path.write_bytes(path.read_bytes()[:int(path.stat().st_size * kept)])
  assert_refused(path, 'cut off|not readable')


@pytest.mark.parametrize('name, how', [
  ('a.flac', {}), ('a.ogg', {'format': 'OGG', 'subtype': 'VORBIS'}),
  ('a.mp3', {'format': 'MP3', 'subtype': 'MPEG_LAYER_III'}),
])
def test_a_file_with_a_hole_is_refused(tmp_path, name, how):
  path = write(tmp_path / name, np.random.default_rng(0).standard_normal(48000 * 5) * 0.1, 48000, **how)
  data = bytearray(path.read_bytes())
  data[len(data) // 2:len(data) // 2 + 3000] = bytes(3000)
  path.write_bytes(data)
  assert_refused(path, 'corrupt|not readable')


def mp3_without_length(path, **how):
  """An mp3 as streams hold it: without its first frame, which states the length."""
  write(path, np.stack([tone(44100, 5.0)] * 2, 1), 44100, format='MP3', subtype='MPEG_LAYER_III', **how)
  data = path.read_bytes()
  path.write_bytes(data[data.index(data[:2], 200):])
  return path


def test_an_mp3_without_a_stated_length_is_read_whole(tmp_path):
  for mode in ('CONSTANT', 'VARIABLE'):  # of the second, libsndfile would read 0.8 of 5 seconds, and not say so
    path = mp3_without_length(tmp_path / f'{mode}.mp3', bitrate_mode=mode, compression_level=0.5)
    assert 79000 < len(decode.load(path, 16000)[0]) < 82000


def test_a_wav_from_a_pipe_with_unknown_length_is_read(tmp_path):
  path = write(tmp_path / 'a.wav', tone(16000), 16000, subtype='PCM_16')
  data = bytearray(path.read_bytes())
  data[4:8] = data[40:44] = b'\xff\xff\xff\xff'
  path.write_bytes(data)
  assert len(decode.load(path, 16000)[0]) == 32000


def test_unusable_files_are_refused_with_their_reason(tmp_path):
  assert_refused(tmp_path / 'gone.wav', 'no such file')
  assert_refused(tmp_path, 'is a folder')
  (tmp_path / 'empty.wav').touch()
  assert_refused(tmp_path / 'empty.wav', 'empty \\(0 bytes\\)')
  (tmp_path / 'text.wav').write_text('not a sound\n' * 100)
  assert_refused(tmp_path / 'text.wav', 'not readable as audio')
  assert_refused(write(tmp_path / 'none.wav', np.zeros(0), 16000), 'no samples')
  for bad in (np.nan, np.inf, 1e30):
    wave = tone(16000)
    wave[20000] = bad
    assert_refused(write(tmp_path / 'bad.wav', wave, 16000, subtype='FLOAT'), 'NaN, infinite')


@pytest.mark.parametrize('dtype, top', [(np.int16, 2 ** 15), (np.int32, 2 ** 31), (np.int8, 2 ** 7)])
def test_integer_arrays_are_scaled_to_one(dtype, top):
  wave = decode.as_mono(np.array([[-top, top // 2], [-top, top // 2]], dtype), channel_axis=0)
  np.testing.assert_array_equal(wave, np.array([-1, 0.5], np.float32))
  assert wave.dtype == np.float32


def test_sixteen_bits_in_sixty_four_are_not_taken_for_silence():
  with pytest.raises(ValueError, match='int64 is not supported'):
    decode.as_mono([0, 20000, -20000])


def test_unsigned_bytes_are_centred():
  np.testing.assert_array_equal(decode.as_mono(np.array([0, 128, 192], np.uint8)), np.array([-1, 0, 0.5], np.float32))


def assert_refused(path, reason):
  with pytest.raises(decode.AudioError, match=reason) as caught:
    decode.load(path, 16000)
  message = str(caught.value)
  assert message.startswith(str(path)) and '\n' not in message and isinstance(caught.value, UserError)
