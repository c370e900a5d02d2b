"""Batches are mixed as well as by chance at AudioSet's size."""
import numpy as np
import pytest

from benchmarks import shuffle
from m2d_clap_jax.data.order import Order

CLIPS, SHARDS, BATCH = 2_000_000, 1024, 2048


@pytest.fixture(scope='module')
def orders():
  order = Order(CLIPS, BATCH, seed=3)
  return [shuffle.epoch_of(order, epoch) for epoch in (0, 1)]


def test_two_million_clips_come_exactly_once_in_every_epoch(orders):
  for order in orders:
    assert np.array_equal(np.sort(order), np.arange(CLIPS))


def test_a_batch_is_mixed_as_by_chance(orders):
  shard, again, neighbours = shuffle.statistics(orders, SHARDS, BATCH).values()
  # 2.05e9 pairs, of which a thousandth lies in one shard: chance itself varies by 0.1%.
  assert shard == pytest.approx(1, abs=0.005) and again == pytest.approx(1, abs=0.005)
  assert abs(neighbours) < 0.005


def test_a_shuffle_buffer_is_not_mixed_as_by_chance():
  """Else the statistics would tell nothing."""
  orders = [shuffle.buffered(200_000, 1024, seed, buffer=2000) for seed in (0, 1)]
  assert np.array_equal(np.sort(orders[0]), np.arange(200_000))
  shard, again, neighbours = shuffle.statistics(orders, 1024, 512).values()
  assert shard > 10 and again > 1.5 and neighbours > 0.5
