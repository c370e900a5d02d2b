"""Preparations that are killed, repeated, divided or in each other's way: the same bytes, or a line that says why not."""
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile

from m2d_clap_jax.data import prepare
from m2d_clap_jax.data.read import Folder
from m2d_clap_jax.errors import UserError
from tests.prepare_helpers import FakeEncoder, contents, corpus, noise, write_manifest


def test_the_result_depends_neither_on_workers_nor_on_row_order(tmp_path):
  manifest = corpus(tmp_path / 'a', 12)
  prepare.prepare(manifest, tmp_path / 'a', tmp_path / 'one', text_encoder=FakeEncoder(), workers=1, num_shards=3)
  lines = manifest.read_text().splitlines()
  pairs = [line for i in reversed(range(12)) for line in lines[1 + 2 * i:3 + 2 * i]]
  manifest.write_text('\n'.join([lines[0], *pairs]))
  encoder = FakeEncoder()
  prepare.prepare(manifest, tmp_path / 'a', tmp_path / 'two', text_encoder=encoder, workers=2, num_shards=3)
  assert contents(tmp_path / 'one') == contents(tmp_path / 'two')
  assert sorted(text for call in encoder.calls for text in call) == sorted(
      {f'sound number {i}' for i in range(12)} | {f'kind {i}' for i in range(5)})


def test_a_killed_run_continues_to_the_same_bytes(tmp_path):
  manifest = corpus(tmp_path / 'a', 120)
  code = ('from m2d_clap_jax.data.prepare import prepare; from tests.prepare_helpers import FakeEncoder; import sys; '
          'prepare(*sys.argv[1:], text_encoder=FakeEncoder(), num_shards=20, workers=1)')
  out = tmp_path / 'killed'
  process = subprocess.Popen([sys.executable, '-c', code, str(manifest), str(tmp_path / 'a'), str(out)])
  while process.poll() is None and len(list(out.glob('*.tfrecord.json'))) < 2:
    time.sleep(0.001)
  process.kill()
  process.wait()
  kept = {path.name: path.stat().st_mtime_ns for path in out.glob('train*') if (out / f'{path.name}.json').exists()}
  assert 2 <= len(kept) < 20 and not (out / 'prepare.json').exists()
  with pytest.raises(UserError, match='not finished'):
    Folder(out)
  settings = dict(num_shards=20, workers=1)
  prepare.prepare(manifest, tmp_path / 'a', out, text_encoder=FakeEncoder(), **settings)
  prepare.prepare(manifest, tmp_path / 'a', tmp_path / 'whole', text_encoder=FakeEncoder(), **settings)
  assert contents(out) == contents(tmp_path / 'whole')
  assert all((out / name).stat().st_mtime_ns == then for name, then in kept.items())
  assert not list(out.glob('.captions*'))


def test_other_settings_for_the_same_folder_are_refused_by_name(tmp_path):
  audio, out = tmp_path / 'a', tmp_path / 'out'
  manifest = corpus(audio, 6)
  good = dict(text_encoder=FakeEncoder(), workers=1, num_shards=2)
  prepare.prepare(manifest, audio, out, **good)
  before = contents(out)
  for change, told in [(dict(sample_rate=32000), 'sample_rate=16000, not 32000'),
                       (dict(max_seconds=5), 'max_seconds=30.0, not 5'),
                       (dict(embedding_dtype='float32'), 'embedding_dtype=float16, not float32'),
                       (dict(num_shards=3), 'num_shards=2, not 3'),
                       (dict(text_encoder=None), 'text_encoder=fake, not none'),
                       (dict(text_encoder=FakeEncoder('0')), 'text_encoder=fake, not these weights')]:
    with pytest.raises(UserError, match=told) as e:
      prepare.prepare(manifest, audio, out, **{**good, **change})
    assert str(out) in str(e.value) and 'choose another --out' in str(e.value)
  text = manifest.read_text()
  manifest.write_text(text.replace('number 3', 'number three'))
  with pytest.raises(UserError, match='another manifest'):
    prepare.prepare(manifest, audio, out, **good)
  manifest.write_text(text)
  (out / 'train-00001-of-00002.tfrecord').write_bytes(b'cut')
  prepare.prepare(manifest, audio, out, **good)
  assert contents(out) == before


def test_splits_can_be_prepared_one_after_the_other(tmp_path):
  audio = tmp_path / 'a'
  corpus(audio, 6)
  manifest = write_manifest(audio / 's.csv', [(f'{i}.wav', 'x', 'c', 'test' if i > 3 else 'train') for i in range(6)])
  common = dict(text_encoder=None, workers=1)
  prepare.prepare(manifest, audio, tmp_path / 'both', **common)
  meta = prepare.prepare(manifest, audio, tmp_path / 'two', split='test', **common)
  assert list(meta['splits']) == ['test']
  prepare.prepare(manifest, audio, tmp_path / 'two', split='train', **common)
  assert contents(tmp_path / 'both') == contents(tmp_path / 'two')
  with pytest.raises(UserError, match="no split 'valid', only test, train"):
    prepare.prepare(manifest, audio, tmp_path / 'three', split='valid', **common)


def test_a_full_disk_is_one_line_and_finished_shards_stay(tmp_path):
  audio, out = tmp_path / 'a', tmp_path / 'out'
  manifest = corpus(audio, 8)
  out.mkdir()
  full = out / '.train-00001-of-00002.tfrecord.tmp'
  full.symlink_to('/dev/full')  # every write to it fails as on a full disk
  with pytest.raises(UserError, match=r'train-00001-of-00002.tfrecord: cannot be written \(.*make room') as e:
    prepare.prepare(manifest, audio, out, text_encoder=None, workers=1, num_shards=2)
  assert '\n' not in str(e.value) and not full.exists()
  first = (out / 'train-00000-of-00002.tfrecord').stat().st_mtime_ns
  assert not (out / 'train-00001-of-00002.tfrecord').exists()
  meta = prepare.prepare(manifest, audio, out, text_encoder=None, workers=1, num_shards=2)
  assert meta['splits']['train']['clips'] == 8
  assert (out / 'train-00000-of-00002.tfrecord').stat().st_mtime_ns == first


def test_two_runs_do_not_write_into_one_folder(tmp_path):
  manifest = corpus(tmp_path / 'a', 2)
  with prepare._folder(tmp_path / 'out'):
    with pytest.raises(UserError, match='another preparation'):
      prepare.prepare(manifest, tmp_path / 'a', tmp_path / 'out', text_encoder=None)


def test_tasks_of_an_array_job_write_the_records_of_one_run(tmp_path):
  manifest = corpus(tmp_path / 'audio', 12, seconds=0.2)
  options = dict(num_shards=5, workers=1)
  prepare.prepare(manifest, tmp_path / 'audio', tmp_path / 'one', text_encoder=FakeEncoder(), **options)
  metas = [prepare.prepare(manifest, tmp_path / 'audio', tmp_path / 'many', text_encoder=FakeEncoder(), task=(i, 3),
                           **options) for i in (2, 0, 1)]
  assert metas[:2] == [None, None] and metas[2] == Folder(tmp_path / 'one').meta
  names = sorted(path.name for path in (tmp_path / 'one').iterdir() if not path.name.startswith('.'))
  assert names == sorted(path.name for path in (tmp_path / 'many').iterdir() if not path.name.startswith('.'))
  for name in names:
    if name.endswith('.tfrecord'):
      assert (tmp_path / 'one' / name).read_bytes() == (tmp_path / 'many' / name).read_bytes(), name


def test_tasks_run_at_once_and_the_same_task_only_once(tmp_path):
  with prepare._folder(tmp_path, (0, 2)), prepare._folder(tmp_path, (1, 2)):
    for second in ((0, 2), None):
      with pytest.raises(UserError, match='another preparation'):
        with prepare._folder(tmp_path, second):
          pass


def test_audio_that_has_changed_is_prepared_again_and_audio_that_is_gone_is_kept(tmp_path, capsys):
  audio = tmp_path / 'audio'
  manifest = corpus(audio, 6)

  def run():
    prepare.prepare(manifest, audio, tmp_path / 'out', text_encoder='none', num_shards=6, workers=1)
    split = Folder(tmp_path / 'out').split('train')
    return {record.key: record.logmel for record in split.clips(range(split.num_clips))}, contents(tmp_path / 'out')
  before, files = run()
  assert run()[1] == files and 'written again' not in capsys.readouterr().err
  soundfile.write(audio / '2.wav', noise(0.2, seed=77), 16000)
  (audio / '4.wav').unlink()
  after, files_after = run()
  assert '1 files are not those that were prepared, such as 2.wav: their shards are written again' in capsys.readouterr().err
  assert after.keys() == before.keys() and after['2.wav'].shape[1] == 21
  changed = [name for name in files if files[name] != files_after[name] and name.endswith('.tfrecord')]
  assert len(changed) == 1
  shared = [key for key in before if key != '2.wav']
  assert all(np.array_equal(before[key], after[key]) for key in shared)
