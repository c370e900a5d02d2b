"""The order of the data, crops, captions, and batches read ahead."""
import threading

import numpy as np
import pytest

from m2d_clap_jax.audio.logmel import SILENCE
from m2d_clap_jax.data import schema
from m2d_clap_jax.data.batches import TrainingBatches, crop, embeddings, pick, prefetch
from m2d_clap_jax.data.order import Order
from m2d_clap_jax.errors import UserError


@pytest.mark.parametrize('num_clips,batch_size', [(100, 10), (103, 10), (10, 10), (64, 64)])
def test_every_clip_comes_exactly_once_an_epoch(num_clips, batch_size):
  order = Order(num_clips, batch_size, seed=3)
  steps = 5 * num_clips // batch_size + 1
  stream = np.concatenate([order.clips(step) for step in range(steps)])
  epochs = [stream[i:i + num_clips] for i in range(0, 5 * num_clips, num_clips)]
  for epoch in epochs:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(num_clips))
  assert any((a != epochs[0]).any() for a in epochs[1:]), 'each epoch has an order of its own'


def test_a_batch_depends_on_seed_and_step_alone():
  asked_in_order = Order(1000, 32, seed=3)
  for step in range(70):
    asked_in_order.clips(step)
  fresh = Order(1000, 32, seed=3)
  np.testing.assert_array_equal(fresh.clips(70), asked_in_order.clips(70))
  np.testing.assert_array_equal(fresh.draws(70), asked_in_order.draws(70))
  assert (Order(1000, 32, seed=4).clips(70) != fresh.clips(70)).any()
  assert (fresh.draws(70) != fresh.draws(71)).all()


def test_every_crop_position_and_every_caption_can_come_up():
  logmel = np.arange(10, dtype=np.float16)[None]
  uniform = np.linspace(0, 1, 1000, endpoint=False)
  starts = [crop(logmel, 8, u)[0, 0] for u in uniform]
  np.testing.assert_array_equal(np.unique(starts, return_counts=True)[0], [0, 1, 2])
  assert min(np.unique(starts, return_counts=True)[1]) > 300
  assert {pick('abc', u) for u in uniform} == set('abc')


def test_a_short_clip_is_padded_with_silence():
  padded = crop(np.ones((2, 3), np.float16), 5, 0.9)
  np.testing.assert_array_equal(padded[:, :3], 1)
  np.testing.assert_allclose(padded[:, 3:].astype(np.float32), SILENCE, rtol=1e-3)
  assert padded.dtype == np.float16


@pytest.mark.parametrize('weights', [None, (1, 1, 1)])
def test_of_several_folders_every_clip_comes_once_an_epoch(weights):
  order = Order(60, 7, seed=3, sizes=[30, 10, 20], weights=weights)
  stream = np.concatenate([order.clips(step) for step in range(26)])[:180]
  for epoch in stream.reshape(3, 60):
    np.testing.assert_array_equal(np.sort(epoch), np.arange(60))
  np.testing.assert_array_equal(stream[:7], Order(60, 7, seed=3).clips(0))


def test_weights_say_how_often_the_clips_of_a_folder_come_in_an_epoch():
  order = Order(60, 8, seed=3, sizes=[30, 10, 20], weights=(0.5, 3, 1))
  assert order.epoch_clips == 15 + 30 + 20
  stream = np.concatenate([order.clips(step) for step in range(33)])[:4 * 65]
  for epoch in stream.reshape(4, 65):
    parts = [epoch[epoch < 30], epoch[(epoch >= 30) & (epoch < 40)], epoch[epoch >= 40]]
    assert [len(part) for part in parts] == [15, 30, 20]
    assert len(np.unique(parts[0])) == 15 and (np.unique(parts[1], return_counts=True)[1] == 3).all()
  np.testing.assert_array_equal(np.bincount(stream), [2] * 30 + [12] * 10 + [4] * 20)
  fresh = Order(60, 8, seed=3, sizes=[30, 10, 20], weights=(0.5, 3, 1))
  np.testing.assert_array_equal(fresh.clips(20), order.clips(20))
  for step in (0, 1, 8, 9, 31):
    np.testing.assert_array_equal(fresh.counts(step), np.bincount(np.searchsorted(
        [30, 40], stream[:8 * step], 'right'), minlength=3))


class FakeSplit:
  """Clips whose content tells their number."""
  name, num_clips = 'train', 12

  def clips(self, ids):
    return [schema.Record(str(i), np.full((4, 6), i, np.float16), caption_embeddings=np.full((2, 3), i, np.float16))
            for i in ids]


def test_the_parts_of_the_hosts_make_up_the_batch():
  options = dict(frames=5, batch_size=8, seed=0, captions=embeddings)
  whole = TrainingBatches(FakeSplit(), **options)(4)
  parts = [TrainingBatches(FakeSplit(), **options, part=(i, 4))(4) for i in range(4)]
  for key in whole:
    np.testing.assert_array_equal(whole[key], np.concatenate([part[key] for part in parts]))
  np.testing.assert_array_equal(whole['logmel'][:, 0, 0], whole['text'][:, 0])


def test_a_batch_larger_than_the_data_is_refused():
  with pytest.raises(UserError, match='batch_size=13 is more than the 12 clips'):
    TrainingBatches(FakeSplit(), frames=5, batch_size=13, seed=0, captions=embeddings)


@pytest.mark.parametrize('start,stop', [(0, 20), (17, 20), (5, 5), (0, 2)])
def test_prefetch_keeps_the_order_and_runs_ahead_only_so_far(start, stop):
  begun, lock = [], threading.Lock()

  def make(i):
    with lock:
      begun.append(i)
    return i
  seen = []
  for item in prefetch(make, start, stop, threads=3):
    assert max(begun) <= item + 5
    seen.append(item)
  assert seen == list(range(start, stop))


def test_an_error_while_reading_reaches_the_training_loop():
  def make(i):
    if i == 2:
      raise UserError('shard gone')
    return i
  feed = prefetch(make, 0, 10)
  assert [next(feed), next(feed)] == [0, 1]
  with pytest.raises(UserError, match='shard gone'):
    next(feed)
