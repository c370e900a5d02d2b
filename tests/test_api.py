"""Inference equals the authors' runtime, and an embedding depends on its own clip alone."""
import dataclasses
import re
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
import soundfile
import soxr

import m2d_clap_jax
from m2d_clap_jax.audio import LogMel
from m2d_clap_jax.data.batches import crop
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.models.vit import Block, LayerNorm
from m2d_clap_jax.weights import Weights
from m2d_clap_jax.weights.names import to_flax
from tests import reference
from tests.small_model import arpeggio, close, tiny_weights

LENGTHS = ('0.7', '6.08', '10.0', '13.37')


@pytest.fixture(scope='module')
def base():
  name = 'm2d_clap_vit_base-80x608p16x16'
  tensors = {key: value for key, value in reference.state_dict(name).items()
             if not key.startswith(('decoder', 'target', 'mask_token'))}
  fields = dict(width=768, depth=12, heads=12, input_size=(80, 608), text_width=768)
  return m2d_clap_jax.load(Weights(model=fields, trees=to_flax(tensors)))


def blocks_of(model, wave):
  """The encoder by its parts, one clip as it is: [CLS] and patches after each block -> [blocks, T, 5 * D]."""
  network = model.network.clone(parent=None)
  logmel = model.logmel.numpy(wave)
  columns = -(-logmel.shape[1] // 16)
  logmel = np.pad(logmel, ((0, 0), (0, columns * 16 - logmel.shape[1])), constant_values=network.norm_stats[0])
  x, _ = network.apply(model.variables, logmel[None], method='embed')
  outputs = []
  for i in range(network.depth):
    x = Block(network.heads).apply({'params': model.variables['params']['encoder'][f'blocks_{i}']}, x)
    outputs.append(network.frames(x[:, 1:])[0])
  return np.stack(outputs)


def test_features_of_a_layer_are_its_blocks_output_whatever_else_is_in_the_batch(music):
  model = m2d_clap_jax.load(tiny_weights(depth=3), batch_size=16)
  clips = [music[:n] for n in (15000, 2000, 9000, 700, 15100, 14000, 13000, 4000, 12000)]
  features, stamps = model.encode_frames(clips, layer='all')
  for clip, found, stamp in zip(clips, features, stamps):
    expected = blocks_of(model, clip)
    assert found.shape == expected.shape == (3, len(stamp), 480) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=5e-6 * np.abs(expected).max())
  for layer, block in ((1, 0), (3, 2), (-1, 2), (-3, 0), (np.int64(2), 1)):
    one, same_stamps = model.encode_frames(clips[0], layer=layer)
    assert one.shape == (1, *features[0].shape[1:])
    np.testing.assert_allclose(one[0], features[0][block], atol=1e-6 * np.abs(features[0]).max())
    np.testing.assert_array_equal(same_stamps[0], stamps[0])


def test_the_last_block_and_the_final_norm_are_the_usual_features(model, music):
  clips = music[:40000].reshape(2, -1)  # each of two chunks
  layers, stamps = model.encode_frames(clips, layer='all')
  usual, usual_stamps = model.encode_frames(clips)
  assert layers.shape == (2, *usual.shape)
  norm = model.variables['params']['encoder']['norm']
  patches = layers[-1].reshape(*usual.shape[:2], 5, 96)
  normed = LayerNorm().apply({'params': norm}, patches).reshape(usual.shape)
  np.testing.assert_allclose(normed, usual, atol=5e-6 * np.abs(usual).max())
  np.testing.assert_array_equal(stamps, usual_stamps)


@pytest.mark.parametrize('layer', [0, 3, -3, 1.0, True, 'last'])
def test_a_layer_that_is_not_there_is_refused(model, music, layer):
  with pytest.raises(UserError, match=re.escape(f"layer={layer!r}: the encoder has 2 blocks: give 1 to 2, -2 to -1, or 'all'")):
    model.encode_frames(music, layer=layer)


@pytest.mark.parametrize('seconds', LENGTHS)
def test_frames_clips_clap_embeddings_and_time_stamps_equal_the_public_runtime(base, seconds):
  golden = reference.load('portable_base')
  waves = golden[f'wav_{seconds}'].astype(np.float32)
  frames, stamps = base.encode_frames(waves)
  assert frames.shape == tuple(golden[f'frames_shape_{seconds}'])
  close(frames[:, :3], golden[f'frames_head_{seconds}'], 1e-4)
  close(frames[:, -2:], golden[f'frames_tail_{seconds}'], 1e-4)
  np.testing.assert_allclose(stamps, golden[f'ts_{seconds}'], atol=1e-3)
  close(frames.mean(axis=1), golden[f'clip_{seconds}'], 1e-4)
  clip, audio = base.features(waves)
  close(clip, golden[f'clip_{seconds}'], 1e-4)
  close(audio, golden[f'clap_{seconds}'], 1e-4)


@pytest.mark.parametrize('rate', [16000, 32000])
@pytest.mark.parametrize('block', [1, 137, 5000, 10 ** 6])
def test_a_log_mel_in_chunks_is_bit_equal_to_the_whole(rate, block):
  logmel = LogMel.for_rate(rate)
  for samples in (1, 150, 201, 16000, 16000 + 40, 30 * 160 - 1, 61 * 160 + 200):
    wave = np.random.default_rng(samples).standard_normal(samples).astype(np.float32)
    block_size = max(block, samples // 50)
    blocks = [wave[i:i + block_size] for i in range(0, samples, block_size)]
    chunks = list(logmel.chunks(blocks, 30))
    assert all(chunk.shape[1] == 30 for chunk in chunks[:-1]) and 1 <= chunks[-1].shape[1] <= 30
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), logmel.numpy(wave))


@pytest.mark.parametrize('kind', ['mlp', 'semantic'])
def test_a_clip_alone_in_a_batch_and_again_gives_the_same(kind, music):
  model = m2d_clap_jax.load(tiny_weights(audio_projector=kind), batch_size=16)
  clip = music[:20000]
  others = [np.tile(music, 2)[:16000 + 9000 * i] for i in range(6)]
  alone, alone_audio = model.features([clip])
  batch, batch_audio = model.features([*others[:3], clip, *others[3:]])
  again, again_audio = model.features(clip)
  for value, expected in ((batch[3], alone[0]), (again[0], alone[0]), (batch_audio[3], alone_audio[0]),
                          (again_audio[0], alone_audio[0])):
    np.testing.assert_allclose(value, expected, atol=1e-6 * np.abs(expected).max())
  np.testing.assert_allclose(model.embed([clip]), alone, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(model.encode_audio(clip), alone_audio, rtol=1e-5, atol=1e-6)


def test_the_bucket_that_a_clip_falls_into_does_not_matter(model, music):
  for samples in (1, 400, 2000, 5000, 9000, 15200):
    clip = music[:samples]
    columns = -(-(samples // 160 + 1) // 16)
    logmel = model.logmel.numpy(clip)
    logmel = np.pad(logmel, ((0, 0), (0, columns * 16 - logmel.shape[1])), constant_values=-7.1)
    unpadded = model.network.apply(model.variables, logmel[None], method='clip_features')[0]
    np.testing.assert_allclose(model.embed(clip), unpadded, atol=2e-6 * np.abs(unpadded).max())


def test_a_crop_that_is_no_whole_number_of_patches_is_one_piece(music):
  model = m2d_clap_jax.load(tiny_weights(input_size=(80, 101)))  # as 80x1001: 6 columns of 16, and 5 frames
  second = music[:16000]  # 101 frames
  piece, = model.chunks(second)
  np.testing.assert_array_equal(piece.logmel, model.logmel.numpy(second)[:, :96])
  assert model.encode_frames(second)[0].shape == (1, 6, 480)
  assert [chunk.columns for chunk in model.chunks(music[:3 * 16000])] == [6, 6, 6]


@pytest.mark.parametrize('samples', [1, 8000, 15199, 15359, 20000])
def test_short_clips_of_a_model_trained_here_are_padded_with_silence_as_in_its_training(music, samples):
  weights = dataclasses.replace(tiny_weights(), padded_to=96)
  model, wave = m2d_clap_jax.load(weights), music[:samples]
  means, audio = model.features(wave)
  frames = model.network.input_size[1]
  if samples < 15200:  # fewer than 96 frames
    expected = model.network.apply(model.variables, crop(model.logmel.numpy(wave), frames, 0.0)[None], method='clip_features')
    close(means, expected[0], 1e-5)
    close(audio, expected[1], 1e-5)
    assert np.abs(means - m2d_clap_jax.load(tiny_weights()).embed(wave)).max() > 0.01
  as_is = m2d_clap_jax.load(weights, pad_short=False)
  np.testing.assert_array_equal(as_is.embed(wave), m2d_clap_jax.load(tiny_weights()).embed(wave))
  np.testing.assert_array_equal(model.encode_frames(wave)[0], as_is.encode_frames(wave)[0])
  np.testing.assert_array_equal(m2d_clap_jax.load(tiny_weights(), pad_short=True).embed(wave), means)


def test_two_batches_are_computed_at_once(model, music, monkeypatch):
  alone = model.embed(music[:16000 * 3])  # 3 whole chunks and a shorter one, each a batch
  both, start = threading.Barrier(2), model._start

  def together(function, logmel, columns):
    if logmel.shape[2] == widest and next(turns, None) is not None:
      both.wait(timeout=30)  # fails unless another batch is being computed, too
    return start(function, logmel, columns)
  widest, turns = model.network.input_size[1], iter(range(2))
  monkeypatch.setattr(model, '_start', together)
  np.testing.assert_array_equal(model.embed(music[:16000 * 3]), alone)


def test_odd_lengths_do_not_compile_again(model, music, request):
  model.embed([music[:n] for n in (1, 3000, 6000, 10000, 14000)])
  events = []

  def listen(name, seconds, **_):
    events.append(name)
  jax.monitoring.register_event_duration_secs_listener(listen)
  request.addfinalizer(lambda: jax.monitoring.unregister_event_duration_listener(listen))
  for n in range(1000, 15000, 1301):
    model.embed(music[:n])
  assert not [name for name in events if 'compile' in name]
  jax.jit(lambda x: x + 1)(music)
  assert any('compile' in name for name in events)


def test_stereo_44_khz_int16_and_files_are_close_to_mono_16_khz_float(model, tmp_path):
  left, right = arpeggio(44100), arpeggio(44100, shift=2 ** (1 / 4))
  stereo = np.stack([left, right])
  expected = model.embed(soxr.resample((left + right) / 2, 44100, 16000, quality='HQ'), 16000)
  as_int = np.round(stereo * 32767).astype(np.int16)
  soundfile.write(tmp_path / 'music.flac', stereo.T, 44100, subtype='PCM_24')
  soundfile.write(tmp_path / 'music.wav', as_int.T, 44100, subtype='PCM_16')
  for waves, rate in ((stereo[None], 44100), ([stereo], 44100), ([stereo.T], 44100), ([as_int], 44100),
                      (stereo.mean(axis=0), 44100), (tmp_path / 'music.flac', None),
                      ([str(tmp_path / 'music.wav')], None)):
    close(model.embed(waves, rate), expected, 1e-3)


def test_what_is_no_audio_is_named(model, tmp_path):
  good = np.zeros(1000, np.float32)
  bad = good.copy()
  bad[3] = np.nan
  for waves, message in [([good, bad], 'item 1 contains NaN'), ([good, good[:0]], 'item 1 is empty'),
                         (np.zeros((2, 2, 2, 2)), r'shape \(2, 2, 2, 2\)'), ([np.zeros((40, 50))], 'item 0 has shape'),
                         ([good.astype(complex)], 'item 0: a wave of complex'), ([], 'no audio'),
                         ([tmp_path / 'missing.wav'], 'missing.wav: no such file')]:
    with pytest.raises(UserError, match=message):
      model.embed(waves)


def test_silence_and_one_sample_have_finite_embeddings(model):
  for wave in (np.zeros(16000, np.float32), np.zeros(1, np.float32), np.ones(1, np.int16)):
    assert np.isfinite(model.embed(wave)).all() and np.isfinite(model.encode_audio(wave)).all()


def test_a_position_table_of_the_file_is_used_and_cut(music):
  tiny = tiny_weights()
  own = tiny.with_tables()
  same = m2d_clap_jax.load(own).embed(music)
  np.testing.assert_allclose(same, m2d_clap_jax.load(tiny).embed(music), rtol=1e-5, atol=1e-6)
  own.trees['tables']['pos_embed'] = own.trees['tables']['pos_embed'][:, :, ::-1].copy()
  assert np.abs(m2d_clap_jax.load(own).embed(music[:4000]) - m2d_clap_jax.load(tiny).embed(music[:4000])).max() > 1e-3


def test_an_hour_takes_no_more_memory_than_a_minute(tmp_path):
  """In a process of its own: peak memory only ever grows."""
  rng = np.random.default_rng(0)
  for name, minutes in (('short', 1), ('long', 60)):
    with soundfile.SoundFile(tmp_path / f'{name}.wav', 'w', 8000, 1, subtype='PCM_U8') as file:
      for _ in range(minutes):
        file.write(0.1 * rng.standard_normal(8000 * 60))
  code = f'''
import resource, sys
sys.path.insert(0, {str(reference.GOLDEN.parent.parent)!r})
import m2d_clap_jax
from tests.small_model import tiny_weights
model = m2d_clap_jax.load(tiny_weights(depth=1, input_size=(80, 608)))
for name in ('short', 'long'):
  model.embed({str(tmp_path)!r} + f'/{{name}}.wav')
  print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
'''
  result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  short, long = map(int, result.stdout.split())
  assert long - short < 60 << 10, (short, long, result.stderr)  # KiB; the wave alone would be 230 MB


def test_eight_devices_give_the_features_of_one(music, monkeypatch):
  clips = [music[500 * i:500 * i + 9000] for i in range(25)]  # batches of 16, 8 and 1
  many = m2d_clap_jax.load(tiny_weights(), batch_size=2)
  used = []
  compute = many._pooled
  many._pooled = lambda *args: used.append(len(args[1].devices()) if hasattr(args[1], 'devices') else 1) or compute(*args)
  first = jax.devices()[:1]
  monkeypatch.setattr(jax, 'local_devices', lambda: first)
  one = m2d_clap_jax.load(tiny_weights())
  for value, expected in zip(many.features(clips), one.features(clips)):
    np.testing.assert_allclose(value, expected, atol=5e-6 * np.abs(expected).max())
  assert sorted(used) == [1, 8, 8] and one._mesh.size == 1
