"""Damaged and hostile files give one line or a model: no traceback, nothing executed, no memory beyond the file's size."""
import argparse
import io
import json
import pathlib
import pickle
import resource
import struct
import zipfile

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from benchmarks.mutations import mutated
from m2d_clap_jax import weights
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.weights.files import read_tensors
from tests import reference

FOLDER = 'm2d_clap_vit_tiny-80x96p16x16-240128'
COUNT = 300


@pytest.fixture(scope='module')
def tensors():
  """A small encoder with its CLAP head."""
  shapes = {name: shape for name, shape in reference.shapes('clap_tiny').items()
            if not name.startswith(('decoder', 'target', 'mask_token'))}
  return {name: reference.weight(name, shape) for name, shape in shapes.items()} | {
      'norm_stats': np.array([-7.1, 4.2], np.float32)}


@pytest.fixture(scope='module')
def pth(tensors):
  buffer = io.BytesIO()
  args = argparse.Namespace(model='m2d_clap_vit_base', input_size=[80, 96], output_dir=pathlib.Path('/lab'), lr=None)
  torch.save({'model': {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}, 'epoch': 3,
              'args': args}, buffer)
  return buffer.getvalue()


@pytest.fixture(scope='module')
def safetensors(tensors, tmp_path_factory):
  path = tmp_path_factory.mktemp('whole') / 'model.safetensors'
  save_file({name: np.array(value, order='C') for name, value in tensors.items()}, path)
  return path.read_bytes()


def opened(path):
  """Whether a file opens; UserError, of one line, is the only error that is allowed."""
  try:
    loaded = weights.read(path, heads=3)
  except UserError as error:
    assert '\n' not in str(error) and str(path) in str(error)
    return False
  loaded.nested('params')
  return True


def peak():
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@pytest.mark.parametrize('kind', ['pth', 'pickle', 'safetensors'])
def test_mutated_files_open_or_give_one_line(kind, pth, safetensors, tmp_path, capsys):
  if kind == 'safetensors':
    data, spots = safetensors, [0, 0, struct.unpack('<Q', safetensors[:8])[0] // 2]
  else:
    pickled = pth.index(b'data.pkl')
    spots = [pickled + 64 * i for i in range(60)] if kind == 'pickle' else [0, pickled, len(pth) - 200, len(pth) - 3000]
    data = pth
  path = tmp_path / FOLDER / f'model.{"safetensors" if kind == "safetensors" else "pth"}'
  path.parent.mkdir()
  path.write_bytes(data)
  assert opened(path)
  before = peak()
  results = []
  for seed in range(COUNT):
    path.write_bytes(mutated(data, np.random.default_rng(seed), spots))
    results.append(opened(path))
  assert 0 < sum(results) < COUNT, 'changes that all matter, or none, test nothing'
  assert peak() - before < 300 << 20, 'the file has 2 MB'
  assert list(tmp_path.iterdir()) == [path.parent] and list(path.parent.iterdir()) == [path]


def test_mutated_pickles_inside_a_whole_archive_open_or_give_one_line(pth, tmp_path, capsys):
  path = tmp_path / FOLDER / 'model.pth'
  path.parent.mkdir()
  with zipfile.ZipFile(io.BytesIO(pth)) as archive:
    parts = {name: archive.read(name) for name in archive.namelist()}
  name, = (name for name in parts if name.endswith('data.pkl'))
  results = []
  for seed in range(COUNT):
    with zipfile.ZipFile(path, 'w') as archive:
      for part, data in parts.items():
        draw = np.random.default_rng(seed)
        archive.writestr(part, mutated(data, draw, [0, len(data) // 2]) if part == name else data)
    results.append(opened(path))
  assert not all(results)


def refused(path, message):
  before = peak()
  with pytest.raises(UserError, match=message):
    weights.read(path)
  assert peak() - before < 200 << 20


def test_a_header_that_claims_terabytes_is_refused(tmp_path):
  path = tmp_path / 'model.safetensors'
  header = json.dumps({'cls_token': {'dtype': 'F32', 'shape': [1, 1, 1 << 40], 'data_offsets': [0, 1 << 42]}}).encode()
  for length in (len(header), 1 << 40, (1 << 64) - 1):
    path.write_bytes(struct.pack('<Q', length) + header + bytes(64))
    refused(path, 'not a readable .safetensors')


def test_a_zip_bomb_is_refused_before_it_is_unpacked(pth, tmp_path):
  path = tmp_path / 'model.pth'
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive, archive.open('a/data.pkl', 'w') as part:
    for _ in range(1000):
      part.write(bytes(1 << 20))
  refused(path, 'its parts are compressed')


@pytest.mark.parametrize('made', [bytearray, 'torch.FloatTensor'])
def test_a_pickle_that_asks_for_terabytes_is_refused(made, tmp_path):
  made = torch.FloatTensor if made == 'torch.FloatTensor' else made

  class Large:
    def __reduce__(self):
      return made, (1 << 42,)
  path = tmp_path / 'model.pth'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('a/data.pkl', pickle.dumps({'model': Large()}, protocol=2))
    archive.writestr('a/version', '3')
  refused(path, 'not opened because it contains .* and such objects can run code')


def test_tensors_of_one_value_open_and_absurd_ones_do_not(tensors, tmp_path):
  path = tmp_path / FOLDER / 'model.pth'
  path.parent.mkdir()
  spread = {name: torch.tensor(0.01).expand(value.shape) for name, value in tensors.items()}
  torch.save(spread, path)
  assert weights.read(path, heads=3).trees['params']['cls_token'].strides == (0, 0, 0)
  torch.save(spread | {'cls_token': torch.tensor(0.0).expand(1, 1, 1 << 40)}, path)
  refused(path, 'claim to be more than 4 GiB larger than the file')


def test_tensors_that_share_a_storage_are_read_as_they_are(tmp_path):
  whole = torch.arange(12.0)
  torch.save({'a': whole, 'b': whole[3:7], 'c': whole.reshape(3, 4).T}, tmp_path / 'model.pth')
  found = read_tensors(tmp_path / 'model.pth')
  np.testing.assert_array_equal(found['b'], [3, 4, 5, 6])
  np.testing.assert_array_equal(found['c'], np.arange(12.0).reshape(3, 4).T)


def test_bfloat16_becomes_float32_in_both_kinds_of_files(tmp_path):
  from safetensors.torch import save_file as save_torch
  value = {'a': torch.tensor([1.0, -0.1], dtype=torch.bfloat16)}
  torch.save(value, tmp_path / 'model.pth')
  save_torch(value, tmp_path / 'model.safetensors')
  for file in tmp_path.iterdir():
    found = read_tensors(file)['a']
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, value['a'].float())


class Unknown:
  """Stands for any class of somebody's own code."""


@pytest.mark.parametrize('value, name', [(Unknown(), 'Unknown'), (print, 'print'), (np.float64(1), 'numpy')])
def test_any_other_class_is_one_line_that_names_it(value, name, tmp_path):
  torch.save({'model': {'a': torch.zeros(1)}, 'args': argparse.Namespace(what=value)}, tmp_path / 'model.pth')
  refused(tmp_path / 'model.pth', f'{name}.* beside tensors and the arguments of a run')


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('content, message', [(b'', 'empty'), (b'no checkpoint at all', 'not a readable|is no PyTorch'),
                                              (None, 'not a readable')], ids=['empty', 'other', 'truncated'])
def test_files_that_are_no_checkpoints_give_one_line(tmp_path, suffix, content, message):
  path = tmp_path / f'model{suffix}'
  if suffix == '.pth':
      torch.save({'a': torch.zeros(1000)}, path)
  else:
    save_file({'a': np.zeros(1000, np.float32)}, path)
  path.write_bytes(path.read_bytes()[:2000] if content is None else content)
  with pytest.raises(UserError, match=message) as error:
    weights.read(path)
  assert '\n' not in str(error.value)


def test_nothing_in_a_pth_file_is_executed(tmp_path):
  path = tmp_path / 'evil.pth'
  torch.save({'model': _Evil(str(tmp_path / 'was_here'))}, path)
  with pytest.raises(UserError, match='not opened because it contains _*io.open beside .*such objects can run code'):
    weights.read(path)
  assert not (tmp_path / 'was_here').exists()


class _Evil:

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return open, (self.path, 'w')
