"""`m2d-clap demo`: a web page to try a model."""
from m2d_clap_jax.cli import model_options
from m2d_clap_jax.errors import UserError


def add_arguments(p):
  """Declares the model, the sounds to search and the address."""
  p.description = """\
Serves a page on this machine: drop or record a sound, write labels or captions,
and see its spectrogram and which of them fit. With --sounds, the page also
searches those sounds by text. Needs gradio: pip install 'm2d-clap-jax[demo]'."""
  p.epilog = """\
examples:
  m2d-clap demo runs/clips
  m2d-clap demo exported/ --sounds recordings/ --port 8000

Only this machine can reach the page unless --host is given; there is no
password, and everyone who can reach it can hear the sounds of --sounds."""
  p.add_argument('model', metavar='MODEL', help=model_options.KINDS)
  p.add_argument('--sounds', nargs='+', default=[], metavar='FILE|FOLDER', help='sounds to search by text')
  p.add_argument('--host', default='127.0.0.1', metavar='ADDRESS', help='where to listen (default: %(default)s)')
  p.add_argument('--port', type=model_options.positive, metavar='N', help='default: the first free one from 7860')
  model_options.add_overrides(p)


def run(args):
  """Serves the page until Ctrl-C; UserError if none of --sounds can be used."""
  from m2d_clap_jax import api
  from m2d_clap_jax.demo import page
  pipeline = api.load(args.model, **model_options.overrides(args))
  page.serve(page.Demo(pipeline, *_embedded(pipeline, args.sounds)), host=args.host, port=args.port)


def _embedded(pipeline, paths) -> tuple:
  """Files and folders -> (names of the usable files, their embeddings [n, E])."""
  import numpy as np

  from m2d_clap_jax.audio import files
  if not paths:
    return ()
  names = files.find(paths)
  found = {name: vector for name, vector, reason, _ in files.results(names, pipeline.encode_audio) if not reason}
  if not found:
    raise UserError(f'--sounds: none of the {len(names)} files can be used, for the reasons above')
  return list(found), np.stack(list(found.values()))
