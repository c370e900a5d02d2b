"""Processes that read files: order, exceptions, and files that kill the process that decodes them or never end."""
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile

import m2d_clap_jax
from m2d_clap_jax.audio import decode, files, pool as pools
from m2d_clap_jax.audio.pool import Pool
from m2d_clap_jax.data import prepare, worker
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.tasks import clips
from m2d_clap_jax.tasks.metadata import open_task
from m2d_clap_jax.train import task_data
from tests.command_helpers import run, save_model
from tests.decoders import AWKWARD
from tests.prepare_helpers import corpus, noise
from tests.small_model import tiny_weights


def test_without_a_list_of_its_cores_a_process_counts_those_of_the_machine(monkeypatch):
  monkeypatch.delattr(os, 'sched_getaffinity')  # as on macOS
  with Pool(pools.STREAM) as pool:
    assert len(pool._workers) == os.cpu_count()


@pytest.fixture
def awkward(tmp_path, monkeypatch):
  """A folder of 4 good recordings, and those over which the decoder of tests/decoders.py hangs or crashes."""
  corpus(tmp_path / 'a', 4)
  for name in AWKWARD:
    soundfile.write(tmp_path / 'a' / name, noise(0.1), 16000)
  monkeypatch.setattr(pools, 'MOST_SECONDS', 3.0)
  return tmp_path / 'a'


def test_answers_keep_their_order_and_exceptions_become_reasons():
  with Pool('tests.decoders:echo', 3) as pool:
    answers = list(pool.map((str(i),) for i in range(40)))
  assert answers == [(False, "KeyError: 'five'") if i % 5 == 0 else (True, str(i)) for i in range(40)]


def test_a_file_that_kills_its_decoder_or_never_ends_is_rejected_and_nothing_else_is(awkward, tmp_path, monkeypatch):
  with open(awkward / 'manifest.csv', 'a') as f:
    f.writelines(f'{name},x,y\n' for name in AWKWARD)
  monkeypatch.setattr(worker, 'AUDIO', 'tests.decoders:logmel')
  meta = prepare.prepare(awkward / 'manifest.csv', awkward, tmp_path / 'out', text_encoder=None, workers=2)
  assert (meta['splits']['train']['clips'], meta['splits']['train']['rejected']) == (5, 3)
  rejected = (tmp_path / 'out/rejected.csv').read_text()
  assert 'segfault.wav,the decoding process died on it twice (SIGSEGV)' in rejected and 'exit code 3' in rejected
  assert f'loop.wav,decoding it took more than {pools.MOST_SECONDS:.0f} s' in rejected


def test_embed_leaves_out_a_file_that_kills_its_decoder_or_never_ends(awkward, tmp_path, monkeypatch):
  monkeypatch.setattr(files, 'STREAM', 'tests.decoders:stream')
  model = save_model(tmp_path / 'model')
  assert run('embed', awkward, '--model', model, '-o', tmp_path / 'x.npz') == 0
  data = np.load(tmp_path / 'x.npz')
  assert [os.path.basename(name) for name in data['files']] == [*(f'{i}.wav' for i in range(4)), 'once.wav']
  expected = m2d_clap_jax.load(model).embed(list(data['files']))
  np.testing.assert_allclose(data['embeddings'], expected, rtol=0, atol=1e-6 * np.abs(expected).max())
  rejected = (tmp_path / 'x.npz.rejected.csv').read_text()
  assert 'loop.wav,decoding it took more than' in rejected and 'segfault.wav,the decoding process died' in rejected


@pytest.mark.parametrize('kind', ['cut', 'whole', 'fine-tuning'])
def test_evaluations_and_fine_tuning_report_such_files_like_damaged_ones(kind, awkward, tmp_path, monkeypatch):
  names = [*(f'{i}.wav' for i in range(4)), *AWKWARD]
  rows = ''.join(f'{name},{"ab"[i % 2]},{("train", "test")[i // 2 % 2]}\n' for i, name in enumerate(names))
  (awkward / 'mine.csv').write_text(f'file_name,label,split\n{rows}')
  for module in (clips, task_data):
    monkeypatch.setattr(module, 'STREAM', 'tests.decoders:stream')
  if kind == 'fine-tuning':
    found, _ = task_data.open_data(tmp_path, 'mine', None, beat=lambda _: None, root=str(awkward), seconds=0.1, damaged='skip')
    used = [clip.file for clip in found.task.clips]
  else:
    task = open_task('mine', str(awkward), seconds=None if kind == 'whole' else 0.1, whole=kind == 'whole')
    _, found = clips.extract(m2d_clap_jax.load(tiny_weights()), task, tmp_path)
    used = found.files
  assert used == [*names[:4], 'once.wav'] and set(found.rejected) == {*AWKWARD} - {'once.wav'}
  assert 'decoding it took more than' in found.rejected['loop.wav']


def test_a_recording_that_is_not_wanted_to_its_end_leaves_the_next_answer_whole(awkward):
  with Pool('tests.decoders:stream', 1) as pool:
    next(pool.stream(str(awkward / '0.wav'), 16000))
    wave, _ = decode.load(str(awkward / '1.wav'), 16000, read=pool.stream)
  np.testing.assert_array_equal(wave, decode.load(str(awkward / '1.wav'), 16000)[0])


def test_processes_that_cannot_start_are_told_with_the_cause():
  with pytest.raises(UserError, match="cannot start .*No module named 'no_such_module'"):
    with Pool('no_such_module:f', 1) as pool:
      list(pool.map([('a.wav',)]))


def test_the_processes_import_neither_jax_nor_tensorflow():
  code = ('import sys; from m2d_clap_jax.audio import LogMel, worker; from m2d_clap_jax.data import worker\n'
          'import numpy, m2d_clap_jax.audio.decode; LogMel().numpy(numpy.zeros(999))\n'
          'print([name for name in ("jax", "tensorflow", "transformers", "torch") if name in sys.modules])')
  assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout == '[]\n'
