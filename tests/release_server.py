"""A server in the place of the authors' releases, and zips that it gives."""
import contextlib
import http.server
import io
import re
import threading
import zipfile

import numpy as np

from m2d_clap_jax.weights import download, released

NAME = 'm2d_clap_vit_base-80x608p16x16-240128'
OTHER = 'm2d_vit_base-80x200p16x4-230529'


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


@contextlib.contextmanager
def serving(tmp_path, monkeypatch):
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
