"""Reading records back: any order, from threads, and damage told with the shard's name."""
import concurrent.futures
import dataclasses
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from m2d_clap_jax.data import prepare, read, schema, tfrecord
from m2d_clap_jax.data.read import Folder
from m2d_clap_jax.errors import UserError
from tests.prepare_helpers import FakeEncoder, corpus


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp('records')
  prepare.prepare(corpus(root / 'a', 20), root / 'a', root / 'out', text_encoder=FakeEncoder(), workers=2, num_shards=3,
                  embedding_dtype='float32')
  return root / 'out'


def test_a_clip_survives_the_round_trip():
  meta = {'schema': 1, 'logmel': {'n_mels': 80}, 'text_encoder': {'width': 4}, 'embedding_dtype': 'float32'}
  rng = np.random.default_rng(0)
  clip = schema.Record('ä/b.wav', rng.standard_normal((80, 7)).astype(np.float16), ['één', 'two'],
                     rng.standard_normal((2, 4)).astype(np.float32), ['l'])
  back = schema.decode(schema.encode(clip), meta)
  assert (back.key, back.captions, back.labels) == (clip.key, clip.captions, clip.labels)
  np.testing.assert_array_equal(back.logmel, clip.logmel)
  np.testing.assert_array_equal(back.caption_embeddings, clip.caption_embeddings)


def test_records_come_in_the_order_asked_for_and_equal_those_of_tensorflow(folder):
  split = Folder(folder).split('train')
  expected = [record.numpy() for record in tf.data.TFRecordDataset(split.files)]
  assert split.num_clips == len(expected) == 20 and len(split.files) == 3
  ids = np.random.default_rng(0).integers(0, 20, 100)
  assert split.read(ids) == [expected[i] for i in ids]
  assert split.read([]) == []
  for bad in (-1, 20):
    with pytest.raises(IndexError):
      split.read([bad])


def test_tensorflow_parses_what_the_schema_says(folder):
  f = Folder(folder)
  batch = tf.io.parse_example(f.split('train').read(range(5)), schema.tf_features(f.meta))
  logmel = tf.reshape(tf.io.decode_raw(batch['logmel'], tf.float16), [5, 80, -1])
  embeddings = tf.reshape(tf.io.decode_raw(batch['caption_embeddings'], tf.float32), [5, 2, 8])
  for i in range(5):
    clip = f.split('train').clip(i)
    np.testing.assert_array_equal(logmel[i], clip.logmel)
    np.testing.assert_array_equal(embeddings[i], clip.caption_embeddings)
    assert [text.decode() for text in batch['captions'][i].numpy()] == clip.captions


def test_threads_share_a_split_with_fewer_open_files_than_shards(folder, monkeypatch):
  monkeypatch.setattr(read, '_OPEN_FILES', 1)
  split = pickle.loads(pickle.dumps(Folder(folder).split('train')))
  expected = split.read(range(20))
  orders = [np.random.default_rng(seed).permutation(20) for seed in range(40)]
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for order, found in zip(orders, pool.map(split.read, orders)):
      assert found == [expected[i] for i in order]


def test_a_shard_whose_files_were_all_rejected_is_an_empty_shard(tmp_path):
  import tensorflow_datasets as tfds
  manifest = corpus(tmp_path / 'a', 4)
  for i in (0, 2):
    (tmp_path / f'a/{i}.wav').write_bytes(b'')
  prepare.prepare(manifest, tmp_path / 'a', tmp_path / 'out', text_encoder=FakeEncoder(), workers=1, num_shards=4)
  split = Folder(tmp_path / 'out').split('train')
  assert sorted(split.clip(i).key for i in range(split.num_clips)) == ['1.wav', '3.wav']
  dataset = tfds.builder_from_directory(str(tmp_path / 'out')).as_dataset(split='train')
  assert sorted(record['key'].numpy() for record in dataset) == [b'1.wav', b'3.wav']


def test_missing_and_truncated_shards_are_named(folder, tmp_path):
  out = tmp_path / 'out'
  shutil.copytree(folder, out)
  shard = out / 'train-00001-of-00003.tfrecord'
  data = shard.read_bytes()
  split = Folder(out).split('train')
  shard.write_bytes(data[:-1])
  for attempt in (lambda: Folder(out).split('train'), lambda: split.read(range(20))):
    with pytest.raises(UserError, match='train-00001-of-00003.tfrecord: shard has .* cut off'):
      attempt()
  shard.unlink()
  with pytest.raises(UserError, match='train-00001-of-00003.tfrecord: shard cannot be read'):
    Folder(out).split('train')
  shard.write_bytes(bytes(len(data)))  # the right length, nothing in it
  with pytest.raises(UserError, match='train-00001-of-00003.tfrecord record 0: damaged'):
    Folder(out).split('train').read(range(20))


def test_a_damaged_record_is_named_by_shard_and_number(folder, tmp_path):
  out = tmp_path / 'out'
  shutil.copytree(folder, out)
  split = Folder(out).split('train')
  shard, offset, length = (int(part[0]) for part in split.locate([9]))
  with open(split.files[shard], 'r+b') as f:
    f.seek(offset)
    f.write(b'\xff' * length)
  with pytest.raises(UserError, match=rf'{split.files[shard]} record {9 - int(split._starts[shard])}: damaged'):
    Folder(out).split('train').clip(9)


def test_every_flipped_bit_is_noticed(folder, tmp_path):
  out = tmp_path / 'out'
  shutil.copytree(folder, out)
  draw = np.random.default_rng(0)
  for _ in range(60):
    split = Folder(out).split('train')
    i = int(draw.integers(split.num_clips))
    shard, offset, length = (int(part[0]) for part in split.locate([i]))
    place, bit = offset - 12 + int(draw.integers(length + 16)), 1 << int(draw.integers(8))
    with open(split.files[shard], 'r+b') as file:
      file.seek(place)
      whole = file.read(1)
      file.seek(place)
      file.write(bytes([whole[0] ^ bit]))
      file.flush()
      with pytest.raises(UserError, match=rf'record {i - int(split._starts[shard])}: damaged'):
        split.clip(i)
      file.seek(place)
      file.write(whole)
    assert len(split.read([i])[0]) == length


def test_a_log_mel_that_is_not_finite_is_damage(folder):
  split = Folder(folder).split('train')
  clip = split.clip(3)
  for value in (np.nan, np.inf, -np.inf):
    broken = clip.logmel.copy()
    broken[7, 5] = value
    with pytest.raises(UserError, match='record 3: damaged .its log-mel holds NaN or infinity'):
      split._decoded(3, schema.encode(dataclasses.replace(clip, logmel=broken)))


def test_a_record_without_its_values_is_named_too(folder):
  split = Folder(folder).split('train')
  example = tf.train.Example.FromString(split.read([9])[0])
  del example.features.feature['num_frames'].int64_list.value[:]
  with pytest.raises(UserError, match=r'record \d+: damaged'):
    split._decoded(9, example.SerializeToString())


def test_folders_that_are_none_are_told(folder, tmp_path):
  with pytest.raises(UserError, match='not a prepared data folder'):
    Folder(tmp_path)
  with pytest.raises(UserError, match="no split 'valid', only train"):
    Folder(folder).split('valid')
  (tmp_path / 'prepare.json').write_text('{"schema": 99}')
  with pytest.raises(UserError, match='schema=99: must be 1'):
    Folder(tmp_path)


@pytest.mark.parametrize('captions', [[], ['a dog', 'ein Hündchen']])
def test_records_are_those_that_tensorflow_writes(captions, tmp_path):
  record = schema.Record('a/ö.wav', np.arange(12, dtype=np.float16).reshape(4, 3), captions, np.ones((2, 3), np.float16), [])
  data = schema.encode(record)
  assert tf.train.Example.FromString(data).SerializeToString(deterministic=True) == data
  with tf.io.TFRecordWriter(str(tmp_path / 'x')) as writer:
    writer.write(data)
  assert (tmp_path / 'x').read_bytes() == tfrecord.frame(data)


def test_a_message_of_another_kind_is_no_record():
  meta = {'logmel': {'n_mels': 4}, 'text_encoder': None}
  other = tf.train.Example(features=tf.train.Features(feature={
      'key': tf.train.Feature(float_list=tf.train.FloatList(value=[1.0]))})).SerializeToString()
  for data, words in (b'\xff\xff', 'not a tf.train.Example'), (b'', 'lacks key'), (other, 'lacks logmel'):
    with pytest.raises(ValueError, match=words):
      schema.decode(data, meta)


def test_a_folder_is_read_without_tensorflow(data):
  code = (f'import sys; sys.modules["tensorflow"] = None\nfrom m2d_clap_jax.data.read import Folder\n'
          f'print(len(Folder({str(data)!r}).split("train").clips(range(40))))')
  assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout == '40\n'
