"""What each of several hosts reads: its own part of a batch alone, and together every clip once an epoch."""
import collections

import numpy as np
import pytest

from m2d_clap_jax.data.batches import TrainingBatches, embeddings
from m2d_clap_jax.data.order import Order
from m2d_clap_jax.data.prepare import prepare
from m2d_clap_jax.data.read import Folder
from tests.prepare_helpers import FakeEncoder, corpus


@pytest.mark.parametrize('hosts', [1, 2, 3, 4])
@pytest.mark.parametrize('clips, batch_size', [(40, 12), (37, 12), (101, 24)])
def test_every_clip_comes_exactly_once_an_epoch_for_any_number_of_hosts(hosts, clips, batch_size):
  order = Order(clips, batch_size, seed=5)
  rows = [slice(h * batch_size // hosts, (h + 1) * batch_size // hosts) for h in range(hosts)]
  seen = np.concatenate([np.concatenate([order.clips(step)[part] for part in rows])
                         for step in range(clips)])  # batch_size whole epochs
  for epoch in range(batch_size):
    assert sorted(seen[epoch * clips:(epoch + 1) * clips]) == list(range(clips))


def test_each_host_reads_its_own_part_of_a_batch_alone(data):
  split = Folder(data).split('train')
  options = dict(frames=32, batch_size=16, seed=0, captions=embeddings)
  whole = TrainingBatches(split, **options)(3)
  read = []
  split._data, original = lambda *record: (read.append(record), original(*record))[1], split._data
  parts = [TrainingBatches(split, **options, part=(i, 4))(3) for i in range(4)]
  for name in whole:
    np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[name])
  assert len(read) == 16


@pytest.fixture(scope='module')
def odd(tmp_path_factory):
  """37 clips in 5 shards."""
  root = tmp_path_factory.mktemp('odd')
  prepare(corpus(root / 'audio', 37, seconds=0.3), root / 'audio', root / 'records', text_encoder=FakeEncoder(),
          workers=1, num_shards=5)
  return root / 'records'


@pytest.mark.parametrize('hosts', [1, 2, 3, 4])
def test_hosts_together_read_every_record_of_odd_shards_once_an_epoch(hosts, odd):
  splits = [Folder(odd).split('train') for _ in range(hosts)]
  counts = [collections.Counter() for _ in splits]
  for host, (split, count) in enumerate(zip(splits, counts)):
    split._data = lambda i, *record, c=count, f=split._data: (c.update([int(i)]), f(i, *record))[1]
    batches = TrainingBatches(split, frames=24, batch_size=12, seed=0, captions=embeddings, part=(host, hosts))
    for step in range(37):  # 12 epochs
      batches(step)
  assert {sum(count.values()) for count in counts} == {12 * 37 // hosts}
  total = sum(counts, collections.Counter())
  assert sorted(total) == list(range(37)) and set(total.values()) == {12}
  assert set(splits[0].locate(range(37))[0]) == set(range(5))
