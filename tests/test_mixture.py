"""Several folders as one, and captions as tokens, on prepared folders without embeddings."""
import jax
import numpy as np
import pytest

from m2d_clap_jax.data.batches import Tokens, TrainingBatches, prefetch
from m2d_clap_jax.data.prepare import prepare
from m2d_clap_jax.data.read import Folder
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.text import TextTower
from m2d_clap_jax.train.prepared_data import open_data
from tests.prepare_helpers import FakeEncoder, corpus


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """Three of 9, 5 and 7 clips, without embeddings."""
  place = tmp_path_factory.mktemp('mixture')
  for name, count in {'a': 9, 'b': 5, 'c': 7}.items():
    manifest = corpus(place / 'audio' / name, count)
    prepare(manifest, place / 'audio' / name, place / name, text_encoder='none', workers=1)
  return [str(place / name) for name in 'abc']


@pytest.fixture(scope='module')
def tower():
  return TextTower('minilm')


def batches_of(data, tower, **options):
  return TrainingBatches(data.split, frames=8, batch_size=6, seed=0, captions=Tokens(tower), sizes=data.sizes,
                         weights=data.weights, **options)


def test_clips_of_a_mixture_are_those_of_the_folders_in_order(folders):
  data = open_data(False, folder=', '.join(folders))
  assert data.split.num_clips == 21 and data.labels == ['a', 'b', 'c']
  alone = {f'{folder[-1]}/{clip.key}': clip for folder in folders
           for clip in Folder(folder).split('train').clips(range(Folder(folder).split('train').num_clips))}
  mixed = data.split.clips(range(21))
  assert [clip.key for clip in mixed] == list(alone)
  for clip in data.split.clips([20, 0, 11, 9]):
    np.testing.assert_array_equal(clip.logmel, alone[clip.key].logmel)
  logmels = np.concatenate([clip.logmel.astype(np.float64) for clip in alone.values()], axis=1)  # clips of one length
  np.testing.assert_allclose((data.meta['mean'], data.meta['std']), (logmels.mean(), logmels.std()), rtol=1e-5)


def test_tokens_are_those_of_the_captions_and_the_same_in_every_process_that_continues(folders, tower):
  data = open_data(False, folder=','.join(folders))
  batches = batches_of(data, tower)
  words = {tuple(tower.tokens([caption])[0]) for clip in data.split.clips(range(21)) for caption in clip.captions}
  seen = set()
  for step, batch in enumerate(prefetch(batches, 0, 7, threads=4)):
    rows = [tuple(ids[:n]) for ids, n in zip(batch['ids'].tolist(), batch['mask'].sum(axis=1))]
    assert words >= set(rows)
    seen |= set(rows)
    again = batches_of(open_data(False, folder=','.join(folders)), tower)(step)
    assert all((again[key] == batch[key]).all() for key in batch) and set(batch) == {'logmel', 'ids', 'mask', 'folder'}
  assert len(seen) > 10


def test_interrupted_20_times_every_clip_comes_once_an_epoch_and_counts_add_up(folders):
  """Each life goes on from the last step that was saved, every third, with data that it opens anew."""
  draw, saved, seen = np.random.default_rng(0), 0, {}
  for life in range(21):
    data = open_data(False, folder=','.join(folders))
    batches = TrainingBatches(data.split, frames=8, batch_size=6, seed=0, captions=None, sizes=data.sizes)
    stop = min(saved + draw.integers(1, 9), 70) if life < 20 else 70
    for step, batch in zip(range(saved, stop), prefetch(batches, saved, 70)):
      clips = data.split.clips(batches.order.clips(step))
      assert [data.labels[number] for number in batch['folder']] == [clip.key[0] for clip in clips]
      assert all(any((clip.logmel[:, i:i + 8] == crop).all() for i in range(clip.logmel.shape[1] - 7))
                 for clip, crop in zip(clips, batch['logmel']))
      seen[step] = [clip.key for clip in clips]
    saved = stop // 3 * 3
  order = [key for step in range(70) for key in seen[step]]  # 20 epochs of 21 clips
  for epoch in range(20):
    assert len(set(order[21 * epoch:21 * (epoch + 1)])) == 21
  assert batches.order.counts(70).tolist() == [20 * 9, 20 * 5, 20 * 7]
  for step in range(71):
    counted = [sum(key[0] == label for number in range(step) for key in seen[number]) for label in data.labels]
    assert batches.order.counts(step).tolist() == counted


def test_captions_of_all_lengths_compile_few_programs(tower):
  draw = np.random.default_rng(0)

  class Clip:
    def __init__(self):
      self.captions = [' '.join(['bell'] * draw.integers(1, 90))]
  total = jax.jit(lambda ids, mask: (ids * mask).sum())
  for _ in range(200):
    total(**Tokens(tower)([Clip() for _ in range(4)], [0.5] * 4))
  assert total._cache_size() <= 7
  assert Tokens(tower, 'one')([Clip()], [0.5])['ids'].shape == (1, 512)


def test_a_folder_of_other_settings_is_refused_by_name(folders, tmp_path):
  manifest = corpus(tmp_path / 'audio', 3)
  prepare(manifest, tmp_path / 'audio', tmp_path / 'other', sample_rate=32000, text_encoder='none', workers=1)
  prepare(manifest, tmp_path / 'audio', tmp_path / 'embedded', text_encoder=FakeEncoder(), workers=1)
  with pytest.raises(UserError, match='other.*32000 Hz.*sample_rate is 16000'):
    open_data(False, folder=f'{folders[0]},{tmp_path}/other')
  with pytest.raises(UserError, match='embedded was prepared with text_encoder=.*fake.* where .*/a has None'):
    open_data(True, folder=f'{folders[0]},{tmp_path}/embedded')
  open_data(False, folder=f'{folders[0]},{tmp_path}/embedded')
  with pytest.raises(UserError, match=r'weights=\(1, 2\): needs a number above 0 for each of the 3 folders'):
    open_data(False, folder=','.join(folders), weights=(1, 2))


def test_a_clip_without_a_caption_is_named(tower):
  class Clip:
    key, captions = 'x/silent.wav', []
  with pytest.raises(UserError, match='x/silent.wav: has no caption'):
    Tokens(tower)([Clip()], [0.5])
