"""`m2d-clap demo`: a real browser on a real page, and what the page answers."""
import asyncio
import dataclasses
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import soundfile

import m2d_clap_jax
from m2d_clap_jax.demo import limits, page, service
from m2d_clap_jax.errors import UserError
from tests.command_helpers import run, save_model, save_recordings
from tests.test_pretrain import ROOT

LABELS = 'dog\nrain\nchurch_bells\n<b>bold</b>'


@pytest.fixture(scope='module')
def here(tmp_path_factory):
  """A folder with model/ and audio/; `here.usable`, `here.model` (Pipeline), `here.demo`, `here.hour`."""
  class Here:
    root = tmp_path_factory.mktemp('page')
    folder = save_model(root / 'model')
    usable = save_recordings(root / 'audio')
    model = m2d_clap_jax.load(folder)
    demo = page.Demo(model, usable, model.encode_audio(usable))
    hour = str(root / 'hour.flac')
  soundfile.write(Here.hour, np.tile(np.int16([0, 9]), 1800 * 8000), 8000)
  return Here


@pytest.mark.parametrize('kind,template', [(page.LABELS, '{} can be heard'), (page.CAPTIONS, '{}')])
def test_texts_are_ranked_by_the_pipelines_cosines(here, kind, template):
  logmel, rows = here.demo.classify(here.usable[1], f'{LABELS}\n\n dog ', kind)
  expected = here.model.classify(here.usable[1], labels=LABELS.splitlines(), template=template)[0]
  assert logmel.shape[0] == 80 and [score for _, score in rows] == sorted(expected, reverse=True)
  np.testing.assert_allclose([dict(rows)[text] for text in LABELS.splitlines()], expected, atol=1e-6)


def test_a_search_finds_the_sounds_nearest_to_the_sentence(here):
  cosines = here.model.classify(here.usable, labels=['a dog barks'], template='{}')[:, 0]
  found = here.demo.search(' a dog\r\nbarks\u2028')
  assert [name for name, _ in found] == [here.usable[i] for i in np.argsort(-cosines)]
  np.testing.assert_allclose([score for _, score in found], sorted(cosines)[::-1], atol=1e-6)


def test_sounds_may_be_named_from_here_and_from_elsewhere(here, monkeypatch):
  monkeypatch.chdir(here.root / 'audio')
  files = ['a.wav', here.usable[3]]
  assert page.Demo(here.model, files).names == {'a.wav': 'a.wav', here.usable[3]: 'more/d.opus'}


@pytest.mark.parametrize('sound,texts,message', [
    (None, LABELS, 'Drop a sound first'),
    ('a', ' \n ', 'at least one label'),
    ('a', '\n'.join(map(str, range(201))), '201 lines; this page takes 200'),
    ('a', 'x' * 301, '301 letters; this page takes 300'),
    ('hour', LABELS, 'longer than 10 minutes'),
    ('text', LABELS, 'This file cannot be used: is not readable as audio'),
    ('cut', LABELS, 'is cut off or corrupt')])
def test_what_cannot_be_compared_is_told(here, sound, texts, message):
  files = {'a': here.usable[0], 'hour': here.hour, 'text': str(here.root / 'audio' / 'more' / 'text.wav'),
           'cut': str(here.root / 'audio' / 'more' / 'cut.flac'), None: None}
  with pytest.raises(UserError, match=message):
    here.demo.classify(files[sound], texts)


def test_labels_that_the_model_was_trained_on_are_proposed(here):
  weights = here.model.weights
  assert here.demo.proposed() == list(page.EXAMPLES), 'where the model does not say'
  knows = m2d_clap_jax.load(dataclasses.replace(weights, labels=('church_organ', 'flute')))
  assert page.Demo(knows).proposed() == ['church organ', 'flute']


def test_bars_have_a_scale_and_sounds_a_small_player(here):
  shown = page.table([('a "dog"', 0.25), ('b', -0.5)], 'sound', ['/tmp/a b.wav', '/tmp/c.wav'])
  assert all(f'<span>{value}</span>' in shown for value in ('0', '0.5', '1'))
  assert 'width:25.0%' in shown and 'width:0.0%' in shown and shown.count('<audio') == 2
  assert 'src="/gradio_api/file=/tmp/a%20b.wav"' in shown and '<audio' not in page.table([('a', 0.1)], 'label')


def test_mistakes_on_the_command_line_are_one_line(here, capsys):
  assert run('demo', here.folder, '--sounds', here.root / 'audio' / 'notes.txt') == 2
  assert 'none of the 1 files can be used' in capsys.readouterr().err.splitlines()[-1]


def free_port() -> int:
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    return found.getsockname()[1]


def contents(folder) -> set[str]:
  return {os.path.join(place, name) for place, _, names in os.walk(folder) for name in names}


@pytest.fixture
def served(here, tmp_path):
  """-> (address, folder): the page as a user starts it, who has nothing but `folder` for home, work and temporary."""
  for name in ('home', 'work', 'temporary'):
    (tmp_path / name).mkdir()
  port = free_port()
  environment = {key: value for key, value in os.environ.items() if key != 'XLA_FLAGS'} | {
      'HOME': str(tmp_path / 'home'), 'TMPDIR': str(tmp_path / 'temporary'), 'PYTHONPATH': str(ROOT)}
  command = [sys.executable, '-m', 'm2d_clap_jax.cli', 'demo', here.folder, '--sounds', str(here.root / 'audio'),
             '--port', str(port)]
  with open(tmp_path / 'log', 'w') as log:
    server = subprocess.Popen(command, cwd=tmp_path / 'work', env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
  try:
    said = server.stdout.readline()
    assert said.startswith(f'http://127.0.0.1:{port}'), (tmp_path / 'log').read_text()
    yield said.split()[0], tmp_path
  finally:
    server.send_signal(signal.SIGTERM)
    assert server.wait(300) == 0
  assert not contents(tmp_path / 'temporary'), 'uploads outlive the page'


@pytest.fixture
def browser(tmp_path):
  """Headless Chromium that reaches this machine alone."""
  from selenium import webdriver
  chromium, driver = shutil.which('chromium') or shutil.which('google-chrome'), shutil.which('chromedriver')
  if not chromium or not driver:
    pytest.skip('there is no Chromium: apt-get install chromium chromium-driver')
  options = webdriver.ChromeOptions()
  options.binary_location = chromium
  for option in ('--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--window-size=1200,1000',
                 f'--user-data-dir={tmp_path / "chromium"}', '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1'):
    options.add_argument(option)
  browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
  yield browser
  browser.quit()


def test_in_a_browser_a_sound_is_compared_bad_ones_are_told_and_sounds_are_found(here, served, browser):
  from selenium.webdriver.support.ui import WebDriverWait
  address, folder = served
  before = contents(folder / 'home') | contents(folder / 'work')

  def one(css):
    return browser.find_element('css selector', css)

  def until(what):
    return WebDriverWait(browser, 20, ignored_exceptions=(Exception,)).until(lambda _: what())

  def upload(path, ready):
    until(lambda: one('#sound input[type=file]')).send_keys(path)
    until(ready)

  def shown():
    return browser.find_element('tag name', 'body').text

  def compare():
    one('#compare').click()
  browser.get(address)
  upload(here.usable[0], lambda: one('#sound [aria-label="Clear"]'))
  one('#texts textarea').clear()
  one('#texts textarea').send_keys(LABELS)
  compare()
  until(lambda: 'cosine' in one('#ranked').text)
  expected = here.model.classify(here.usable[0], labels=LABELS.splitlines())[0]
  order = np.argsort(-expected)
  cells = one('#ranked').text.replace('\n', ' ').removeprefix('label 0 0.5 1 cosine ')
  assert cells == ' '.join(f'{LABELS.splitlines()[i]} {expected[i]:.3f}' for i in order)
  image = until(lambda: one('#picture img'))
  assert until(lambda: int(image.get_attribute('naturalWidth'))) > 500

  for bad, message in ((str(here.root / 'audio' / 'more' / 'text.wav'), 'is not readable'), (here.hour, 'longer than 10 minutes')):
    browser.refresh()
    upload(bad, lambda: one('#sound [aria-label="Clear"]'))
    compare()
    until(lambda told=message: told in shown())
    assert str(folder) not in shown()
  big = folder / 'big.wav'
  with open(big, 'wb') as file:
    file.truncate(110 << 20)
  browser.refresh()
  upload(str(big), lambda: 'exceeds' in shown().lower() or 'maximum' in shown().lower())

  browser.refresh()
  until(lambda: browser.find_elements('css selector', 'button[role=tab]')[1]).click()
  until(lambda: one('#wanted input, #wanted textarea').is_displayed())
  one('#wanted input, #wanted textarea').send_keys('a dog barks')
  one('#search').click()
  until(lambda: 'cosine' in one('#listed').text)
  found = here.demo.search('a dog barks')
  assert one('#listed').text.split()[5::2] == [os.path.relpath(name, here.root / 'audio') for name, _ in found]
  until(lambda: len(browser.find_elements('css selector', 'audio')) >= len(found))
  assert contents(folder / 'home') | contents(folder / 'work') == before


def answer(address: str, path: str, host: str) -> int:
  """Status of a request for `path` under the name `host`."""
  connection = http.client.HTTPConnection(address.split('/')[2], timeout=60)
  connection.request('GET', path, headers={'Host': host})
  return connection.getresponse().status


def test_the_page_and_its_sounds_answer_under_the_names_of_this_machine_alone(here, served):
  address, _ = served
  port = address.split(':')[2].strip('/')
  sound = f'/gradio_api/file={here.usable[0]}'
  for host in (f'127.0.0.1:{port}', f'localhost:{port}', f'LOCALHOST:{port}', f'[::1]:{port}'):
    assert answer(address, '/', host) == answer(address, sound, host) == 200
  for host in (f'example.org:{port}', f'localhost.example.org:{port}', f'127.0.0.1.example.org:{port}', '', '['):
    assert answer(address, '/', host) == answer(address, sound, host) == 421


def post(address: str, path: str, body, **headers):
  """-> (status, JSON) of a request of a program; an iterator as body is sent in chunks, without its length."""
  connection = http.client.HTTPConnection(address.split('/')[2], timeout=120)
  connection.request('POST', path, body, headers)
  response = connection.getresponse()
  return response.status, json.loads(response.read())


def test_programs_post_a_recording_and_receive_json(here, served):
  address, _ = served
  with open(here.usable[1], 'rb') as file:
    recording = file.read()
  status, found = post(address, '/api/classify?label=dog&label=church_bells', recording)
  expected = here.model.classify(here.usable[1], labels=['dog', 'church_bells'])[0]
  assert status == 200 and (found['model'], found['seconds']) == (here.model.fingerprint, pytest.approx(0.7, abs=0.01))
  assert {row['text']: row['cosine'] for row in found['scores']} == pytest.approx(dict(zip(['dog', 'church_bells'], expected)),
                                                                                  abs=1e-5)
  assert found['scores'][0]['cosine'] >= found['scores'][1]['cosine']
  _, found = post(address, '/api/classify?caption=a%20dog%20barks', recording)
  caption = here.model.classify(here.usable[1], labels=['a dog barks'], template='{}')[0, 0]
  assert found['scores'] == [{'text': 'a dog barks', 'cosine': pytest.approx(caption, abs=1e-5)}]
  _, found = post(address, '/api/embed', recording)
  for kind, value in zip(('embedding', 'clap'), here.model.features(here.usable[1])):
    np.testing.assert_allclose(found[kind], value[0], atol=1e-5 * np.abs(value).max())
  with open(here.hour, 'rb') as file:
    hour = file.read()
  for path, body, message in (('/api/classify', recording, 'give label='), ('/api/embed', b'no sound', 'not readable as audio'),
                              ('/api/embed', b'', 'empty'), ('/api/embed', hour, 'longer than 10 minutes'),
                              ('/api/classify?label=' + 301 * 'x', recording, '301 letters; this page takes 300')):
    status, found = post(address, path, body)
    assert status == 400 and message in found['error'], path
  assert post(address, '/api/embed', recording, Origin='http://example.org')[0] == 403
  assert answer(address, '/api/embed', 'localhost') == 405
  connection = http.client.HTTPConnection(address.split('/')[2], timeout=120)
  connection.putrequest('POST', '/api/embed')
  connection.putheader('Content-Length', str((100 << 20) + 1))
  connection.endheaders()
  assert connection.getresponse().status == 413, 'before anything is sent'


def test_a_recording_of_unknown_length_is_refused_once_it_is_too_large(here, monkeypatch):
  class Request:
    headers = {}

    async def stream(self):
      for _ in range(3):
        yield bytes(60)
  monkeypatch.setattr(limits, 'MOST_UPLOAD', 100)
  with pytest.raises(service.Refused, match='413'):
    asyncio.run(service.received(Request()))
  monkeypatch.setattr(limits, 'MOST_UPLOAD', 180)
  assert asyncio.run(service.received(Request())) == bytes(180)


@pytest.mark.parametrize('host,known,foreign', [
    ('sound.lab', ['sound.lab:7860', 'Sound.Lab', 'localhost'], ['192.168.1.7', 'other.lab', socket.gethostname()]),
    ('0.0.0.0', ['192.168.1.7:7860', '[fe80::1]:7860', socket.gethostname()], ['example.org', ''])])
def test_a_page_for_others_answers_under_the_name_that_it_was_given(host, known, foreign):
  async def through(*_):
    answers.append('page')

  async def send(message):
    answers.extend([message['status']] if 'status' in message else [])
  for name in known + foreign:
    answers = []
    scope = {'type': 'http', 'headers': [(b'host', name.encode())]}
    asyncio.run(page.KnownHosts(through, host)(scope, None, send))
    assert answers == (['page'] if name in known else [421]), name


def test_the_oldest_pictures_and_uploads_make_room_for_new_ones(tmp_path):
  (tmp_path / 'uploads').mkdir()
  for i in range(6):
    (tmp_path / 'uploads' / f'{i}.png').write_bytes(bytes(100))
    os.utime(tmp_path / 'uploads' / f'{i}.png', (i, i))
  page.remove_old_files(str(tmp_path), count=4, size=1000)
  assert sorted(path.name for path in tmp_path.rglob('*.png')) == ['2.png', '3.png', '4.png', '5.png']
  page.remove_old_files(str(tmp_path), count=4, size=250)
  assert sorted(path.name for path in tmp_path.rglob('*.png')) == ['4.png', '5.png']
