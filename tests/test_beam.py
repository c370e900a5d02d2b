"""Preparation as a Beam pipeline writes the files of the plain command, byte for byte."""
import json
import sys
import types
from unittest import mock

import numpy as np
import pytest

import m2d_clap_jax.data
from m2d_clap_jax import paths
from m2d_clap_jax.data import beam, embeddings, prepare, write
from m2d_clap_jax.data.manifest import Row
from m2d_clap_jax.errors import UserError
from tests.command_helpers import run
from tests.prepare_helpers import FakeEncoder, contents, corpus, write_manifest


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
  (tmp_path / 'beam' / '.train-00000-of-00005.tfrecord.other-1.tmp').write_bytes(b'a worker was killed')
  meta = prepare.prepare(manifest, tmp_path / 'audio', tmp_path / 'beam', beam='', **options)
  assert meta == plain and plain['splits']['train']['rejected'] == 1
  files = visible(tmp_path / 'plain')
  assert sum(name.endswith('.tfrecord') for name in files) == 5 and 'rejected.csv' in files
  assert files == visible(tmp_path / 'tasks') == visible(tmp_path / 'beam')
  assert {path.name for path in (tmp_path / 'beam').glob('.*')} == {'.lock'}


def test_the_authors_folders_too(tmp_path):
  (tmp_path / 'logmels').mkdir()
  draw = np.random.default_rng(0)
  for i in range(4):
    np.save(tmp_path / 'logmels' / f'Y{i}.npy', draw.standard_normal((80, 20)).astype(np.float32))
  np.save(tmp_path / 'capemb.npy', {str(i): draw.standard_normal((2, 8)).astype(np.float32) for i in range(4)})
  for name, options in (('plain', {'workers': 1}), ('beam', {'beam': ''})):
    prepare.prepare_logmels(tmp_path / 'logmels', [str(tmp_path / 'capemb.npy')], tmp_path / name, num_shards=2,
                            **options)
  assert visible(tmp_path / 'plain') == visible(tmp_path / 'beam')


def test_the_pipeline_holds_neither_captions_nor_embeddings(tmp_path, monkeypatch):
  graphs = []
  finish = beam.beam.Pipeline.run
  monkeypatch.setattr(beam.beam.Pipeline, 'run', lambda pipeline, *args, **kwargs: (
      graphs.append(pipeline.to_runner_api().SerializeToString()), finish(pipeline, *args, **kwargs))[1])
  corpus(tmp_path / 'audio', 4)
  draw = np.random.default_rng(0)  # 100 kB of each caption are left when Beam has compressed it
  manifest = write_manifest(tmp_path / 'm.csv', [(f'{i}.wav', draw.bytes(100_000).hex()) for i in range(4)],
                            ('file_name', 'caption'))
  prepare.prepare(manifest, tmp_path / 'audio', tmp_path / 'out', num_shards=2, text_encoder=FakeEncoder(), beam='')
  assert len(graphs) == 2 and max(map(len, graphs)) < 100_000


def test_shards_share_the_blocks_of_caption_embeddings(tmp_path, monkeypatch):
  monkeypatch.setattr(embeddings, 'BLOCK', 2)
  opened = []
  remote = {'is_remote': lambda path: True, 'local_copy': lambda path: (opened.append(path), paths.local_copy(path))[1]}
  monkeypatch.setattr(embeddings, 'paths', types.SimpleNamespace(**{**vars(paths), **remote}))
  manifest = corpus(tmp_path / 'audio', 6)  # 11 captions
  prepare.prepare(manifest, tmp_path / 'audio', tmp_path / 'out', num_shards=6, text_encoder=FakeEncoder(), beam='')
  assert len(opened) == len(set(opened)) == 6


def test_two_workers_at_one_shard_do_not_harm_each_other(tmp_path):
  (job,) = write.plan([Row('a.wav', captions=['a'])], {}, 1)
  numbers = {'seconds': 0.05, 'sum': 400.0, 'sumsq': 400.0}
  answer = True, {'logmel': np.ones((80, 5), np.float16), 'truncated': False, **numbers}
  written = tmp_path / f'{job.name}.tfrecord'

  def slow():  # the other begins, and ends, while this one has its file open
    with mock.patch('os.getpid', lambda: 1):
      write.write_shard(str(tmp_path), job, iter([answer]), None, lambda: None, alone=False)
    done.append(written.read_bytes())
    yield answer

  done = []
  write.write_shard(str(tmp_path), job, slow(), None, lambda: done.append(written.read_bytes()), alone=False)
  assert len(done) == 2 and done[0] == done[1] == written.read_bytes()


class Broken(FakeEncoder):
  def __call__(self, texts):
    return np.full((len(texts), self.width), np.inf, np.float32)


def test_what_ends_a_pipeline_is_told_in_one_line(tmp_path):
  manifest = corpus(tmp_path / 'audio', 2)
  with pytest.raises(UserError, match=r'pipeline ended: the embedding of caption .* is not finite.*the same command'):
    prepare.prepare(manifest, tmp_path / 'audio', tmp_path / 'out', text_encoder=Broken(), beam='')
  with pytest.raises(UserError, match='leave out --workers and --task'):
    prepare.prepare(manifest, tmp_path / 'audio', tmp_path / 'out', text_encoder=None, beam='', workers=2)


def test_without_beam_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
  monkeypatch.delattr(m2d_clap_jax.data, 'beam')
  monkeypatch.delitem(sys.modules, 'm2d_clap_jax.data.beam')
  monkeypatch.setitem(sys.modules, 'apache_beam', None)
  manifest = corpus(tmp_path / 'audio', 2)
  assert run('prepare', f'--manifest={manifest}', '--text_encoder=none', f'--out={tmp_path / "out"}', '--beam') == 2
  error = capsys.readouterr().err
  assert "pip install 'm2d-clap-jax[beam]'" in error and error.count('\n') == 1


def test_the_command_passes_options_to_beam_and_tells_wrong_ones(tmp_path, capsys):
  manifest = corpus(tmp_path / 'audio', 2)
  command = ['prepare', f'--manifest={manifest}', '--text_encoder=none', f'--out={tmp_path / "out"}']
  assert run(*command, '--beam=--runner=NoSuchRunner') == 2
  assert 'NoSuchRunner' in capsys.readouterr().err
  assert run(*command, '--beam=--runnner=DataflowRunner') == 2
  assert '--runnner' in capsys.readouterr().err
  assert run(*command, '--beam=--direct_num_workers=1') == 0
  assert json.loads((tmp_path / 'out' / 'prepare.json').read_text())['splits']['train']['clips'] == 2
