"""JSON files of others: wrong types, absurd numbers and changed digits are one line, before anything is made of them."""
import json
import math
import time

import pytest

from benchmarks import fuzz
from m2d_clap_jax import fields, weights
from m2d_clap_jax.data.read import Folder
from m2d_clap_jax.errors import UserError


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp('described')
  fuzz.portable(root)
  fuzz.data_folder(root)
  return root


def changed(path, content, **changes):
  """Writes the JSON of `content` with other values, a__b being b inside of a, and without its checksum."""
  data = json.loads(content)
  data.pop(fields.CHECKSUM)
  for key, value in changes.items():
    *outer, last = key.split('__')
    node = data
    for name in outer:
      node = node[name]
    node[last] = value
  path.write_text(json.dumps(data))


@pytest.mark.parametrize('change,message', [
    ({'model__width': 2147483648}, r'config.json: model.width=2147483648: must be a whole number from 4 to 65536'),
    ({'model__width': 64}, r'tensors do not fit. of another shape .*instead of'),
    ({'model__depth': 1000}, 'missing'),
    ({'model__heads': 0}, r'model.heads=0: must be a whole number from 1'),
    ({'model__heads': 5}, r'width=32: is no multiple of heads, 5'),
    ({'model__input_size': [80]}, r'model.input_size=\[80\]: must be a list of 2'),
    ({'model__input_size': [80, 100_000]}, r'pos_embed'),
    ({'model__norm_stats': [0.0, 0.0]}, r'model.norm_stats\[1\]=0.0: must be a number from 0.001'),
    ({'model__norm_stats': [math.nan, 1.0]}, r'model.norm_stats\[0\]=NaN: must be a number'),
    ({'model__predict': 'waves'}, r'model.predict="waves": must be one of features, pixels'),
    ({'model__widht': 32}, r"widht: unknown key; did you mean 'width'"),
    ({'sample_rate': '16 kHz'}, r'sample_rate="16 kHz": must be a whole number'),
    ({'text_encoder': []}, r'text_encoder=\[\]: must be an object'),
    ({'text_encoder__pooling': None}, r'text_encoder.pooling=null: must be one of mean, cls, eos'),
    ({'classes': 'dog'}, r'classes="dog": must be a list'),
    ({'classes': ['dog']}, r'missing \(4\): head/kernel'),
    ({'step': True}, r'step=true: must be a whole number')])
def test_a_config_json_that_cannot_be_is_one_line_at_once(folder, change, message):
  path = folder / 'portable' / 'config.json'
  content = path.read_text()
  try:
    changed(path, content, **change)
    start = time.monotonic()
    with pytest.raises(UserError, match=message) as error:
      weights.read(path.parent)
    assert time.monotonic() - start < 30 and '\n' not in str(error.value)
  finally:
    path.write_text(content)


@pytest.mark.parametrize('name,change,message', [
    ('prepare.json', {'std': 0}, r'std=0: must be a number from 0.001'),
    ('prepare.json', {'mean': math.nan}, r'mean=NaN: must be a number'),
    ('prepare.json', {'logmel__n_mels': '80'}, r'logmel.n_mels="80": must be a whole number'),
    ('prepare.json', {'splits__train__shards': 10 ** 9}, r'splits.train.shards=1000000000: must be .* to 99999'),
    ('prepare.json', {'splits__train__clips': 7}, r'has 6 records where prepare.json says 7'),
    ('prepare.json', {'embedding_dtype': 'object'}, r'embedding_dtype="object": must be one of float16, float32'),
    ('sidecar', {'offsets': [0, 500, 400, 600, 700, 800]}, r'offsets: 6 of 6 clips .* do not follow each other'),
    ('sidecar', {'offsets': [0, 10 ** 6, 2 * 10 ** 6, 3 * 10 ** 6, 4 * 10 ** 6, 5 * 10 ** 12]}, r'do not follow each other'),
    ('sidecar', {'offsets': [0]}, r'offsets: 1 of 6 clips'),
    ('sidecar', {'bytes': -1}, r'bytes=-1: must be a whole number'),
    ('sidecar', {'rejected_files': [['a.wav', 'why']]}, r'rejected_files\[0\]=.*must be a list of 3')])
def test_a_data_folder_that_cannot_be_is_one_line(folder, name, change, message):
  path = folder / 'data' / 'prepare.json' if name == 'prepare.json' else next((folder / 'data').glob('*.tfrecord.json'))
  content = path.read_text()
  try:
    changed(path, content, **change)
    with pytest.raises(UserError, match=message) as error:
      Folder(folder / 'data').split('train')
    assert '\n' not in str(error.value)
  finally:
    path.write_text(content)


def test_a_changed_digit_is_noticed_and_a_change_on_purpose_is_possible(folder):
  path = folder / 'data' / 'prepare.json'
  content = path.read_text()
  try:
    path.write_text(json.dumps({**json.loads(content), 'mean': -7.125}))
    with pytest.raises(UserError, match='belongs to other content.*on purpose, delete the line "checksum"'):
      Folder(folder / 'data')
    changed(path, content, mean=-7.125, later_version={'knows': 'more'})
    assert Folder(folder / 'data').meta['mean'] == -7.125
  finally:
    path.write_text(content)


def test_brackets_without_end_are_one_line():
  with pytest.raises(UserError, match='a.json: not valid JSON'):
    fields.parse(b'[' * 100_000, {}, 'a.json', 'delete it')
