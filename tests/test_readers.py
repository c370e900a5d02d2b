"""What phones, browsers and recorders write is read whole, or refused with what is wrong with it."""
import os
import struct

import av
import numpy as np
import pytest
import soundfile

from benchmarks.recordings import encode
from m2d_clap_jax.audio import decode

RATE = 48000
TIME = np.arange(4 * RATE) / RATE
WAVE = (0.4 * np.sin(2 * np.pi * 440 * TIME) * (1 + 0.5 * np.sin(2 * np.pi * 3 * TIME))).astype(np.float32)
# Name and how it is encoded: codec, rate, channel layout, options of the container.
BY_FFMPEG = {
    'phone.m4a': ('aac', RATE, 'stereo', {}), 'streamed.m4a': ('aac', RATE, 'mono', {'movflags': 'faststart'}),
    'lossless.m4a': ('alac', RATE, 'stereo', {}), 'camera.mov': ('aac', RATE, 'stereo', {}),
    'fragments.mp4': ('aac', RATE, 'mono', {'movflags': 'frag_keyframe+empty_moov'}), 'radio.aac': ('aac', RATE, 'stereo', {}),
    'browser.webm': ('libopus', RATE, 'mono', {}), 'live.webm': ('libopus', RATE, 'mono', {'live': '1'}),
    'windows.wma': ('wmav2', RATE, 'stereo', {}), 'broadcast.mp2': ('mp2', RATE, 'stereo', {}),
    'call.amr': ('amr_nb', 8000, 'mono', {}), 'call.3gp': ('amr_nb', 8000, 'mono', {}),
    'film.ac3': ('ac3', RATE, 'stereo', {}), 'box.mka': ('flac', RATE, 'stereo', {}),
}
BY_LIBSNDFILE = {
    'a.wav': {}, 'a.flac': {}, 'a.ogg': {'format': 'OGG', 'subtype': 'VORBIS'}, 'a.opus': {'format': 'OGG', 'subtype': 'OPUS'},
    'a.mp3': {'format': 'MP3', 'subtype': 'MPEG_LAYER_III'}, 'a.aiff': {}, 'a.au': {}, 'a.caf': {}, 'a.w64': {},
    'a.rf64': {'format': 'RF64'}, 'a.avr': {}, 'a.voc': {}, 'a.nist': {'format': 'NIST'}, 'a.mat4': {'format': 'MAT4'},
    'a.mat5': {'format': 'MAT5'}, 'a.mpc2k': {'format': 'MPC2K'}}
WITHOUT_LENGTH = {'broadcast.mp2', 'film.ac3', 'live.webm'}  # frames that may end after any of them


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp('recordings')
  for name, how in BY_FFMPEG.items():
    encode(folder / name, WAVE, RATE, *how)
  for name, how in BY_LIBSNDFILE.items():
    soundfile.write(folder / name, np.stack([WAVE, WAVE], 1), RATE, **how)
  return folder


def correlation(wave, expected):
  """Of the best alignment within 0.1 s: encoders delay what they encode."""
  size = min(len(wave), len(expected)) - 3200
  return max(np.corrcoef(wave[shift:shift + size], expected[:size])[0, 1] for shift in range(0, 1600, 2))


@pytest.mark.parametrize('name', [*BY_FFMPEG, *BY_LIBSNDFILE])
def test_every_kind_of_file_is_read_whole(files, name):
  wave, _ = decode.load(files / name, 16000)
  assert abs(len(wave) / 16000 - 4) < 0.1
  assert correlation(wave, decode.resample(WAVE, RATE, 16000)) > 0.95


@pytest.mark.parametrize('name,codec', [('a.m4a', 'aac'), ('a.m4a', 'alac'), ('a.caf', 'alac'), ('a.mka', 'flac'),
                                        ('a.webm', 'libopus')])
@pytest.mark.parametrize('samples', [43392, 25929, 1000])
def test_encoders_padding_is_cut_off_and_nothing_else(name, codec, samples, tmp_path):
  encode(tmp_path / name, WAVE[:samples], RATE, codec)
  wave, _ = decode.load(tmp_path / name, RATE)
  assert len(wave) == samples
  if codec in ('alac', 'flac'):
    np.testing.assert_allclose(wave, WAVE[:samples], atol=1e-4)


def refused(path, data, reason):
  path.write_bytes(data)
  with pytest.raises(decode.AudioError, match=reason) as error:
    decode.load(path, 16000)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', [name for name in (*BY_FFMPEG, *BY_LIBSNDFILE) if name not in WITHOUT_LENGTH])
def test_half_a_file_is_refused(files, name, tmp_path):
  data = (files / name).read_bytes()
  refused(tmp_path / name, data[:len(data) // 2 + 1], 'cut off|corrupt|not readable')


@pytest.mark.parametrize('name', [name for name in (*BY_FFMPEG, *BY_LIBSNDFILE) if name not in (
    'a.ogg', 'a.opus', 'radio.aac', 'broadcast.mp2', 'film.ac3', 'call.amr', 'a.mat5')])
def test_two_recordings_in_one_file_are_refused(files, name, tmp_path):
  data = (files / name).read_bytes()
  refused(tmp_path / name, data + data, 'more than one recording')


@pytest.mark.parametrize('name', ['a.ogg', 'a.opus', 'radio.aac', 'broadcast.mp2', 'film.ac3'])
def test_joined_streams_are_read_to_the_end(files, name, tmp_path):
  (tmp_path / name).write_bytes(2 * (files / name).read_bytes())
  once, twice = decode.load(files / name, 16000)[0], decode.load(tmp_path / name, 16000)[0]
  assert abs(len(twice) - 2 * len(once)) < 800
  assert decode.load(tmp_path / name, 16000, 6.0)[0].shape == (96000,)


def test_chained_streams_of_two_rates_follow_each_other(files, tmp_path):
  soundfile.write(tmp_path / 'low.ogg', decode.resample(WAVE, RATE, 16000), 16000, format='OGG', subtype='VORBIS')
  (tmp_path / 'both.ogg').write_bytes((files / 'a.ogg').read_bytes() + (tmp_path / 'low.ogg').read_bytes())
  wave, _ = decode.load(tmp_path / 'both.ogg', 16000)
  assert abs(len(wave) - 128000) < 100
  assert np.corrcoef(wave[1600:62400], wave[65600:126400])[0, 1] > 0.99


def patched(data, *changes):
  data = bytearray(data)
  for place, value in changes:
    data[place:place + len(value)] = value
  return bytes(data)


@pytest.mark.parametrize('name, change', [
    ('a.wav', lambda d: [(4, bytes(4)), (40, bytes(4))]), ('a.wav', lambda d: [(4, b'\xff' * 4), (40, b'\xff' * 4)]),
    ('a.wav', lambda d: [(4, struct.pack('<I', 0x7ffff024)), (40, struct.pack('<I', 0x7ffff000))]),
    ('a.flac', lambda d: [(21, bytes([d[21] & 0xf0])), (22, bytes(4))]), ('a.au', lambda d: [(8, b'\xff' * 4)]),
    ('a.caf', lambda d: [(d.index(b'data') + 4, b'\xff' * 8)]),
    ('a.aiff', lambda d: [(4, b'\x7f\xff\xff\xff'), (d.index(b'SSND') + 4, b'\x7f\xff\xff\xff')])])
def test_lengths_that_a_recorder_could_not_go_back_to_write_are_no_damage(files, name, change, tmp_path):
  data = (files / name).read_bytes()
  (tmp_path / name).write_bytes(patched(data, *change(data)))
  assert len(decode.load(tmp_path / name, 16000)[0]) == 64000


@pytest.mark.parametrize('cover', [10, 300_000])
def test_pictures_before_and_after_an_mp3_are_neither_damage_nor_sound(files, cover, tmp_path):
  size = bytes((cover >> shift) & 127 for shift in (21, 14, 7, 0))
  tag = b'ID3\x03\0\0' + size + os.urandom(cover).replace(b'\xff', b'\0')
  data = (files / 'a.mp3').read_bytes()
  for i, content in enumerate((tag + data, data + tag, data + b'TAG' + bytes(125))):
    (tmp_path / f'{i}.mp3').write_bytes(content)
    assert len(decode.load(tmp_path / f'{i}.mp3', 16000)[0]) == 64000


def test_a_playlist_opens_nothing(tmp_path):
  soundfile.write(tmp_path / 'secret.wav', WAVE, RATE)
  refused(tmp_path / 'list.m3u8', f'#EXTM3U\n#EXTINF:4,\n{tmp_path}/secret.wav\n#EXT-X-ENDLIST\n'.encode(), 'not readable')
  refused(tmp_path / 'list.ffconcat', f"ffconcat version 1.0\nfile '{tmp_path}/secret.wav'\n".encode(), 'not readable')


def test_a_video_without_sound_and_a_pipe_are_refused(tmp_path):
  with av.open(str(tmp_path / 'silent.mp4'), 'w') as container:
    stream = container.add_stream('mpeg4', rate=10, width=64, height=64, pix_fmt='yuv420p')
    for _ in range(5):
      container.mux(stream.encode(av.VideoFrame(64, 64, 'yuv420p')))
    container.mux(stream.encode(None))
  refused(tmp_path / 'silent.mp4', (tmp_path / 'silent.mp4').read_bytes(), 'no audio track')
  os.mkfifo(tmp_path / 'pipe.wav')
  with pytest.raises(decode.AudioError, match='not a regular file'):
    decode.load(tmp_path / 'pipe.wav', 16000)


@pytest.mark.parametrize('rate', [250, 2_000_000])
def test_rates_of_hydrophones_and_of_bat_detectors_are_read(rate, tmp_path):
  soundfile.write(tmp_path / 'a.wav', 0.1 * np.ones(2 * rate), rate)
  assert len(decode.load(tmp_path / 'a.wav', 16000)[0]) == 32000
