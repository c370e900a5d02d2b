"""Released models by name, over a real server of files: fetched once, whole and checked, or one line says why not."""
import errno
import hashlib
import json
import os
import pathlib
import socketserver
import subprocess
import sys
import threading

import numpy as np
import pytest

import m2d_clap_jax
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.weights import download, read, released
from tests import released_layouts
from tests.command_helpers import run
from tests.release_server import NAME, OTHER, left, noise, offer, offer_noise, serving, zipped

ROOT = pathlib.Path(__file__).parent.parent
FINETUNED = 'm2d_clap_vit_base-80x1001p16x16-240128_AS-FT_enconly'


@pytest.fixture
def server(tmp_path, monkeypatch):
  with serving(tmp_path, monkeypatch) as running:
    yield running


@pytest.mark.parametrize('name', [NAME, OTHER, FINETUNED])
def test_a_model_is_fetched_once_and_used_without_the_network(name, server, tmp_path, capsys):
  file = released_layouts.write(name, tmp_path, depth=1)
  about = released_layouts.RELEASED[name]
  offer(name, zipped({f'{name}/{file.name}': file.read_bytes()}))
  model = m2d_clap_jax.load(name)
  notice = capsys.readouterr().err
  assert 'for evaluation only (LICENSE in https://github.com/nttcslab/m2d)' in notice
  server.files.clear()
  again = m2d_clap_jax.load(name)
  assert len(server.asked) == 1 and 'evaluation' not in capsys.readouterr().err
  assert left(tmp_path) == [name, f'{name}.json']  # the zip is as large again
  assert again.fingerprint == model.fingerprint == m2d_clap_jax.load(file).fingerprint
  assert (model.sample_rate, model.network.input_size) == (about.sample_rate, about.input_size)
  waves = np.random.default_rng(0).standard_normal(model.sample_rate // 2, np.float32)
  assert np.isfinite(again.embed(waves)).all()
  if about.classes:
    assert again.logits(waves, frames=True)[0].shape == (1, 4, about.classes)


def test_the_table_agrees_with_the_layouts():
  assert released.RELEASED.keys() == released_layouts.RELEASED.keys()
  for name, about in released_layouts.RELEASED.items():
    own = released.RELEASED[name]
    assert (own.frames, own.sample_rate, bool(own.text)) == (about.frames, about.sample_rate, bool(about.text)), name
    assert bool(own.gigabytes) == about.complete and own.about.endswith('complete') == about.complete, name
  assert released.url(OTHER) == f'https://github.com/nttcslab/m2d/releases/download/v0.1.0/{OTHER}.zip'


def test_models_are_listed_with_what_is_cached(server, tmp_path, capsys):
  offer_noise()
  released.fetch(NAME)
  assert run('models') == 0
  out = capsys.readouterr().out
  lines = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith('m2d')}
  assert lines.keys() == released.RELEASED.keys()
  assert lines[NAME][-1] == 'yes' and all(words[-1] == '-' for name, words in lines.items() if name != NAME)
  assert str(tmp_path / 'cache') in out and 'for evaluation only' in out
  assert run('models', '--json') == 0
  facts = {each['name']: each for each in json.loads(capsys.readouterr().out)}
  assert facts[NAME]['cached'].endswith('checkpoint-300.pth') and facts[OTHER]['cached'] is None
  assert facts[OTHER] | {'url': ''} == {'name': OTHER, 'what': 'M2D, patches of 40 ms, complete', 'sample_rate': 16000,
                                        'seconds': 2.0, 'text_encoder': None, 'size_gb': 1.4, 'cached': None, 'url': ''}


def test_a_folder_that_is_here_is_taken_before_the_network(server, tmp_path, monkeypatch):
  released_layouts.write(OTHER, tmp_path, depth=1)
  monkeypatch.chdir(tmp_path)
  assert read(OTHER).source.startswith(OTHER) and not server.asked


@pytest.mark.parametrize('cuts', [[1 << 20], [1 << 20, 1 << 19, 1 << 19]], ids=['once', 'thrice'])
def test_a_connection_that_breaks_off_is_continued_where_it_was(server, cuts):
  data = offer_noise()
  server.cut = list(cuts)
  checkpoint = released.fetch(NAME)
  places = [sum(cuts[:i + 1]) for i in range(len(cuts))]
  assert server.asked == [None, *(f'bytes={place}-' for place in places)] and len(data) > places[-1]
  assert checkpoint.read_bytes() == noise()


def test_a_download_that_ended_is_continued_by_the_next_call(server, tmp_path):
  data = offer_noise()
  server.cut = [1 << 20, 0]  # the second answer brings nothing
  with pytest.raises(UserError, match=r'cannot be downloaded: .* 1048576 bytes downloaded are kept; the same command'):
    released.fetch(NAME)
  assert left(tmp_path) == [f'{NAME}.zip.part']
  assert released.fetch(NAME).read_bytes() == noise() and server.asked[-1] == f'bytes={1 << 20}-'
  assert json.loads((tmp_path / 'cache' / f'{NAME}.json').read_text())['zip_sha256'] == hashlib.sha256(data).hexdigest()


def test_a_part_that_is_whole_or_of_another_file_or_cannot_be_continued_is_no_trap(server, tmp_path):
  data = offer_noise()
  part = tmp_path / 'cache' / f'{NAME}.zip.part'
  part.parent.mkdir()
  part.write_bytes(data)  # killed just before it got its name
  assert released.fetch(NAME).read_bytes() == noise()
  other = offer_noise(OTHER)
  part = part.with_name(f'{OTHER}.zip.part')
  part.write_bytes(other + b'more')
  with pytest.raises(UserError, match='starts over'):
    released.fetch(OTHER)
  part.write_bytes(b'no beginning of this file')
  server.ranges = False
  assert released.fetch(OTHER).read_bytes() == noise()


FETCH = '''
import sys
from m2d_clap_jax.weights import released
released.ADDRESS = sys.argv[1]
print(released.fetch(sys.argv[2]))
'''


def fetching():
  return subprocess.Popen([sys.executable, '-c', FETCH, released.ADDRESS, NAME], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)


class Gate:
  """Data that the server gives half of, then waits with the rest."""

  def __init__(self, data):
    self.data, self.reached, self.open = data, threading.Event(), threading.Event()

  def __len__(self):
    return len(self.data)

  def __getitem__(self, part):
    self.reached.set()
    self.open.wait(60)
    return self.data[part]


def test_of_two_processes_at_once_one_fetches_and_the_other_waits(server):
  gate = offer(NAME, Gate(offer_noise()))
  first = fetching()
  assert gate.reached.wait(60)
  second = fetching()
  assert 'another process is fetching it; waiting' in second.stderr.readline()
  gate.open.set()
  (out, _), (same, _) = first.communicate(timeout=60), second.communicate(timeout=60)
  assert out == same and pathlib.Path(out.strip()).read_bytes() == noise() and server.asked == [None]


def test_a_process_that_is_killed_holds_nobody_up(server):
  gate = offer(NAME, Gate(offer_noise()))
  first = fetching()
  assert gate.reached.wait(60)
  first.kill()
  first.communicate()
  gate.open.set()
  assert released.fetch(NAME).read_bytes() == noise()


def test_an_answer_that_is_a_page_leaves_the_part_as_it_is(server, tmp_path):
  data = offer_noise()
  server.cut = [1 << 20, 0]
  with pytest.raises(UserError):
    released.fetch(NAME)
  server.kind = 'text/html; charset=utf-8'
  with pytest.raises(UserError, match='the answer is a web page'):
    released.fetch(NAME)
  assert (tmp_path / 'cache' / f'{NAME}.zip.part').read_bytes() == data[:1 << 20]


def test_a_checkpoint_that_has_changed_is_not_taken(server):
  offer_noise()
  checkpoint = released.fetch(NAME)
  os.utime(checkpoint, (1, 1))
  assert released.fetch(NAME) == checkpoint  # the same bytes
  content = bytearray(checkpoint.read_bytes())
  content[1000] ^= 1
  checkpoint.write_bytes(content)
  with pytest.raises(UserError, match=f'checkpoint-300.pth: has changed since the first download: its SHA-256 is .*{NAME}.json'):
    read(NAME)


def test_a_zip_that_differs_from_the_first_is_not_taken(server, tmp_path):
  offer_noise()
  checkpoint = released.fetch(NAME)
  checkpoint.unlink()
  checkpoint.with_name('README.txt').unlink()
  checkpoint.parent.rmdir()
  offer(NAME, zipped({f'{NAME}/checkpoint-300.pth': b'something else'}))
  with pytest.raises(UserError, match='zip: has changed since the first download'):
    released.fetch(NAME)
  assert left(tmp_path) == [f'{NAME}.json']
  offer_noise()
  assert released.fetch(NAME).read_bytes() == noise()


def test_without_a_network_one_line_gives_the_address_and_the_place_and_that_place_works(tmp_path, monkeypatch):
  with socketserver.TCPServer(('127.0.0.1', 0), None) as nobody:
    port = nobody.server_address[1]
  monkeypatch.setattr(released, 'ADDRESS', f'http://127.0.0.1:{port}')
  monkeypatch.setenv('M2D_CLAP_HOME', str(tmp_path / 'cache'))
  for name in (NAME, OTHER):
    with pytest.raises(UserError) as failure:
      read(name)
    told = str(failure.value)
    assert released.url(name) in told and told.endswith(f'into {tmp_path}/cache') and '\n' not in told
  zip_by_hand = tmp_path / 'cache' / f'{NAME}.zip'
  zip_by_hand.write_bytes(zipped({f'{NAME}/checkpoint-300.pth': noise(1000)}))
  assert released.fetch(NAME).read_bytes() == noise(1000)
  released_layouts.write(OTHER, tmp_path / 'cache', depth=1)
  assert read(OTHER).model['patch_size'] == (16, 4) and released.fetch(OTHER).parent.name == OTHER


def test_without_pytorch_nothing_is_fetched(server, monkeypatch):
  offer_noise()
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(UserError, match=f'{NAME}: is a .pth file, which PyTorch reads: pip install'):
    released.fetch(NAME)
  assert not server.asked


def test_a_name_that_the_server_lacks_is_told(server):
  with pytest.raises(UserError, match='cannot be downloaded: HTTP 404 Not Found'):
    released.fetch(NAME)


@pytest.mark.parametrize('when', ['fetched', 'unpacked'])
def test_a_full_disk_is_one_line_and_the_same_command_continues(when, server, tmp_path, monkeypatch):
  offer_noise()

  class Full:
    """A file on a disk with a megabyte left."""

    def __init__(self, file):
      self.file, self.left = file, 1 << 20

    def write(self, block):
      if len(block) > self.left:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
      self.left -= len(block)
      return self.file.write(block)

    def __enter__(self):
      return self

    def __exit__(self, *_):
      self.file.close()

    def __getattr__(self, name):
      return getattr(self.file, name)

  def full_open(path, mode='r', **options):
    file = open(path, mode, **options)
    here = str(path).endswith('.part') if when == 'fetched' else '.unpacking' in str(path)
    return Full(file) if here and 'r' not in mode else file
  with monkeypatch.context() as patch:
    patch.setattr(download, 'open', full_open, raising=False)
    with pytest.raises(UserError, match='cannot be read or written .No space left on device.: free space, .*M2D_CLAP_HOME'):
      released.fetch(NAME)
  assert left(tmp_path) == [f'{NAME}.zip.part' if when == 'fetched' else f'{NAME}.zip']
  assert released.fetch(NAME).read_bytes() == noise()
  assert len(server.asked) == (2 if when == 'fetched' else 1)


def test_the_cache_is_the_users_unless_moved_and_cannot_be_a_store(monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.delenv('M2D_CLAP_HOME', raising=False)
  assert released.home() == tmp_path / 'm2d_clap_jax'
  monkeypatch.setenv('M2D_CLAP_HOME', 'gs://bucket/cache')
  with pytest.raises(UserError, match='M2D_CLAP_HOME=gs://bucket/cache: the cache must be on a disk'):
    released.home()
  (tmp_path / 'file').touch()
  monkeypatch.setenv('M2D_CLAP_HOME', str(tmp_path / 'file'))
  with pytest.raises(UserError, match='cannot be read or written'):
    released.fetch(NAME)
