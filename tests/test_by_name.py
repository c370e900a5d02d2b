"""Released models by name, over a real server of files: fetched once, whole and checked, or one line says why not."""
import errno
import hashlib
import http.server
import io
import json
import os
import pathlib
import re
import socketserver
import stat
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest

import m2d_clap_jax
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.weights import download, read, released
from tests import released_layouts
from tests.command_helpers import run

ROOT = pathlib.Path(__file__).parent.parent
NAME = 'm2d_clap_vit_base-80x608p16x16-240128'
OTHER = 'm2d_vit_base-80x200p16x4-230529'
FINETUNED = 'm2d_clap_vit_base-80x1001p16x16-240128_AS-FT_enconly'


class Server(http.server.BaseHTTPRequestHandler):
  """Gives `files` {path: bytes}, from where a Range says. `cut`: after how many bytes each answer breaks off, one by one."""
  files, asked, cut, kind, ranges = {}, [], [], 'application/zip', True

  def log_message(self, *_):
    pass

  def do_GET(self):
    wanted = self.headers.get('Range')
    self.asked.append(wanted)
    data = self.files.get(self.path)
    if data is None:
      self.send_error(404)
      return
    start = int(re.fullmatch(r'bytes=(\d+)-', wanted)[1]) if wanted and self.ranges else 0
    if start and start >= len(data):
      self.send_response(416)
      self.send_header('Content-Range', f'bytes */{len(data)}')
      self.send_header('Content-Length', '0')
      self.end_headers()
      return
    self.send_response(206 if start else 200)
    if start:
      self.send_header('Content-Range', f'bytes {start}-{len(data) - 1}/{len(data)}')
    self.send_header('Content-Type', self.kind)
    self.send_header('Content-Length', str(len(data) - start))
    self.end_headers()
    most = self.cut.pop(0) if self.cut else len(data)
    self.wfile.write(data[start:start + most])


@pytest.fixture
def server(tmp_path, monkeypatch):
  """An empty cache, and a server in the place of the authors'."""
  Server.files, Server.asked, Server.cut, Server.kind, Server.ranges = {}, [], [], 'application/zip', True
  listener = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server)
  threading.Thread(target=listener.serve_forever, daemon=True).start()
  monkeypatch.setattr(released, 'ADDRESS', f'http://127.0.0.1:{listener.server_port}')
  monkeypatch.setattr(download, 'PAUSE', 0)
  monkeypatch.setenv('M2D_CLAP_HOME', str(tmp_path / 'cache'))
  yield Server
  listener.shutdown()
  listener.server_close()


def zipped(members) -> bytes:
  """{name: bytes} -> a zip, the same each time: without the time of day."""
  with zipfile.ZipFile(buffer := io.BytesIO(), 'w') as archive:
    for name, content in members.items():
      archive.writestr(name if isinstance(name, zipfile.ZipInfo) else zipfile.ZipInfo(name), content)
  return buffer.getvalue()


def offer(name, data):
  Server.files[f'/{released.RELEASED[name].tag}/{name}.zip'] = data
  return data


def noise(size=3 << 20):
  return np.random.default_rng(0).bytes(size)


def offer_noise(name=NAME):
  """A zip of the right form, whose checkpoint is none: enough for what only fetches."""
  return offer(name, zipped({f'{name}/': b'', f'{name}/checkpoint-300.pth': noise(), f'{name}/README.txt': b'hello'}))


def left(tmp_path):
  """What is in the cache but locks."""
  return sorted(path.name for path in (tmp_path / 'cache').iterdir() if not path.name.endswith('.lock'))


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
  with pytest.raises(UserError, match=r'cannot be fetched: .* 1048576 bytes that have come are kept; the same command'):
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
  with pytest.raises(UserError, match='begins anew'):
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


def archive_with(member, **changes):
  """A good zip with one more member."""
  info = zipfile.ZipInfo(member)
  for key, value in changes.items():
    setattr(info, key, value)
  return zipped({f'{NAME}/checkpoint-300.pth': noise(1000), info: b'/etc/passwd'})


def bomb():
  with zipfile.ZipFile(buffer := io.BytesIO(), 'w', zipfile.ZIP_DEFLATED) as archive:
    with archive.open(f'{NAME}/checkpoint-300.pth', 'w') as member:
      for _ in range(320):
        member.write(bytes(1 << 20))
  return buffer.getvalue()


WRONG = {
    'a web page': (b'<!DOCTYPE html><html>Sign in</html>', 'no readable zip'),
    'nothing': (b'', 'no readable zip'),
    'no checkpoint': (zipped({f'{NAME}/README.txt': b'hello'}), f'holds no checkpoint (.pth) but {NAME}/README.txt'),
    'another model': (zipped({f'{OTHER}/checkpoint-300.pth': noise(1000)}), f'holds the model {OTHER} instead'),
    'of other patches': (zipped({'mine-80x608p80x2/a.pth': noise(1000)}), 'holds the model mine-80x608p80x2 instead'),
    'two': (zipped({f'{NAME}/a.pth': b'a', f'{NAME}/b.pth': b'b'}), 'holds 2 checkpoints'),
    'leads up': (archive_with('../../evil.pth'), "'../../evil.pth' is a link or leads out"),
    'from the root': (archive_with('/tmp/evil.pth'), "'/tmp/evil.pth' is a link or leads out"),
    'leads up, other slashes': (archive_with(f'{NAME}\\..\\..\\evil'), 'is a link or leads out'),
    'a link': (archive_with(f'{NAME}/link', external_attr=(stat.S_IFLNK | 0o777) << 16), 'is a link or leads out'),
    'a bomb': (bomb(), 'not unpacked: would take 0.3 GB'),
    'damaged inside': (zipped({f'{NAME}/checkpoint-300.pth': b'x' * 1000}).replace(b'x' * 9, b'y' * 9, 1), 'no readable zip'),
}


@pytest.mark.parametrize('data, told', WRONG.values(), ids=WRONG)
def test_a_wrong_zip_is_told_in_one_line_and_never_taken(data, told, server, tmp_path):
  offer(NAME, data)
  with pytest.raises(UserError) as failure:
    released.fetch(NAME)
  assert told in str(failure.value) and '\n' not in str(failure.value)
  if 'checkpoints' not in told:
    assert left(tmp_path) == []
    offer_noise()
    assert released.fetch(NAME).read_bytes() == noise()
  assert not list(tmp_path.rglob('evil*'))


def test_of_300_damaged_zips_each_is_refused_in_one_line_or_whole(tmp_path):
  rng = np.random.default_rng(0)
  with zipfile.ZipFile(buffer := io.BytesIO(), 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr(f'{NAME}/checkpoint-300.pth', b'weights' * 99)
    archive.writestr(f'{NAME}/README.txt', b'hello' * 9)
  good, refused = buffer.getvalue(), 0
  for i in range(300):
    bad = bytearray(good)
    for place in rng.integers(len(good), size=1 + i % 4):
      bad[place] = rng.integers(256)
    archive, folder = tmp_path / f'{i}.zip', tmp_path / str(i)
    archive.write_bytes(bad[:rng.integers(len(bad))] if i % 10 == 0 else bad)
    try:
      download.unpack(archive, folder, lambda _: True)
      assert next(folder.glob('*.pth')).read_bytes() == b'weights' * 99
    except UserError as error:
      refused += 1
      assert '\n' not in str(error) and not folder.exists()
  assert 100 < refused < 300


def test_an_answer_that_is_a_page_leaves_the_part_as_it_is(server, tmp_path):
  data = offer_noise()
  server.cut = [1 << 20, 0]
  with pytest.raises(UserError):
    released.fetch(NAME)
  server.kind = 'text/html; charset=utf-8'
  with pytest.raises(UserError, match='the answer is a web page'):
    released.fetch(NAME)
  assert (tmp_path / 'cache' / f'{NAME}.zip.part').read_bytes() == data[:1 << 20]


def test_a_checkpoint_that_has_changed_is_not_taken(server, tmp_path):
  offer_noise()
  checkpoint = released.fetch(NAME)
  os.utime(checkpoint, (1, 1))
  assert released.fetch(NAME) == checkpoint  # the same bytes
  content = bytearray(checkpoint.read_bytes())
  content[1000] ^= 1
  checkpoint.write_bytes(content)
  with pytest.raises(UserError, match=f'checkpoint-300.pth: is not what was fetched at first: its SHA-256 is .*{NAME}.json'):
    read(NAME)


def test_a_zip_that_differs_from_the_first_is_not_taken(server, tmp_path):
  offer_noise()
  checkpoint = released.fetch(NAME)
  checkpoint.unlink()
  checkpoint.with_name('README.txt').unlink()
  checkpoint.parent.rmdir()
  offer(NAME, zipped({f'{NAME}/checkpoint-300.pth': b'something else'}))
  with pytest.raises(UserError, match='zip: is not what was fetched at first'):
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
  with pytest.raises(UserError, match='cannot be fetched: HTTP 404 Not Found'):
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
