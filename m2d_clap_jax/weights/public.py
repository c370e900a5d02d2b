"""The authors' checkpoints: what their tensors and their folder's name tell about the model, and how they are written."""
import datetime
import pathlib
import re
from typing import Any

import numpy as np

from m2d_clap_jax.errors import UserError
from m2d_clap_jax.paths import as_path
from m2d_clap_jax.weights.core import TEXT_ENCODERS, Weights, check, pooling_of
from m2d_clap_jax.weights.files import BERT_MARK, in_place, read_tensors, unwrap
from m2d_clap_jax.weights.names import flax_path, to_flax, to_torch

MEL_BINS = 80
NORM_STATS = (-7.1, 4.2)  # of AudioSet: what files without statistics were trained with
WRAPPER = 'module.ar.runtime.backbone.'  # of the encoder in fine-tuned public checkpoints


def read_public(path: pathlib.Path, overrides: dict) -> Weights:
  """A .pth or .safetensors file of any released family -> Weights; overrides as in `weights.read`."""
  found = read_tensors(path)
  tensors, text = unwrap(found)
  unknown = [name for name in tensors if flax_path(name) is None]
  if len(unknown) == len(tensors):
    raise UserError(f'{path}: none of its {len(tensors)} tensors belongs to an M2D-CLAP, M2D or MSM-MAE model (the '
                    f'first is {unknown[0] if unknown else "missing"})')
  if unknown:
    listed = ', '.join(unknown[:8]) + (f', and {len(unknown) - 8} more' if len(unknown) > 8 else '')
    raise UserError(f'{path}: holds {len(unknown)} tensors that no M2D-CLAP, M2D or MSM-MAE model has: {listed}')
  named = name_fields(path.parent.name)
  overrides = dict(overrides)
  sample_rate = overrides.pop('sample_rate', None) or named.pop('sample_rate', 16000)
  letter = named.pop('text_encoder', 'A')
  encoder = overrides.pop('text_encoder', None)
  trees = to_flax(tensors)
  model = infer_model(tensors, named | overrides, path)
  weights = Weights(model=model, trees=trees, sample_rate=sample_rate, text=text, source=str(path),
                    text_encoder=text_encoder(letter, encoder, model), text_prefix=_text_prefix(found))
  check(weights)
  return weights


def name_fields(folder: str) -> dict:
  """What a checkpoint's folder name tells, as in 'm2d_clap_vit_base-80x608p16x16-240128' or '...-80x1001p16x16p16kpA'.

  Returns input_size, patch_size, sample_rate in Hz and the text encoder's letter, each if it is there.
  """
  match = re.search(r'-(\d+)x(\d+)p(\d+)x(\d+)([^-]*)', folder)
  if not match:
    return {}
  fields: dict[str, Any] = {'input_size': (int(match[1]), int(match[2])), 'patch_size': (int(match[3]), int(match[4]))}
  if rate := re.search(r'p(\d+)k', match[5]):
    fields['sample_rate'] = 1000 * int(rate[1])
  if encoder := re.search(r'p([ABN])', match[5]):
    fields['text_encoder'] = encoder[1]
  return fields


def infer_model(tensors: dict[str, np.ndarray], known: dict, path) -> dict:
  """Fields of `M2DCLAP` from shapes; `known` (from the folder's name and the caller) wins where shapes leave a choice."""
  shapes = {name: value.shape for name, value in tensors.items()}
  try:
    width = shapes['cls_token'][-1]
    kernel = shapes['patch_embed.proj.weight']
    patch = kernel[2:]
    depth = _count(shapes, 'blocks')
  except (KeyError, IndexError):
    raise UserError(f'{path}: lacks cls_token or patch_embed.proj.weight, which every encoder has') from None
  if tuple(known.get('patch_size', patch)) != tuple(patch):
    raise UserError(f'{path}: its patches are {patch[0]}x{patch[1]}, where its folder (or the argument patch_size) says '
                    f'{known["patch_size"][0]}x{known["patch_size"][1]}: correct the name or the argument')
  fields = {'patch_size': tuple(patch), 'width': width, 'depth': depth, 'heads': max(1, width // 64)}
  if 'pos_embed' in shapes:
    rows = MEL_BINS // patch[0]
    fields['input_size'] = (MEL_BINS, (shapes['pos_embed'][1] - 1) // rows * patch[1])
  elif 'input_size' not in known:
    raise UserError(f'{path}: neither a position table nor its folder (as in m2d_vit_base-80x608p16x16) tells the '
                    'input size: give input_size=(80, FRAMES)')
  stats = tensors.get('norm_stats')
  fields['norm_stats'] = NORM_STATS if stats is None else tuple(float(x) for x in stats)
  fields |= _predictor_fields(shapes, width, patch) | _clap_fields(shapes, width)
  return fields | known


def _predictor_fields(shapes, width: int, patch) -> dict:
  pixels = patch[0] * patch[1]
  out = shapes.get('decoder_pred.weight', (width,))[0]
  predict = 'pixels' if out == pixels and out != width else 'features'
  fields = {'predict': predict, 'mask_ratio': 0.75 if predict == 'pixels' else 0.7}
  if 'decoder_embed.weight' in shapes:
    narrow = shapes['decoder_embed.weight'][0]
    head_width = 64 if predict == 'pixels' else 32
    fields |= {'predictor_width': narrow, 'predictor_depth': _count(shapes, 'decoder_blocks'),
               'predictor_heads': max(1, narrow // head_width)}
  return fields


def _clap_fields(shapes, width: int) -> dict:
  semantic = 'audio_proj.sem_token' in shapes
  if not semantic and 'audio_proj.0.weight' not in shapes:
    return {'text_width': None}
  fields = {'text_width': width, 'text_projector': 'identity'}
  if 'text_proj.weight' in shapes:
    fields = {'text_width': shapes['text_proj.weight'][1], 'text_projector': 'linear'}
  elif 'text_proj.0.weight' in shapes:
    fields = {'text_width': shapes['text_proj.0.weight'][1], 'text_projector': 'mlp'}
  if semantic:
    hidden = shapes.get('audio_proj.sem_blocks.0.mlp.fc1.weight', (2 * width,))[0]
    fields |= {'audio_projector': 'semantic', 'semantic_depth': _count(shapes, 'audio_proj.sem_blocks'),
               'semantic_mlp_ratio': hidden / width}
  return fields


def text_encoder(letter: str, name: str | None, model: dict) -> dict | None:
  """The description of the captions' encoder, None without a CLAP head."""
  if model['text_width'] is None:
    return None
  known, pooling = TEXT_ENCODERS[letter]
  return {'name': str(name or known), 'pooling': pooling_of(name, pooling), 'hash': None, 'width': model['text_width']}


def _count(shapes, blocks: str) -> int:
  pattern = re.compile(re.escape(blocks) + r'\.(\d+)\.')
  return 1 + max((int(match[1]) for name in shapes if (match := pattern.match(name))), default=-1)


def _text_prefix(found) -> str:
  return next((name.removesuffix(BERT_MARK) for name in found if name.endswith(BERT_MARK)), '')


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
  in_place(path, write)
  return path
