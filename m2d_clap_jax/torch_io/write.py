"""Weights as files: the authors' checkpoint layout, and a portable folder that opens without orbax and TensorFlow."""
import datetime
import json
import pathlib

import numpy as np

from m2d_clap_jax.errors import UserError
from m2d_clap_jax.paths import as_path, replacing
from m2d_clap_jax.torch_io.rules import to_torch
from m2d_clap_jax.weights import CONFIG, FORMAT, TENSORS, Weights, family

CARD = 'README.md'
WRAPPER = 'module.ar.runtime.backbone.'  # of the encoder in fine-tuned public checkpoints


def public_tensors(weights: Weights) -> dict[str, np.ndarray]:
  """All tensors under their public names, with the fixed tables that the public files have."""
  complete = weights.with_tables()
  tensors = to_torch(complete.trees, complete.network().patch_size)
  if 'head' in weights.trees:
    tensors = {name if name.startswith('module.head.') else WRAPPER + name: value for name, value in tensors.items()}
  return tensors | {weights.text_prefix + name: value for name, value in weights.text.items()}


def checkpoint_folder(weights: Weights, day: datetime.date) -> str:
  """The authors' folder name, from which their tools take input size, patch size and rate."""
  network = weights.network()
  kind = 'm2d_clap' if network.text_width is not None else 'msm_mae' if network.predict == 'pixels' else 'm2d'
  size = {192: 'tiny', 384: 'small', 768: 'base', 1024: 'large'}.get(network.width, f'w{network.width}')
  rate = '' if weights.sample_rate == 16000 else f'p{weights.sample_rate // 1000}k'
  return (f'{kind}_vit_{size}-{network.input_size[0]}x{network.input_size[1]}p{network.patch_size[0]}x'
          f'{network.patch_size[1]}{rate}-{day:%y%m%d}')


def save_pth(weights: Weights, folder, epoch: int = 0):
  """Writes FOLDER/m2d_clap_vit_base-80x608p16x16-YYMMDD/checkpoint-EPOCH.pth, which the authors' tools load -> its path.

  Raises:
    UserError: torch is not installed, or the folder cannot be written.
  """
  try:
    import torch
  except ImportError:
    raise UserError("writing .pth files needs PyTorch: pip install -e '.[torch]', or export a portable "
                    'folder instead') from None
  tensors = {name: torch.from_numpy(np.array(value)) for name, value in public_tensors(weights).items()}
  path = as_path(folder) / checkpoint_folder(weights, datetime.date.today()) / f'checkpoint-{epoch}.pth'

  def write(temporary):
    torch.save({'model': tensors, 'epoch': epoch}, temporary)
  _in_place(path, write)
  return path


def save_portable(weights: Weights, folder):
  """Writes model.safetensors, config.json and a model card into `folder` -> its path; UserError where that is
  impossible."""
  from safetensors.numpy import save_file
  folder = as_path(folder)
  complete = weights.with_tables()
  tensors = to_torch(complete.trees, complete.network().patch_size)
  tensors |= {weights.text_prefix + name: value for name, value in weights.text.items()}
  # The description comes last: a folder whose writing was broken off is no model.
  (folder / CONFIG).unlink(missing_ok=True)
  _in_place(folder / TENSORS, lambda path: save_file(tensors, path, {'format': 'pt'}))
  save_card(weights, folder)
  config = {'m2d_clap_jax': FORMAT, 'model': weights.model, 'sample_rate': weights.sample_rate,
            'text_encoder': weights.text_encoder, 'text_prefix': weights.text_prefix,
            'classes': weights.classes, 'step': weights.step}
  _write_text(folder / CONFIG, json.dumps(config, indent=2) + '\n')
  return folder


def save_card(weights: Weights, folder):
  """Writes the model card into `folder`; UserError where that is impossible."""
  _write_text(as_path(folder) / CARD, model_card(weights))


def model_card(weights: Weights) -> str:
  """A README for the folder: what the model is and the lines that use it."""
  encoder = weights.text_encoder
  rows = [('Kind', family(weights)), ('Parameters', f'{weights.num_parameters / 1e6:.1f} M'),
          ('Log-mel mean, deviation', '{:.4f}, {:.4f}'.format(*weights.network().norm_stats)),
          ('Caption encoder', f'{encoder["name"]} ({encoder["pooling"]} pooling)' if encoder else 'none'),
          ('Pre-training can continue', 'yes' if weights.complete else 'no: encoder only')]
  table = '\n'.join(f'| {name} | {value} |' for name, value in rows)
  use = 'model.embed(["sound.wav"])                    # transfer-learning features'
  if encoder:
    use += '\nmodel.classify(["sound.wav"], labels=["dog", "rain"])'
  return (f'---\nlibrary_name: m2d-clap-jax\npipeline_tag: audio-classification\n---\n# {family(weights)}\n\n| | |\n'
          f'|---|---|\n{table}\n\n```python\nimport m2d_clap_jax\nmodel = m2d_clap_jax.load("THIS_FOLDER")\n{use}\n```\n')


def _write_text(path, text: str):
  _in_place(path, lambda name: pathlib.Path(name).write_text(text, encoding='utf-8'))


def _in_place(path, write):
  """Calls write(name of a local file), which becomes `path`: no half file ever stands under that name."""
  try:
    with replacing(path) as name:
      write(name)
  except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
    raise UserError(f'{path}: cannot be written ({error}): choose another folder or free space') from error
