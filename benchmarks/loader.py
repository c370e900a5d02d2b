"""The training loader, beside a raw read of its files and a minimal tf.data pipeline that reads and parses them.

  python -m benchmarks.loader --clips 2000 --batch 64

Writes records of the real schema (80 x 1001 float16 log-mels, 5 float32 caption embeddings of 768) to a temporary
folder, so that all reads come from the page cache. The loader returns random 608-frame crops with a random caption of
each clip, in batches in an exactly shuffled order; the ceilings return whole records in any order.
"""
import argparse
import concurrent.futures
import dataclasses
import functools
import os
import tempfile

import numpy as np

from benchmarks.report import CORES, Row, finish, in_turns
from m2d_clap_jax.audio.logmel import LogMel
from m2d_clap_jax.data import schema, write
from m2d_clap_jax.data.batches import TrainingBatches, embeddings, prefetch
from m2d_clap_jax.data.manifest import Row as Clip
from m2d_clap_jax.data.read import Folder

FRAMES, CROP, CAPTIONS, WIDTH = 1001, 608, 5, 768


def write_records(folder: str, clips: int):
  """A data folder of random clips, written as `m2d-clap prepare` writes them."""
  rng = np.random.default_rng(0)
  noise = rng.standard_normal(clips + LogMel().n_mels * FRAMES).astype(np.float16)  # clip i begins at its sample i
  vectors = rng.standard_normal(clips + CAPTIONS * WIDTH).astype(np.float32)

  def result(i):
    logmel = noise[i:i + LogMel().n_mels * FRAMES].reshape(-1, FRAMES)
    return True, {'logmel': logmel, 'truncated': False, 'seconds': 10.0, 'sum': 0.0, 'sumsq': float(logmel.size)}

  def embeddings(row):
    i = int(row.file_name)
    return vectors[i:i + CAPTIONS * WIDTH].reshape(-1, WIDTH)

  settings = {'schema': schema.VERSION, 'logmel': dataclasses.asdict(LogMel()), 'max_seconds': 30.0,
              'text_encoder': {'name': 'random', 'hash': '0' * 16, 'width': WIDTH}, 'embedding_dtype': 'float32'}
  rows = [Clip(str(i), [f'caption {k} of clip {i}' for k in range(CAPTIONS)], ['note']) for i in range(clips)]
  for shard in write.plan(rows, settings, num_shards=max(1, clips // 128)):  # several to each core
    write.write_shard(folder, shard, (result(int(row.file_name)) for row in shard.rows), embeddings, lambda: None)
  write.write_metadata(folder)


def load(split, batch_size: int, steps: int, threads: int):
  """The training driver's loader."""
  batches = TrainingBatches(split, frames=CROP, batch_size=batch_size, seed=0, captions=embeddings)
  for batch in prefetch(batches, 0, steps, threads=threads):
    assert batch['logmel'].shape == (batch_size, LogMel().n_mels, CROP) and len(batch['text']) == batch_size


def read(files):
  """Reads all bytes of the files once, on all cores."""
  def whole(path):
    buffer = bytearray(1 << 20)
    with open(path, 'rb', buffering=0) as f:
      while f.readinto(buffer):
        pass
  with concurrent.futures.ThreadPoolExecutor(CORES) as pool:
    list(pool.map(whole, files))


def bare_tfdata(split, batch_size: int, steps: int):
  """Bare tf.data on all cores: records in any order -> arrays of batches, nothing shuffled, cropped or picked.

  Returns the data set, whose creation is not timed.
  """
  import tensorflow as tf
  features = schema.tf_features(split.meta)

  def to_arrays(records):
    examples = tf.io.parse_example(records, features)
    return (tf.io.decode_raw(examples['logmel'], tf.float16),
            tf.io.decode_raw(examples['caption_embeddings'], tf.float32))
  options = tf.data.Options()
  options.deterministic = False
  # One of each per core, because tf.data's autotuning takes a while to reach that.
  data = tf.data.TFRecordDataset(split.files, num_parallel_reads=CORES).repeat().batch(batch_size)
  data = data.map(to_arrays, num_parallel_calls=CORES).prefetch(4)
  return data.take(steps).with_options(options)


def go_through(data):
  for logmel, captions in data:
    assert len(logmel) == len(captions)


def main(argv=None):
  parser = argparse.ArgumentParser(prog='python -m benchmarks.loader', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--clips', type=int, default=2000)
  parser.add_argument('--batch', type=int, default=64)
  parser.add_argument('--steps', type=int, default=100, help='batches per timed round')
  parser.add_argument('--threads', type=int, default=2, help='threads that make batches; the training driver has 2')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--out', help='JSON file to write')
  args = parser.parse_args(argv)
  with tempfile.TemporaryDirectory(prefix='m2d_clap_benchmark_') as folder:
    write_records(folder, args.clips)
    split = Folder(folder).split('train')
    megabytes = sum(map(os.path.getsize, split.files)) / args.clips / 2 ** 20  # of a record
    timings = in_turns({
        'loader': functools.partial(load, split, args.batch, args.steps, args.threads),
        'raw read': functools.partial(read, split.files),
        'tf.data': functools.partial(go_through, bare_tfdata(split, args.batch, args.steps))}, args.rounds)
  records = args.batch * args.steps
  rate = {name: (args.clips if name == 'raw read' else records) / timing.best for name, timing in timings.items()}
  rows = [
      Row('loader', rate['loader'], 'records/s', rate['tf.data'], 'tf.data, read and parse only'),
      Row('loader', rate['loader'], 'records/s', rate['raw read'], 'raw read of the files'),
      Row('loader', rate['loader'] * megabytes, 'MB/s', rate['raw read'] * megabytes, 'raw read of the files'),
      Row('record', megabytes, 'MB'),
      Row('peak growth of memory', timings['loader'].grew_mb, 'MB'),
      Row('the same of tf.data', timings['tf.data'].grew_mb, 'MB')]
  settings = {'clips': args.clips, 'batch': args.batch, 'steps': args.steps, 'threads': args.threads}
  finish('loader', settings, rows, timings, args.out)


if __name__ == '__main__':
  main()
