"""The portable folder: tensors, a description and a model card, which open without orbax, TensorFlow and torch."""
import functools
import json
import os
import pathlib
import shutil
import sys

from m2d_clap_jax import fields
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.paths import as_path, is_remote, read_bytes
from m2d_clap_jax.text import flax_bert
from m2d_clap_jax.weights import description
from m2d_clap_jax.weights.core import Weights, check, family, overridden
from m2d_clap_jax.weights.files import in_place, read_tensors
from m2d_clap_jax.weights.names import to_flax, to_torch

CONFIG, TENSORS, CARD = 'config.json', 'model.safetensors', 'README.md'
TEXT = 'text_encoder'  # folder of tokenizer and configuration, where the model has a text encoder of its own
FORMAT = 1  # of config.json
_ADVICE = 'copy the folder again, or make it anew with `m2d-clap convert`'


def save_portable(weights: Weights, folder):
  """Writes model.safetensors, config.json and a model card into `folder` -> its path, and tokenizer and configuration of a
  text encoder that the model contains; UserError where that is impossible."""
  from safetensors.numpy import save_file
  folder = as_path(folder)
  complete = weights.with_tables()
  tensors = to_torch(complete.trees, complete.network().patch_size)
  tensors |= {weights.text_prefix + name: value for name, value in weights.text.items()}
  # The description comes last: a folder whose writing was broken off is no model.
  (folder / CONFIG).unlink(missing_ok=True)
  sums = []

  def write(path):
    save_file(tensors, path, {'format': 'pt'})
    sums.append(fields.checksum_of_file(path))
  in_place(folder / TENSORS, write)
  save_card(weights, folder)
  if weights.text and weights.text_encoder:
    _save_tokenizer(weights.text_encoder['name'], folder / TEXT)
  config = {'m2d_clap_jax': FORMAT, 'model': weights.model, 'sample_rate': weights.sample_rate,
            'text_encoder': weights.text_encoder, 'text_prefix': weights.text_prefix,
            'classes': weights.classes, 'labels': list(weights.labels), 'step': weights.step, 'padded_to': weights.padded_to,
            'tensors_checksum': sums[0]}
  _write_text(folder / CONFIG, json.dumps(fields.sealed(config), indent=2) + '\n')
  return folder


def _save_tokenizer(name: str, folder):
  """Copies them from the encoder that the text encoder was made from, or says that it will be needed."""
  try:
    source = flax_bert.find_folder(name, tensors=False)
  except UserError as error:
    print(f'notice: {folder.parent}: without the tokenizer of its text encoder, which whoever opens it needs: {error}',
          file=sys.stderr)
    return
  if os.path.realpath(source) == os.path.realpath(folder):
    return
  for file in flax_bert.DESCRIPTION:
    if (source / file).is_file():
      in_place(folder / file, functools.partial(shutil.copyfile, source / file))


def save_card(weights: Weights, folder):
  """Writes the model card into `folder`; UserError where that is impossible."""
  _write_text(as_path(folder) / CARD, model_card(weights))


def model_card(weights: Weights) -> str:
  """A README for the folder: what the model is and the lines that use it."""
  encoder = weights.text_encoder
  rows = [('Kind', family(weights)), ('Parameters', f'{weights.num_parameters / 1e6:.1f} M'),
          ('Log-mel mean, deviation', '{:.4f}, {:.4f}'.format(*weights.network().norm_stats)),
          ('Caption encoder', f'{"inside" if weights.text else encoder["name"]} ({encoder["pooling"]} pooling)' if encoder
           else 'none'),
          ('Pre-training can continue', 'yes' if weights.complete else 'no: encoder only')]
  table = '\n'.join(f'| {name} | {value} |' for name, value in rows)
  use = 'model.embed(["sound.wav"])                    # transfer-learning features'
  if encoder:
    use += '\nmodel.classify(["sound.wav"], labels=["dog", "rain"])'
  return (f'---\nlibrary_name: m2d-clap-jax\npipeline_tag: audio-classification\n---\n# {family(weights)}\n\n| | |\n'
          f'|---|---|\n{table}\n\n```python\nimport m2d_clap_jax\nmodel = m2d_clap_jax.load("THIS_FOLDER")\n{use}\n```\n')


def read_portable(folder, overrides) -> Weights:
  """The model of a portable folder; overrides as in `weights.read`. UserError where the folder holds none."""
  schema = {'m2d_clap_jax': fields.version(FORMAT), **description.CONFIG}
  try:
    config = fields.parse(read_bytes(folder / CONFIG), schema, folder / CONFIG, _ADVICE)
  except OSError as error:
    raise UserError(f'{folder / CONFIG}: cannot be read ({error.strerror or error}): check the file') from None
  tensors = read_tensors(folder / TENSORS)
  wanted = config.get('tensors_checksum')  # earlier versions wrote none; stores check what they give themselves
  if wanted and not is_remote(folder) and wanted != fields.checksum_of_file(folder / TENSORS):
    raise UserError(f'{folder / TENSORS}: is not the file that {CONFIG} belongs to, or is damaged; {_ADVICE}')
  prefix = config['text_prefix']
  text = {name.removeprefix(prefix): value for name, value in tensors.items() if prefix and name.startswith(prefix)}
  try:
    trees = to_flax({name: value for name, value in tensors.items() if not (prefix and name.startswith(prefix))})
  except KeyError as error:
    raise UserError(f'{folder / TENSORS}: {error.args[0]}') from None
  weights = Weights(
      model=_lists_to_tuples(config['model']), trees=trees, sample_rate=config['sample_rate'],
      text_encoder=config['text_encoder'], classes=config['classes'] and tuple(config['classes']),
      labels=tuple(config.get('labels', ())), text=text,
      text_prefix=prefix, source=str(folder), step=config['step'], padded_to=config.get('padded_to', 0))
  if text and (folder / TEXT / CONFIG).is_file():
    weights = overridden(weights, {'text_encoder': folder / TEXT})
  weights = overridden(weights, overrides)
  check(weights)
  return weights


def _lists_to_tuples(model: dict) -> dict:
  return {key: tuple(value) if isinstance(value, list) else value for key, value in model.items()}


def _write_text(path, text: str):
  in_place(path, lambda name: pathlib.Path(name).write_text(text, encoding='utf-8'))
