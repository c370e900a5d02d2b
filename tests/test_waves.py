"""Decoded recordings and the order in which fine-tuning takes them."""
from types import SimpleNamespace

import numpy as np
import pytest

from m2d_clap_jax.audio.decode import AudioError
from m2d_clap_jax.data.sampling import Epochs, rarity, validation_crops
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.tasks import decoded
from m2d_clap_jax.tasks.decoded import Waves


def test_recordings_keep_their_length_and_are_decoded_once(tmp_path, monkeypatch):
  monkeypatch.setattr(decoded, 'SHARD', 2)
  monkeypatch.setattr(decoded, 'MEASURED', 1)
  sources = [np.linspace(-0.9, 0.9, 10), np.full(3, -1.0), np.full(4, 7.0)]
  asked, notes, reports = [], [], []

  def read(i):
    asked.append(i)
    return sources[i]
  options = {'samples': 4, 'rate': 16000, 'report_progress': lambda done, total: notes.append((done, total)),
             'report_space': reports.append}
  found = Waves(tmp_path, 'abc', read, **options)
  assert len(found) == 3 and notes == [(1, 3), (2, 3), (3, 3)] and not found.rejected
  np.testing.assert_array_equal(found.lengths, [10, 3, 4])
  expected = np.array([sources[0][:4], [-1, -1, -1, 0], [1] * 4])
  np.testing.assert_allclose(found.crops([0, 1, 2], [0, 0.9, 0.9]) / 32767, expected, atol=2e-5)
  assert sum(path.stat().st_size for path in found.folder.glob('*.int16')) == 2 * (10 + 3 + 4)
  again = Waves(tmp_path, 'abc', read, **options)
  np.testing.assert_array_equal(again.crops([2, 0], [0.3, 0.7]), found.crops([2, 0], [0.3, 0.7]))
  assert sorted(asked) == [0, 0, 1, 2] and len(reports) == 1  # the first also for the estimate of the size
  Waves(tmp_path, 'abd', read, **options)
  assert len(asked) == 8


def test_crops_lie_uniformly_anywhere_in_a_recording(tmp_path):
  found = Waves(tmp_path, 'ab', lambda i: np.arange(1 + 10 * i, 1 + 10 * i + 7) / 100, samples=4, rate=1)
  starts = np.round(found.crops(np.zeros(400, int), np.arange(400) / 400)[:, 0] / 327.67).astype(int)
  np.testing.assert_array_equal(np.bincount(starts), [0, 100, 100, 100, 100])
  np.testing.assert_array_equal(np.round(found.crops([1], [0.999])[0] / 327.67), [14, 15, 16, 17])  # not into the next


def test_the_disk_space_is_reported_before_it_is_used_and_too_little_is_refused(tmp_path, monkeypatch):
  reports = []

  def report(line):
    assert not list(tmp_path.glob('*/*'))
    reports.append(line)
  Waves(tmp_path, [str(i) for i in range(100)], lambda i: np.ones(50_000), samples=10, rate=1, report_space=report)
  assert 'about 0.01 GB' in reports[0]
  monkeypatch.setattr(decoded.shutil, 'disk_usage', lambda folder: SimpleNamespace(free=1_000_000))
  with pytest.raises(UserError, match='0.01 GB .*0.001 GB are free.*config.data.cache'):
    Waves(tmp_path / 'other', [str(i) for i in range(100)], lambda i: np.ones(50_000), samples=10, rate=1)


def test_decoding_continues_where_it_stopped(tmp_path, monkeypatch):
  monkeypatch.setattr(decoded, 'SHARD', 2)
  monkeypatch.setattr(decoded, 'MEASURED', 1)
  asked = []

  def read(i):
    asked.append(i)
    if i == 3 and asked.count(3) == 1:
      raise KeyboardInterrupt
    return np.ones(2)
  with pytest.raises(KeyboardInterrupt):
    Waves(tmp_path, 'abcd', read, samples=2, rate=1)
  before = asked.count(1)
  found = Waves(tmp_path, 'abcd', read, samples=2, rate=1)
  assert asked.count(1) == before == 1 and asked.count(3) == 2
  assert (found.crops(np.arange(4), np.zeros(4)) == 32767).all()


def test_processes_that_share_a_folder_share_the_decoding(tmp_path, monkeypatch):
  monkeypatch.setattr(decoded, 'SHARD', 2)
  monkeypatch.setattr(decoded, 'MEASURED', 1)
  asked = {0: [], 1: []}

  def reading(process):
    def read(i):
      asked[process].append(i)
      if process and i == 3:  # while this one has done one file, the other starts and does the rest
        with monkeypatch.context() as patch:
          patch.setattr('os.getpid', lambda: 1)  # which is in the names of files being written
          Waves(tmp_path, 'abcdef', reading(0), samples=2, rate=1, part=(0, 2))
      return np.full(2, i / 8)
    return read
  found = Waves(tmp_path, 'abcdef', reading(1), samples=2, rate=1, part=(1, 2))
  assert sorted(asked[1]) == [0, 2, 3] and {0, 1, 4, 5} <= set(asked[0])  # 0 for the estimate
  np.testing.assert_allclose(found.crops(np.arange(6), np.zeros(6))[:, 0] / 32767, np.arange(6) / 8, atol=2e-5)


def test_what_cannot_be_read_is_told_each_time(tmp_path):
  def read(i):
    if i:
      raise AudioError('b.wav: the file is empty')
    return np.ones(2)
  for _ in range(2):
    found = Waves(tmp_path, 'ab', read, samples=2, rate=1)
    assert found.rejected == {1: 'b.wav: the file is empty'} and found.lengths.tolist() == [2, 0]
    assert found.crops([0, 1], [0, 0.5]).tolist() == [[32767] * 2, [0, 0]]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='config.data.cache'):
    Waves(tmp_path / 'file', 'a', lambda i: np.ones(2), samples=2, rate=1)


def test_crops_and_patchout_are_drawn_anew_each_time_and_again_the_same_after_a_kill():
  epochs, later = Epochs(11, 4, seed=0), Epochs(11, 4, seed=0)
  draws = np.array([epochs.crops(step) for step in range(500)])
  assert draws.shape == (500, 4) and len(np.unique(draws)) == 2000 and abs(draws.mean() - 0.5) < 0.03
  np.testing.assert_array_equal(later.crops(400), draws[400])
  assert later.patchout(400) == epochs.patchout(400) != epochs.patchout(401)
  assert (Epochs(11, 4, seed=1).crops(400) != draws[400]).all()
  valid = validation_crops(5, 0, epoch=3)
  np.testing.assert_array_equal(valid, validation_crops(5, 0, epoch=3))
  assert (valid != validation_crops(5, 0, epoch=4)).all() and (valid != validation_crops(5, 1, epoch=3)).all()


def test_epochs_take_each_clip_once_and_differ():
  epochs = Epochs(11, 4, seed=0)
  assert epochs.steps == 2
  batches = [epochs.clips(step) for step in range(6)]
  for epoch in range(3):
    taken = np.concatenate(batches[2 * epoch:2 * epoch + 2])
    assert len(set(taken)) == 8 and taken.max() < 11
  assert (np.concatenate(batches[:2]) != np.concatenate(batches[2:4])).any()
  np.testing.assert_array_equal(Epochs(11, 4, seed=0).clips(5), batches[5])
  assert (Epochs(11, 4, seed=1).clips(5) != batches[5]).any()
  with pytest.raises(UserError, match='batch_size=12'):
    Epochs(11, 12, seed=0)


def test_rare_classes_weigh_more_by_the_published_formula():
  targets = np.array([[1, 0], [1, 0], [1, 1], [0, 0]])
  common, rare = 1000 / 3.01, 1000 / 1.01
  np.testing.assert_allclose(rarity(targets), [common ** (2 / 3)] * 2 + [(common + rare) ** (2 / 3), 0])


def test_weighted_epochs_draw_without_replacement_and_in_proportion():
  weights = np.array([0, 1, 2, 4, 8, 16.0])
  epochs = Epochs(6, 1, seed=0, weights=weights, per_epoch=2)
  assert epochs.steps == 2
  pairs = np.array([[epochs.clips(2 * e)[0], epochs.clips(2 * e + 1)[0]] for e in range(4000)])
  assert (pairs[:, 0] != pairs[:, 1]).all() and not (pairs == 0).any()
  # The chance of a clip to be one of two drawn one after the other.
  share = weights / weights.sum()
  expected = share + np.array([sum(share[j] * share[i] / (1 - share[j]) for j in range(6) if j != i) for i in range(6)])
  found = np.bincount(pairs.ravel(), minlength=6) / len(pairs)
  np.testing.assert_allclose(found, expected, atol=0.03)
  assert Epochs(6, 1, seed=0, weights=weights, per_epoch=200).steps == 5
