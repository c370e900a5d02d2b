"""Models go to the Hub and come back, through huggingface_hub itself and a stand-in of the Hub's server."""
import base64
import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from m2d_clap_jax.errors import UserError
from m2d_clap_jax.models import M2DCLAP
from m2d_clap_jax.weights import Weights, expected_shapes, hub, read
from m2d_clap_jax.weights.portable import save_portable

ROOT = pathlib.Path(__file__).parent.parent
TOKEN = 'hf_of_the_owner'


class Server(http.server.BaseHTTPRequestHandler):
  """As much of the Hub as creating a model, one commit to it, and fetching its files take. `files`: {model: {name: bytes}}."""
  files, private, gated = {}, set(), set()  # gated: known to all, read by those only who were let in

  def log_message(self, *_):
    pass

  def answer(self, code, body=b'', **headers):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    self.send_response(code)
    for name, value in {'Content-Length': str(len(body)), **headers}.items():
      self.send_header(name.replace('_', '-'), value)
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(body)

  def may(self, model):
    return model not in self.private or self.headers.get('Authorization') == f'Bearer {TOKEN}'

  def do_POST(self):
    text = self.rfile.read(int(self.headers.get('Content-Length', 0)))
    if self.headers.get('Authorization') != f'Bearer {TOKEN}':
      return self.answer(401, {'error': 'Invalid credentials'})
    if self.path == '/api/repos/create':
      about = json.loads(text)
      model = f'{about["organization"]}/{about["name"]}'
      self.files.setdefault(model, {})
      if about.get('private'):
        self.private.add(model)
      return self.answer(200, {'url': f'http://{self.headers["Host"]}/{model}'})
    if self.path == '/api/validate-yaml':
      return self.answer(200, {'errors': [], 'warnings': []})
    model = '/'.join(self.path.split('/')[3:5])
    if '/preupload/' in self.path:
      return self.answer(200, {'files': [{'path': file['path'], 'uploadMode': 'regular', 'shouldIgnore': False}
                                         for file in json.loads(text)['files']]})
    for line in map(json.loads, text.splitlines()):
      if line['key'] == 'file':
        self.files[model][line['value']['path']] = base64.b64decode(line['value']['content'])
    return self.answer(200, {'success': True, 'commitOid': self.revision(model), 'commitUrl': f'http://{self.headers["Host"]}/{model}/commit/1'})

  def revision(self, model):
    return hashlib.sha1(repr(sorted((name, hash(data)) for name, data in self.files[model].items())).encode()).hexdigest()

  def do_GET(self):
    words = self.path.strip('/').split('/')
    model = '/'.join(words[2:4] if words[0] == 'api' else words[:2])
    if model not in self.files or not self.may(model):
      return self.answer(401, {'error': 'Repository not found'}, X_Error_Code='RepoNotFound')
    if words[0] == 'api':
      if len(words) > 5 and words[5] != 'main':
        return self.answer(404, {'error': 'Invalid rev id'}, X_Error_Code='RevisionNotFound')
      return self.answer(200, {'id': model, 'sha': self.revision(model), 'private': model in self.private,
                               'siblings': [{'rfilename': name} for name in self.files[model]]})
    if model in self.gated and self.headers.get('Authorization') != f'Bearer {TOKEN}':
      return self.answer(403, {'error': 'Access to this model is restricted'}, X_Error_Code='GatedRepo')
    data = self.files[model]['/'.join(words[4:])]
    return self.answer(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=self.revision(model))

  do_HEAD = do_GET


@pytest.fixture
def server():
  Server.files, Server.private, Server.gated = {}, set(), set()
  listener = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server)
  threading.Thread(target=listener.serve_forever, daemon=True).start()
  yield f'http://127.0.0.1:{listener.server_port}'
  listener.shutdown()
  listener.server_close()


@pytest.fixture
def portable(tmp_path):
  model = dict(width=32, depth=1, heads=2, predictor_width=16, predictor_depth=1, predictor_heads=2, input_size=(80, 48),
               text_width=16)
  draw = np.random.default_rng(0)
  trees = jax.tree.map(lambda shape: draw.standard_normal(shape).astype(np.float32), expected_shapes(M2DCLAP(**model)),
                       is_leaf=lambda x: isinstance(x, tuple))
  folder = save_portable(Weights(model=model, trees=trees, source='here'), tmp_path / 'portable')
  (folder / 'text_encoder').mkdir()  # as models with their own text encoder have it
  (folder / 'text_encoder' / 'vocab.txt').write_text('a\nb\n')
  return folder


def command(*words, endpoint, home, token='', offline=False):
  """m2d-clap in a process of its own: huggingface_hub reads its settings when it is imported."""
  env = {**os.environ, 'HF_ENDPOINT': endpoint, 'HF_HOME': str(home), 'HF_HUB_OFFLINE': str(int(offline)),
         'HF_HUB_DISABLE_XET': '1', 'HF_TOKEN': token, 'HF_HUB_DISABLE_TELEMETRY': '1'}
  return subprocess.run([sys.executable, '-m', 'm2d_clap_jax.cli', *words], env=env, cwd=ROOT, capture_output=True,
                        text=True)


def contents(folder):
  folder = pathlib.Path(folder)
  return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_a_model_goes_to_the_hub_and_comes_back_and_stays_in_the_cache(server, portable, tmp_path):
  settings = dict(endpoint=server, home=tmp_path / 'home')
  refused = command('push', str(portable), 'lab/model', **settings)
  assert refused.returncode == 2 and 'hf auth login' in refused.stderr and 'Traceback' not in refused.stderr
  pushed = command('push', str(portable), 'lab/model', '--private', token=TOKEN, **settings)
  assert pushed.returncode == 0, pushed.stderr
  assert Server.files['lab/model'] == contents(portable)
  stranger = command('pull', 'lab/model', **settings)
  assert stranger.returncode == 2 and 'no such model, or it is private' in stranger.stderr
  pulled = command('pull', 'hf://lab/model', token=TOKEN, **settings)
  assert pulled.returncode == 0, pulled.stderr
  place = pathlib.Path(pulled.stdout.strip())
  assert contents(place) == contents(portable)
  assert read(place).fingerprint == read(portable).fingerprint
  offline = command('info', 'hf://lab/model', offline=True, **settings)
  assert offline.returncode == 0 and read(portable).fingerprint in offline.stdout, offline.stderr


def test_a_folder_without_a_model_card_is_given_one(server, portable, tmp_path):
  card = (portable / 'README.md').read_bytes()
  (portable / 'README.md').unlink()
  pushed = command('push', str(portable), 'hf://lab/plain', token=TOKEN, endpoint=server, home=tmp_path / 'home')
  assert pushed.returncode == 0, pushed.stderr
  assert Server.files['lab/plain']['README.md'] == card == (portable / 'README.md').read_bytes()


def test_what_the_hub_lacks_is_told(server, tmp_path):
  settings = dict(endpoint=server, home=tmp_path / 'home')
  Server.files['lab/other'] = {'README.md': b'hello', 'weights.pth': b'x'}
  for name, words in {'lab/nothing': 'no such model', 'lab/other': 'contains no model of this package',
                      'lab/other@v9': "no revision 'v9'"}.items():
    result = command('pull', name, **settings)
    assert result.returncode == 2 and words in result.stderr and 'Traceback' not in result.stderr, result.stderr


def test_a_model_whose_owner_wants_to_be_asked_says_where(server, portable, tmp_path):
  Server.files['lab/gated'] = contents(portable)
  Server.gated.add('lab/gated')
  settings = dict(endpoint=server, home=tmp_path / 'home')
  stranger = command('pull', 'lab/gated', **settings)
  assert stranger.returncode == 2 and 'https://huggingface.co/lab/gated' in stranger.stderr, stranger.stderr
  assert 'permission: request it at' in stranger.stderr and 'Traceback' not in stranger.stderr
  guest = command('pull', 'lab/gated', token=TOKEN, **settings)
  assert guest.returncode == 0 and read(guest.stdout.strip()).fingerprint == read(portable).fingerprint


def test_without_network_one_line_tells_what_was_looked_for():
  with pytest.raises(UserError, match='hf://runs/clipz: is not in the cache, and the Hub cannot be reached'):
    read('hf://runs/clipz')


@pytest.mark.parametrize('path, told', [
    ('runs/clipz', 'perhaps runs/clips or hf://runs/clipz on the Hugging Face Hub;'),
    ('./runs/clipz/checkpoints', 'perhaps runs/clips;'), ('../exportd', 'folder; `m2d-clap models`'),
    ('lab/' + 'x' * 99, 'folder; `m2d-clap models`'), ('runs/clips/file/none', 'folder; `m2d-clap models`'),
    ('m2d_clap_vit_base-80x608p16x16-24012', 'perhaps m2d_clap_vit_base-80x608p16x16-240128;'),
    ('old/m2d_vit_base-80x200p16x4-230529/checkpoint-300.pth', 'perhaps m2d_vit_base-80x200p16x4-230529;')])
def test_a_mistyped_path_is_no_download_and_the_nearest_path_or_name_is_proposed(path, told, tmp_path, monkeypatch):
  (tmp_path / 'runs' / 'clips').mkdir(parents=True)
  (tmp_path / 'runs' / 'clips' / 'file').touch()
  (tmp_path / 'old').mkdir()
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(hub, 'download', lambda *_: pytest.fail('asked the Hub'))
  with pytest.raises(UserError, match='no such file') as failure:
    read(path)
  assert told in str(failure.value)


@pytest.mark.parametrize('name', ['./exported', 'models/a--b', 'runs/clips.', 'hf://lab', 'hf://lab/model/file.pth'])
def test_what_cannot_be_a_name_is_not_looked_up_on_the_hub(name):
  with pytest.raises(UserError, match='is not the name of a model on the Hub, hf://'):
    hub.download(name)


def test_a_path_needs_no_scheme_and_only_portable_folders_are_pushed(portable, tmp_path, monkeypatch):
  (tmp_path / 'lab').mkdir()
  portable.rename(tmp_path / 'lab' / 'model')
  monkeypatch.chdir(tmp_path)
  assert read('lab/model').model['width'] == 32
  with pytest.raises(UserError, match='has no config.json and no model.safetensors.*m2d-clap convert'):
    hub.upload(tmp_path, 'lab/model')
  with pytest.raises(UserError, match='ORGANISATION/NAME'):
    hub.upload(tmp_path / 'lab' / 'model', 'model')
