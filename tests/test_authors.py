"""The authors' folders: .npy log-mels and pickled dictionaries of caption embeddings."""
import csv
import os
import pickle

import numpy as np
import pytest

from m2d_clap_jax.cli import main
from m2d_clap_jax.data import authors
from m2d_clap_jax.data.read import Folder
from m2d_clap_jax.errors import UserError

IDS = ['abcdefghijk', '0-_defghijk', 'Ybcdefghijk']


def vectors(*shape):
  return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
  """Log-mels under the various names that are in use, a few bad ones, and two dictionaries."""
  logmels = tmp_path / 'logmels'
  (logmels / 'sub').mkdir(parents=True)
  for i, name in enumerate(['abcdefghijk.npy', 'sub/Y0-_defghijk.npy', 'sub/Ybcdefghijk_30.npy', 'unknown0000.npy']):
    np.save(logmels / name, vectors(*([1] * (i % 2)), 80, 100 + i))
  np.save(logmels / 'sub/abcdefghijk_wide.npy', vectors(64, 10))
  np.save(logmels / 'sub/abcdefghijk_nan.npy', np.full((80, 10), np.nan, np.float32))
  np.save(logmels / 'sub/abcdefghijk_pickle.npy', np.array({'a': 1}, dtype=object))
  (logmels / 'sub/abcdefghijk_cut.npy').write_bytes((logmels / 'abcdefghijk.npy').read_bytes()[:500])
  np.save(tmp_path / 'capemb_a.npy', {key: vectors(8) for key in IDS})
  np.save(tmp_path / 'capemb_b.npy', {IDS[0]: vectors(4, 8)})
  return tmp_path


def run(folder, *arguments):
  return main.main(['prepare', f'--logmels={folder}/logmels', f'--out={folder}/out', '--workers=1', *arguments])


def test_the_authors_folders_are_taken_as_they_are(folder):
  assert run(folder, f'--caption_embeddings={folder}/capemb_*.npy') == 0
  f = Folder(folder / 'out')
  split = f.split('train')
  clips = {clip.key: clip for clip in map(split.clip, range(split.num_clips))}
  assert {k: c.logmel.shape for k, c in clips.items()} == {
      'abcdefghijk.npy': (80, 100), 'sub/Y0-_defghijk.npy': (80, 101), 'sub/Ybcdefghijk_30.npy': (80, 102)}
  expected = np.concatenate([vectors(8)[None], vectors(4, 8)]).astype(np.float16)
  np.testing.assert_array_equal(clips['abcdefghijk.npy'].caption_embeddings, expected)
  assert clips['abcdefghijk.npy'].captions == []
  assert f.meta['text_encoder']['name'] == 'capemb' and f.meta['text_encoder']['width'] == 8
  counts = f.meta['splits']['train']
  assert (counts['files'], counts['clips'], counts['rejected'], counts['captions']) == (8, 3, 5, 7)
  reasons = {row['file']: row['reason'] for row in csv.DictReader(open(folder / 'out/rejected.csv'))}
  assert reasons['unknown0000.npy'] == 'no caption embedding'
  assert 'shape [64, 10]' in reasons['sub/abcdefghijk_wide.npy'] and 'NaN' in reasons['sub/abcdefghijk_nan.npy']
  assert len(reasons) == 5
  import tensorflow_datasets as tfds
  assert len(list(tfds.builder_from_directory(str(folder / 'out')).as_dataset(split='train'))) == 3


def test_linked_folders_are_searched_and_odd_names_told(folder, capsys):
  (folder / 'elsewhere').mkdir()
  np.save(folder / 'elsewhere' / 'abcdefghijk.npy', vectors(80, 50))
  (folder / 'logmels' / 'linked').symlink_to(folder / 'elsewhere')
  (folder / 'elsewhere' / 'back').symlink_to(folder / 'logmels')  # a circle
  with open(os.fsencode(folder / 'elsewhere') + b'/caf\xe9.npy', 'wb') as file:
    np.save(file, vectors(80, 50))
  with open(os.fsencode(folder / 'elsewhere') + b'/caf\xea.npy', 'wb') as file:
    np.save(file, vectors(80, 50))
  (folder / 'elsewhere' / 'late.NPY').write_bytes(b'x')
  assert run(folder, '--text_encoder=none') == 0
  assert 'files: 11 log-mels, 1 others (linked/late.NPY)' in capsys.readouterr().out
  split = Folder(folder / 'out').split('train')
  assert [clip.key for clip in map(split.clip, range(split.num_clips))].count('linked/abcdefghijk.npy') == 1
  rejected = (folder / 'out' / 'rejected.csv').read_text()
  assert all(rf'caf\x{byte}.npy,its name is not valid UTF-8' in rejected for byte in ('e9', 'ea'))


def test_log_mels_alone_must_be_asked_for(folder, capsys):
  assert run(folder) == 2
  assert '--text_encoder=none' in capsys.readouterr().err
  assert run(folder, '--text_encoder=none') == 0
  meta = Folder(folder / 'out').meta
  assert meta['text_encoder'] is None and meta['splits']['train']['clips'] == 4


def test_ids_are_found_under_all_names_in_use():
  assert authors.candidates('x/Y0-_defghijk.npy')[1] == '0-_defghijk'
  assert '0-_defghijk' in authors.candidates('Y0-_defghijk_30.npy')
  assert authors.candidates('Ybcdefghijk_30.npy').index('Ybcdefghijk') < 3


def test_dictionaries_of_old_and_new_numpy_are_read(tmp_path):
  path = tmp_path / 'd.npy'
  for protocol in range(2, 6):
    with open(path, 'wb') as f:
      np.lib.format.write_array_header_1_0(f, {'shape': (), 'fortran_order': False, 'descr': '|O'})
      data = pickle.dumps(np.array({'a': vectors(3), b'b': vectors(2, 3)}, object), protocol)
      # numpy 1 called the module numpy.core; the shorter name changes lengths that only protocol 4 and later store
      f.write(data.replace(b'numpy._core', b'numpy.core') if protocol < 4 else data)
    found, _ = authors.load_dictionary(path)
    np.testing.assert_array_equal(found['a'], vectors(3)[None])
    np.testing.assert_array_equal(found['b'], vectors(2, 3))


class _Evil:

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.system, (f'touch {self.path}',)


def test_a_dictionary_cannot_run_code(tmp_path):
  for content in (_Evil(tmp_path / 'ran'), {'a': _Evil(tmp_path / 'ran')}):
    np.save(tmp_path / 'd.npy', np.array(content, dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match='posix.system, which arrays do not need'):
      authors.load_dictionary(tmp_path / 'd.npy')
  assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('content, told', [
    (vectors(3), 'not a dictionary'), (np.array([1, 'a'], object), 'not a dictionary'), (['list'], 'not a dictionary'),
    ({'a': np.zeros((1, 2, 3))}, r"'a' has shape \[1, 2, 3\]"), ({'a': 'text'}, "'a' has shape"), ({}, 'empty')])
def test_wrong_dictionaries_are_told(tmp_path, content, told):
  content = content if isinstance(content, np.ndarray) else np.array(content, object)
  np.save(tmp_path / 'd.npy', content, allow_pickle=True)
  with pytest.raises(UserError, match=told) as e:
    authors.Dictionaries([tmp_path / 'd.npy'], 'float16')
  assert 'd.npy' in str(e.value)


def test_damaged_absent_and_unlike_dictionaries_are_told(tmp_path):
  np.save(tmp_path / 'a.npy', {'a': vectors(8)})
  np.save(tmp_path / 'b.npy', {'a': vectors(9)})
  with pytest.raises(UserError, match="b.npy: 'a' is 9 wide, but others are 8"):
    authors.Dictionaries([tmp_path / '*.npy'], 'float16')
  data = (tmp_path / 'a.npy').read_bytes()
  for damaged in (b'', b'text', data[:100], data[:-20]):
    (tmp_path / 'b.npy').write_bytes(damaged)
    with pytest.raises(UserError, match='b.npy: not a dictionary'):
      authors.load_dictionary(tmp_path / 'b.npy')
  with pytest.raises(UserError, match='nothing.*: no such file'):
    authors.Dictionaries([tmp_path / 'nothing*.npy'], 'float16')
