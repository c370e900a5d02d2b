"""Preparation as a Beam pipeline writes the files of the plain command, byte for byte."""
import json

import numpy as np
import pytest

from m2d_clap_jax.data import prepare
from m2d_clap_jax.errors import UserError
from tests.command_helpers import run
from tests.prepare_helpers import FakeEncoder, contents, corpus

pytest.importorskip('apache_beam')


def visible(folder):
  return {name: data for name, data in contents(folder).items() if not name.startswith('.')}


def test_beam_array_tasks_and_the_plain_run_write_the_same_files(tmp_path):
  manifest = corpus(tmp_path / 'audio', 12, seconds=0.2)
  (tmp_path / 'audio' / '7.wav').write_bytes(b'no audio at all')
  options = dict(num_shards=5, text_encoder=FakeEncoder())
  plain = prepare.prepare(manifest, tmp_path / 'audio', tmp_path / 'plain', workers=1, **options)
  for i in (2, 0, 1):
    prepare.prepare(manifest, tmp_path / 'audio', tmp_path / 'tasks', workers=1, task=(i, 3), **options)
  (tmp_path / 'beam').mkdir()
  done = 'train-00001-of-00005.tfrecord'  # of a run before
  for name in (done, f'{done}.json'):
    (tmp_path / 'beam' / name).write_bytes((tmp_path / 'plain' / name).read_bytes())
  meta = prepare.prepare(manifest, tmp_path / 'audio', tmp_path / 'beam', beam='', **options)
  assert meta == plain and plain['splits']['train']['rejected'] == 1
  files = visible(tmp_path / 'plain')
  assert sum(name.endswith('.tfrecord') for name in files) == 5 and 'rejected.csv' in files
  assert files == visible(tmp_path / 'tasks') == visible(tmp_path / 'beam')
  assert not list((tmp_path / 'beam').glob('.captions-*'))


def test_the_authors_folders_too(tmp_path):
  (tmp_path / 'logmels').mkdir()
  draw = np.random.default_rng(0)
  for i in range(4):
    np.save(tmp_path / 'logmels' / f'Y{i}.npy', draw.standard_normal((80, 20)).astype(np.float32))
  np.save(tmp_path / 'capemb.npy', {str(i): draw.standard_normal((2, 8)).astype(np.float32) for i in range(4)})
  for name, options in (('plain', {'workers': 1}), ('beam', {'beam': ''})):
    prepare.prepare_logmels(tmp_path / 'logmels', [str(tmp_path / 'capemb.npy')], tmp_path / name, num_shards=2, **options)
  assert visible(tmp_path / 'plain') == visible(tmp_path / 'beam')


class Broken(FakeEncoder):
  def __call__(self, texts):
    return np.full((len(texts), self.width), np.inf, np.float32)


def test_what_ends_a_pipeline_is_told_in_one_line(tmp_path):
  manifest = corpus(tmp_path / 'audio', 2)
  with pytest.raises(UserError, match=r'pipeline ended: the embedding of caption .* is not finite.*the same command'):
    prepare.prepare(manifest, tmp_path / 'audio', tmp_path / 'out', text_encoder=Broken(), beam='')
  with pytest.raises(UserError, match='leave out --workers and --task'):
    prepare.prepare(manifest, tmp_path / 'audio', tmp_path / 'out', text_encoder=None, beam='', workers=2)


def test_the_command_passes_options_to_beam_and_tells_wrong_ones(tmp_path, capsys):
  command = ['prepare', f'--manifest={corpus(tmp_path / "audio", 2)}', '--text_encoder=none', f'--out={tmp_path / "out"}']
  assert run(*command, '--beam=--runner=NoSuchRunner') == 2
  assert 'NoSuchRunner' in capsys.readouterr().err
  assert run(*command, '--beam=--direct_num_workers=1') == 0
  assert json.loads((tmp_path / 'out' / 'prepare.json').read_text())['splits']['train']['clips'] == 2
