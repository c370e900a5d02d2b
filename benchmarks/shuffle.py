"""How well clips are mixed at AudioSet's size, beside a shuffle buffer. Simulated: no record is read.

  python -m benchmarks.shuffle --clips 2000000 --shards 1024 --batch 2048

The order is that of training (data/order.py): every epoch a new permutation of all clips, drawn from the seed. The
buffer is the usual way of reading TFRecords sequentially: shards in random order, several of them interleaved, and a
buffer from which each next clip is drawn. If clips are stored sorted (by class, by source), the shards that share a
batch determine what a batch contains.
"""
import argparse
import time

import numpy as np

from benchmarks.report import Row, finish
from m2d_clap_jax.data.order import Order


def buffered(clips: int, shards: int, seed: int, *, buffer: int = 10000, cycle: int = 16) -> np.ndarray:
  """An epoch's order [clips] through a shuffle buffer: `cycle` interleaved shards, a buffer of `buffer` clips."""
  rng = np.random.default_rng(seed)
  parts = np.array_split(np.arange(clips), shards)
  stream, waiting = [], [parts[i] for i in rng.permutation(shards)]
  for start in range(0, shards, cycle):
    group = waiting[start:start + cycle]
    longest = max(map(len, group))
    turns = np.full((longest, len(group)), -1)
    for column, part in enumerate(group):
      turns[:len(part), column] = part
    stream.append(turns[turns >= 0])
  stream = np.concatenate(stream)
  # Clip i leaves when its place in the buffer is drawn, a geometric time after it arrived; those left at the end leave
  # in random order, which the same draw gives.
  return stream[np.argsort(np.arange(clips) + rng.geometric(1 / buffer, clips) + rng.random(clips), kind='stable')]


def mates_of_a_shard(order: np.ndarray, shard_of: np.ndarray, batch: int) -> float:
  """Share of the pairs in a batch that lie in the same shard; times the number of shards, 1 is chance."""
  shards = int(shard_of.max()) + 1
  batches = shard_of[order[:len(order) // batch * batch]].reshape(-1, batch)
  same = sum(np.sum(counts * (counts - 1)) for counts in (np.bincount(row, minlength=shards) for row in batches))
  return same / (batches.size * (batch - 1)) * shards


def met_again(first: np.ndarray, second: np.ndarray, batch: int) -> float:
  """Number of pairs that share a batch in two consecutive epochs, relative to chance; 1 is chance."""
  clips = len(first) // batch * batch
  batch_in_second = np.full(len(first), -1)
  batch_in_second[second[:clips]] = np.arange(clips) // batch
  pairs = again = 0
  for row in batch_in_second[first[:clips]].reshape(-1, batch):
    row = row[row >= 0]
    counts = np.bincount(row)
    pairs += len(row) * (len(row) - 1)
    again += np.sum(counts * (counts - 1))
  return again / pairs * (clips // batch)


def stored_order(order: np.ndarray) -> float:
  """Correlation of a clip's place in the epoch with that of the clip before it in storage; 0 is chance, 1 unshuffled."""
  place = np.empty(len(order))
  place[order] = np.arange(len(order))
  return float(np.corrcoef(place[:-1], place[1:])[0, 1])


def statistics(orders: list[np.ndarray], shards: int, batch: int) -> dict[str, float]:
  """The three measures for two epochs [clips] each."""
  shard_of = np.concatenate([np.full(len(part), i) for i, part in enumerate(np.array_split(orders[0], shards))])
  return {'pairs of one shard in a batch, over chance': mates_of_a_shard(orders[0], shard_of, batch),
          'pairs that meet again, over chance': met_again(*orders, batch),
          'neighbours stay neighbours (correlation)': stored_order(orders[0])}


def epoch_of(order: Order, epoch: int) -> np.ndarray:
  """The clips of an epoch in training order, batch by batch."""
  clips, size = order.num_clips, order.batch_size
  first, last = epoch * clips // size, -(-(epoch + 1) * clips // size)
  taken = np.concatenate([order.clips(step) for step in range(first, last)])
  return taken[epoch * clips - first * size:][:clips]


def main(argv=None):
  parser = argparse.ArgumentParser(prog='python -m benchmarks.shuffle', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--clips', type=int, default=2_000_000)
  parser.add_argument('--shards', type=int, default=1024)
  parser.add_argument('--batch', type=int, default=2048)
  parser.add_argument('--buffer', type=int, default=10_000)
  parser.add_argument('--cycle', type=int, default=16, help='number of interleaved shards that fill the buffer')
  parser.add_argument('--out', help='JSON file to write')
  args = parser.parse_args(argv)
  order = Order(args.clips, args.batch, seed=3)
  start = time.perf_counter()
  order.clips(0)
  first = time.perf_counter() - start
  start = time.perf_counter()
  for step in range(1, 101):
    order.clips(step)
  later = (time.perf_counter() - start) / 100
  found = {
      'this': statistics([epoch_of(order, epoch) for epoch in (0, 1)], args.shards, args.batch),
      'buffer': statistics([buffered(args.clips, args.shards, seed, buffer=args.buffer, cycle=args.cycle)
                            for seed in (0, 1)], args.shards, args.batch)}
  rows = [row for name in found['this'] for row in (
      Row(name, found['this'][name], ''), Row(f'  buffer of {args.buffer}, {args.cycle} shards', found['buffer'][name], ''))]
  rows += [Row('first batch of an epoch', 1e3 * first, 'ms'), Row('each other batch', 1e3 * later, 'ms'),
           Row('memory of an epoch\'s order', 8 * args.clips / 2 ** 20, 'MB')]
  finish('shuffle', {key: value for key, value in vars(args).items() if key != 'out'}, rows, {}, args.out)


if __name__ == '__main__':
  main()
