"""Worker processes: order, exceptions, and files that kill the process that decodes them."""
import os
import subprocess
import sys
import time

import pytest
import soundfile

from m2d_clap_jax.data import decoding, prepare, worker
from m2d_clap_jax.data.decoding import Pool
from m2d_clap_jax.errors import UserError
from tests.prepare_helpers import corpus, noise


def decode(path, *arguments):
  """A decoder that crashes over some files: always, or the first time only (memory was short)."""
  name = os.path.basename(path)
  if name == 'segfault.wav':
    os.kill(os.getpid(), 11)
  if name == 'once.wav' and not os.path.exists(f'{path}.tried'):
    open(f'{path}.tried', 'w').close()
    os.kill(os.getpid(), 9)
  if name == 'exit.wav':
    os._exit(3)
  while name == 'loop.wav':
    pass
  return worker.from_audio(path, *arguments)


def echo(value):
  """Late answers for early questions."""
  time.sleep(0.02 if value % 3 == 0 else 0)
  print('noise on stdout')
  if value % 5 == 0:
    raise KeyError('five')
  return value


def test_answers_keep_their_order_and_exceptions_become_reasons():
  with Pool('tests.test_decoding:echo', 3) as pool:
    answers = list(pool.map((i,) for i in range(40)))
  assert answers == [(False, "KeyError: 'five'") if i % 5 == 0 else (True, i) for i in range(40)]


def test_a_file_that_kills_its_decoder_or_never_ends_is_rejected_and_nothing_else_is(tmp_path, monkeypatch):
  manifest = corpus(tmp_path / 'a', 10)
  for name in ('segfault', 'once', 'exit', 'loop'):
    soundfile.write(tmp_path / f'a/{name}.wav', noise(0.1), 16000)
    with open(manifest, 'a') as f:
      f.write(f'{name}.wav,x,y\n')
  monkeypatch.setattr(worker, 'AUDIO', 'tests.test_decoding:decode')
  monkeypatch.setattr(decoding, 'MOST_SECONDS', 10.0)
  meta = prepare.prepare(manifest, tmp_path / 'a', tmp_path / 'out', text_encoder=None, workers=2)
  assert (meta['splits']['train']['clips'], meta['splits']['train']['rejected']) == (11, 3)
  rejected = (tmp_path / 'out/rejected.csv').read_text()
  assert 'segfault.wav,the decoding process died on it twice (SIGSEGV)' in rejected and 'exit code 3' in rejected
  assert 'loop.wav,decoding it took more than 10 s' in rejected


def test_workers_that_cannot_start_are_told_with_the_cause():
  with pytest.raises(UserError, match="cannot start .*No module named 'no_such_module'"):
    with Pool('no_such_module:f', 1) as pool:
      list(pool.map([(1,)]))


def test_workers_import_neither_jax_nor_tensorflow():
  code = ('import sys; from m2d_clap_jax.data import worker; from m2d_clap_jax.audio import LogMel\n'
          'import numpy, m2d_clap_jax.audio.decode; LogMel().numpy(numpy.zeros(999))\n'
          'print([name for name in ("jax", "tensorflow", "transformers", "torch") if name in sys.modules])')
  assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout == '[]\n'
