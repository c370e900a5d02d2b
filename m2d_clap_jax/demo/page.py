"""A page to try a model in a browser: what a sound is, and which of many sounds a sentence is about. Needs gradio.

`Demo` is what the page does, without the page; `build` puts it on one; `serve` shows that on this machine.
"""
import contextlib
import html
import ipaddress
import os
import signal
import socket
import tempfile
import urllib.parse
import uuid
from collections.abc import Sequence

import numpy as np

from m2d_clap_jax.api import TEMPLATE, Pipeline
from m2d_clap_jax.audio.decode import AudioError, load
from m2d_clap_jax.audio.files import reason_of
from m2d_clap_jax.audio.pool import STREAM, Pool
from m2d_clap_jax.demo import service
from m2d_clap_jax.demo.limits import CAPTIONS, LABELS, MOST_SECONDS, MOST_UPLOAD, read_lines
from m2d_clap_jax.errors import UserError, install
from m2d_clap_jax.eval import plots
from m2d_clap_jax.losses import normalize
from m2d_clap_jax.paths import files_under, is_remote

MOST_FILES, MOST_BYTES = 200, 2 << 30  # that uploads and pictures may be
FOUND = 5  # sounds shown of a search
EXAMPLES = 'dog', 'rain', 'speech', 'music', 'church bells'  # for a model that does not say what it was trained on
MOST_PROPOSED = 10


class Demo:
  """A model and, for the search, `files` and their embeddings [n, E]."""

  def __init__(self, pipeline: Pipeline, files: list[str] = (), embeddings: np.ndarray | None = None):
    pipeline.encode_text(['ready'])  # what is missing is told before there is a page, and the first answer is quick
    self.pipeline, self.files = pipeline, list(files)
    self.pool = Pool(STREAM, service.AT_ONCE)  # uploads come from anybody: one that hangs must not hold up the page
    self.names = _names(files)
    self.embeddings = None if embeddings is None else np.asarray(normalize(embeddings))

  def proposed(self) -> list[str]:
    """Labels to begin with: some that the model was trained on, where it says."""
    return [name.replace('_', ' ') for name in (self.pipeline.classes or self.pipeline.weights.labels or EXAMPLES)][:MOST_PROPOSED]

  def classify(self, sound: str | None, texts: str, kind: str = LABELS) -> tuple[np.ndarray, list[tuple[str, float]]]:
    """An audio file and lines of labels or captions -> (log-mel [F, T], [(text, cosine similarity)], the best first).

    Raises:
      UserError: there is no sound, it cannot be read or is too long; there are no texts, or too many.
    """
    if not sound:
      raise UserError('Drop a sound first, or record one.')
    lines = read_lines(texts)
    wave = self.listen(sound)
    return self.pipeline.logmel.numpy(wave), self.compare(wave, lines, kind)

  def listen(self, sound: str, data: bytes | None = None) -> np.ndarray:
    """An audio file, or its name and content -> [S] at the model's rate; UserError if it cannot be read or is too long."""
    try:
      wave, longer = load(sound, self.pipeline.sample_rate, MOST_SECONDS, data, self.pool.stream)
    except AudioError as error:
      raise UserError(f'This file cannot be used: {reason_of(error, sound)}.') from None
    if longer:
      raise UserError(f'This sound is longer than {MOST_SECONDS // 60} minutes, the most that this page takes. Cut it, or '
                      'use: m2d-clap classify')
    return wave

  def compare(self, wave: np.ndarray, lines: list[str], kind: str) -> list[tuple[str, float]]:
    """A wave [S] and labels or captions -> [(text, cosine similarity)], the best first."""
    scores = self.pipeline.classify(wave, labels=lines, template=TEMPLATE if kind == LABELS else '{}')[0]
    order = np.argsort(-scores, kind='stable')
    return [(lines[i], float(scores[i])) for i in order]

  def search(self, text: str) -> list[tuple[str, float]]:
    """A sentence -> [(file, cosine similarity)] of the sounds nearest to it."""
    sentence, = read_lines(' '.join(text.split()), 'Write what you want to hear, as in: a dog barks in the distance')
    scores = self.embeddings @ np.asarray(normalize(self.pipeline.encode_text([sentence])))[0]
    return [(self.files[i], float(scores[i])) for i in np.argsort(-scores, kind='stable')[:FOUND]]


def _names(files: list[str]) -> dict[str, str]:
  """{file: its name below the folder that holds all of them}, as people see them; whole paths where there is none."""
  if any(map(is_remote, files)):
    return {file: file for file in files}
  places = {file: os.path.abspath(file) for file in files}
  above = os.path.commonpath([os.path.dirname(place) for place in places.values()]) if files else ''
  return {file: os.path.relpath(place, above) for file, place in places.items()}


def table(rows: list[tuple[str, float]], name: str, players: Sequence[str] = ()) -> str:
  """[(text, cosine)] as HTML: text, bar, number. A bar is as long as the similarity is above 0, on a scale up to 1.

  players: for each row, an audio file to be heard.
  """
  def cell(content: str, style: str = '', kind: str = 'td') -> str:
    return f'<{kind} style="border:0;border-bottom:1px solid {plots.HIDDEN};{style}">{content}</{kind}>'

  def row(text: str, value: float, file: str = '') -> str:
    player = file and ('<br><audio controls preload="none" style="height:1.8em;width:100%;min-width:8em;max-width:15em" '
                       f'src="/gradio_api/file={urllib.parse.quote(file)}"></audio>')
    bar = (f'<div style="background:{plots.HIDDEN}">'
           f'<div style="height:.8em;width:{100 * max(value, 0):.1f}%;background:{plots.COLOURS[0]}"></div></div>')
    return (f'<tr style="border:0">{cell(html.escape(text) + player, "overflow-wrap:anywhere")}{cell(bar, "width:40%")}'
            f'{cell(f"{value:.3f}", "width:4em;text-align:right")}</tr>')
  scale = ''.join(f'<span>{value}</span>' for value in ('0', '0.5', '1'))
  scale = f'<div style="display:flex;justify-content:space-between;font-weight:normal">{scale}</div>'
  head = cell(name, 'text-align:left', 'th') + cell(scale, kind='th') + cell('cosine', 'text-align:right', 'th')
  return (f'<table style="width:100%;border:0"><tr style="border:0">{head}</tr>'
          + ''.join(row(*each) for each in (zip(*zip(*rows), players) if players else rows)) + '</table>')


def build(demo: Demo, folder: str):
  """The page as gradio's Blocks; pictures are written into `folder`."""
  import gradio

  def told(function):
    def wrapped(*values):
      try:
        return function(*values)
      except UserError as error:
        raise gradio.Error(str(error), duration=None, title='This did not work', print_exception=False) from None
    return wrapped

  def classify(sound, texts, kind):
    logmel, rows = demo.classify(sound, texts, kind)
    path = os.path.join(folder, f'{uuid.uuid4().hex}.png')
    plots.log_mel(logmel, path, spec=demo.pipeline.logmel, title='Log-mel spectrogram')
    remove_old_files(folder)
    return path, table(rows, kind.removesuffix('s'))

  def search(text):
    rows = demo.search(text)
    return table([(demo.names[file], score) for file, score in rows], 'sound', [os.path.abspath(file) for file, _ in rows])

  # Uploads and pictures are deleted an hour after they came, or earlier where there are many.
  with gradio.Blocks(title='M2D-CLAP', analytics_enabled=False, delete_cache=(60, 3600)) as page:
    # Of a path the folder, too, for runs of several stages that are called alike.
    name = '/'.join(demo.pipeline.weights.source.rstrip('/').split('/')[-2:])
    gradio.Markdown(f'# M2D-CLAP\n`{name}` compares sounds with words. All of it happens on the machine that shows this page.')
    with gradio.Tab('What is this sound?'), gradio.Row():
      with gradio.Column():
        sound = gradio.Audio(type='filepath', sources=['upload', 'microphone'], elem_id='sound', buttons=[],
                             label=f'Sound, at most {MOST_SECONDS // 60} minutes')
        texts = gradio.Textbox('\n'.join(demo.proposed()), lines=6, elem_id='texts', label='It may be, one on each line:')
        kind = gradio.Radio([(f'labels: “{TEMPLATE.replace("{}", "dog")}”', LABELS), ('captions, as they are', CAPTIONS)],
                            value=LABELS, label='The lines are')
        button = gradio.Button('Compare', variant='primary', elem_id='compare')
      with gradio.Column():
        picture = gradio.Image(show_label=False, interactive=False, buttons=['download'], elem_id='picture')
        ranked = gradio.HTML(elem_id='ranked')
      button.click(told(classify), [sound, texts, kind], [picture, ranked], show_progress='minimal')
    if demo.files:
      with gradio.Tab('Find a sound'):
        wanted = gradio.Textbox(label=f'Which of {len(demo.files)} sounds is …', elem_id='wanted',
                                placeholder='a dog barks in the distance')
        find = gradio.Button('Search', variant='primary', elem_id='search')
        listed = gradio.HTML(elem_id='listed')
        for event in (find.click, wanted.submit):
          event(told(search), [wanted], [listed], show_progress='minimal')
  return page


def remove_old_files(folder: str, count: int = MOST_FILES, size: int = MOST_BYTES):
  """Deletes the oldest files under a folder, beyond so many and so many bytes."""
  found = []
  for name in files_under(folder):
    with contextlib.suppress(OSError):  # gradio deletes files, too
      about = os.stat(os.path.join(folder, name))
      found.append((about.st_mtime_ns, about.st_size, os.path.join(folder, name)))
  for i, (_, length, path) in enumerate(sorted(found, reverse=True)):
    size -= length
    if i >= count or size < 0 < i:
      with contextlib.suppress(OSError):
        os.unlink(path)


class KnownHosts:
  """ASGI middleware that answers requests of known hosts only.

  A foreign page that a name server has led to this machine (DNS rebinding) could else hear what the page shows: its
  requests have the foreign name as their host. Addresses are none: `host` of any address allows all of them, and the
  name of this machine.
  """

  def __init__(self, app, host: str):
    self._app, self._anywhere = app, host in ('0.0.0.0', '::', '')
    self._names = {'localhost', '127.0.0.1', '::1', host.lower()}
    if self._anywhere:
      self._names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

  async def __call__(self, scope, receive, send):
    if scope['type'] not in ('http', 'websocket') or self._known(dict(scope['headers']).get(b'host', b'').decode('latin-1')):
      await self._app(scope, receive, send)
    elif scope['type'] == 'websocket':
      await send({'type': 'websocket.close', 'code': 1008})
    else:
      await send({'type': 'http.response.start', 'status': 421, 'headers': [(b'content-type', b'text/plain')]})
      await send({'type': 'http.response.body',
                  'body': b'This page does not answer under this name; m2d-clap demo --host=NAME gives it one.\n'})

  def _known(self, host: str) -> bool:
    name = host[1:host.find(']')] if host.startswith('[') else host.partition(':')[0]
    if self._anywhere:
      with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return name.lower() in self._names


def serve(demo: Demo, *, host: str, port: int | None):
  """Shows the page until Ctrl-C; everything it writes is in a temporary folder that is deleted then."""
  with demo.pool, tempfile.TemporaryDirectory(prefix='m2d_clap_demo_') as folder:
    # Read by gradio where it is imported and later: uploads go there, and nothing is fetched or told to anybody.
    os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED='False', HF_HUB_OFFLINE='1')
    try:
      import gradio
    except ImportError:
      raise UserError(f'the page needs gradio: {install("gradio")}') from None
    page = build(demo, folder)
    fonts = dict(font=['system-ui', 'sans-serif'], font_mono=['ui-monospace', 'monospace'])  # none from elsewhere
    try:
      page.launch(server_name=host, server_port=port, max_file_size=f'{MOST_UPLOAD >> 20}mb', allowed_paths=demo.files,
                  share=False, footer_links=[], theme=gradio.themes.Default(**fonts), ssr_mode=False, pwa=False,
                  app_kwargs={'middleware': [(KnownHosts, (), {'host': host})], 'routes': service.routes(demo)},
                  prevent_thread_lock=True, quiet=True)
    except OSError as error:
      raise UserError(f'{host}:{port}: no page can be shown there ({error}); choose another --port') from None
    print(f'{page.local_url} shows the page until you press Ctrl-C', flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it, too, leaves nothing behind
    page.block_thread()
