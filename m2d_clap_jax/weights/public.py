"""The authors' checkpoints: reads the model from tensors and folder name, and writes files of the same format."""
import argparse
import datetime
import pathlib
import re
import sys
from typing import Any

import numpy as np

from m2d_clap_jax.errors import UserError, install
from m2d_clap_jax.paths import as_path
from m2d_clap_jax.weights.core import TEXT_ENCODERS, TEXT_PREFIX, Weights, check, pooling_of, size_name
from m2d_clap_jax.weights.files import in_place, read_tensors, text_prefix, unwrap, without_prefix
from m2d_clap_jax.weights.names import to_flax, to_torch

MEL_BINS = 80
NORM_STATS = (-7.1, 4.2)  # of AudioSet, which files without statistics were trained with
FINETUNED, RUNTIME = 'module.ar.runtime.backbone.', 'backbone.'  # prefixes of the encoder in files with head, with text


def read_public(path: pathlib.Path, overrides: dict) -> Weights:
  """A .pth or .safetensors file of any released family -> Weights; overrides as in `weights.read`.

  Tensors that do not belong to the model are ignored and listed in one line on standard error.
  """
  found = read_tensors(path)
  tensors, text, rest = unwrap(found)
  if not tensors:
    raise UserError(f'{path}: none of its {len(found)} tensors belongs to an M2D-CLAP, M2D or MSM-MAE model (the '
                    f'first is {next(iter(found), "missing")})')
  named = name_fields(path.parent.name)
  overrides = dict(overrides)
  sample_rate = overrides.pop('sample_rate', None) or named.pop('sample_rate', 16000)
  letter = named.pop('text_encoder', 'A')
  encoder = overrides.pop('text_encoder', None)
  trees = to_flax(tensors)
  model = infer_model(tensors, named | overrides, path)
  weights = Weights(model=model, trees=trees, sample_rate=sample_rate, text=text, source=str(path),
                    text_encoder=text_encoder(letter, encoder, model), text_prefix=text_prefix(found) or TEXT_PREFIX)
  check(weights)
  if rest:
    print(f'notice: {path}: ignored {len(rest)} tensors that do not belong to the model: {_grouped(rest)}',
          file=sys.stderr)
  return weights


def _grouped(names) -> str:
  """['to_spec.a', 'to_spec.b', 'x.y'] -> 'to_spec.* (2), x.y'."""
  groups: dict[str, list[str]] = {}
  for name in sorted(names):
    groups.setdefault(without_prefix(name).partition('.')[0], []).append(name)
  parts = [own[0] if len(own) == 1 else f'{group}.* ({len(own)})' for group, own in groups.items()]
  return ', '.join(parts[:8]) + (f', and {len(parts) - 8} more kinds' if len(parts) > 8 else '')


def name_fields(folder: str) -> dict:
  """Parses a checkpoint's folder name, as in 'm2d_clap_vit_base-80x608p16x16-240128' or '...-80x1001p16x16p16kpA'.

  Returns input_size, patch_size, sample_rate in Hz and the text encoder's letter, those that the name contains.
  """
  match = re.search(r'-(\d+)x(\d+)p(\d+)x(\d+)([^-]*)', folder)
  if not match:
    return {}
  fields: dict[str, Any] = {'input_size': (int(match[1]), int(match[2])), 'patch_size': (int(match[3]), int(match[4]))}
  for part in match[5].split('p'):
    if rate := re.fullmatch(r'(\d+)k', part):
      fields['sample_rate'] = 1000 * int(rate[1])
    if part in TEXT_ENCODERS:
      fields['text_encoder'] = part
  return fields


def infer_model(tensors: dict[str, np.ndarray], known: dict, path) -> dict:
  """Fields of `M2DCLAP` from shapes; `known` (from folder name and caller) decides where shapes are ambiguous."""
  shapes = {name: value.shape for name, value in tensors.items()}
  try:
    width = shapes['cls_token'][-1]
    kernel = shapes['patch_embed.proj.weight']
    patch = kernel[2], kernel[3]
    depth = _count(shapes, 'blocks')
  except (KeyError, IndexError):
    raise UserError(f'{path}: lacks cls_token or patch_embed.proj.weight, which every encoder has, or they are damaged'
                    ) from None
  if kernel[0] != width or not 0 < patch[0] <= MEL_BINS or not patch[1] or len(shapes) < 4 * depth:
    raise UserError(f'{path}: cls_token {shapes["cls_token"]}, patch_embed.proj.weight {kernel} and blocks up to number '
                    f'{depth - 1} do not form an encoder; copy or download the file again')
  if tuple(known.get('patch_size', patch)) != tuple(patch):
    raise UserError(f'{path}: its patches are {patch[0]}x{patch[1]}, but its folder (or the argument patch_size) says '
                    f'{known["patch_size"][0]}x{known["patch_size"][1]}: correct the name or the argument')
  fields = {'patch_size': tuple(patch), 'width': width, 'depth': depth, 'heads': max(1, width // 64)}
  if 'pos_embed' in shapes:
    rows = MEL_BINS // patch[0]
    fields['input_size'] = (MEL_BINS, (shapes['pos_embed'][1] - 1) // rows * patch[1])
  elif 'input_size' not in known:
    raise UserError(f'{path}: neither a position table nor its folder (as in m2d_vit_base-80x608p16x16) tells the '
                    'input size: give input_size=(80, FRAMES)')
  stats = tensors.get('norm_stats')
  if stats is not None and stats.shape != (2,):
    raise UserError(f'{path}: norm_stats has shape {stats.shape} instead of a mean and a deviation')
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
    hidden = shapes.get('audio_proj.sem_blocks.0.mlp.fc1.weight', (width,))[0]
    fields |= {'audio_projector': 'semantic', 'semantic_depth': _count(shapes, 'audio_proj.sem_blocks'),
               'semantic_mlp_ratio': hidden / width}
  return fields


def text_encoder(letter: str, name: str | None, model: dict) -> dict | None:
  """Description of the captions' encoder, None without a CLAP head."""
  if model['text_width'] is None:
    return None
  known, pooling = TEXT_ENCODERS[letter]
  return {'name': str(name or known), 'pooling': pooling_of(name, pooling), 'hash': None, 'width': model['text_width']}


def _count(shapes, blocks: str) -> int:
  pattern = re.compile(re.escape(blocks) + r'\.(\d{1,4})\.')
  return 1 + max((int(match[1]) for name in shapes if (match := pattern.match(name))), default=-1)


def public_tensors(weights: Weights) -> dict[str, np.ndarray]:
  """All tensors under their public names, including the fixed tables of public files."""
  complete = weights.with_tables()
  tensors = to_torch(complete.trees, complete.network().patch_size)
  wrapper = FINETUNED if 'head' in weights.trees else RUNTIME if weights.text else ''
  tensors = {name if name.startswith('module.head.') or name == 'logit_scale' else wrapper + name: value
             for name, value in tensors.items()}
  return tensors | {weights.text_prefix + name: value for name, value in weights.text.items()}


def model_name(weights: Weights) -> str:
  """The authors' name for this kind of model, as in 'm2d_clap_vit_base'."""
  network = weights.network()
  kind = 'm2d_clap' if network.text_width is not None else 'msm_mae' if network.predict == 'pixels' else 'm2d'
  size = size_name(network) or f'w{network.width}d{network.depth}'
  return f'{kind}_vit_{size}'


def checkpoint_folder(weights: Weights, day: datetime.date) -> str:
  """The authors' folder name, from which their tools read input size, patch size, rate and text encoder.

  Without letters they assume 16 kHz and GTE-base. 'p16k' is written whenever letters follow.
  """
  network = weights.network()
  letters = _letters(weights)
  rate = f'p{weights.sample_rate // 1000}k' if letters or weights.sample_rate != 16000 else ''
  return (f'{model_name(weights)}-{network.input_size[0]}x{network.input_size[1]}p{network.patch_size[0]}x'
          f'{network.patch_size[1]}{rate}{letters}-{day:%y%m%d}')


def _letters(weights: Weights) -> str:
  """'pBpTI' for a model with a BERT inside, 'pN' for one with NV-Embed-v2 captions, '' for GTE-base."""
  about = weights.text_encoder
  if not about:
    return ''
  if weights.text:  # a BERT of any name; the letter states its pooling
    return {'mean': 'pA', 'cls': 'pB'}.get(about['pooling'], '') + 'pTI'
  known = {name: letter for letter, (name, _) in TEXT_ENCODERS.items()}
  letter = known.get(about['name'], 'A')
  return '' if letter == 'A' else f'p{letter}'


def run_arguments(weights: Weights, epoch: int) -> argparse.Namespace:
  """The arguments of a checkpoint's run that the authors' tools read: plain values, as far as known here."""
  network, encoder = weights.network(), weights.text_encoder or {}
  return argparse.Namespace(
      model=model_name(weights), input_size=list(network.input_size), patch_size=list(network.patch_size),
      sample_rate=weights.sample_rate, norm_stats=list(network.norm_stats), mask_ratio=network.mask_ratio,
      decoder_depth=network.predictor_depth, text_encoder=encoder.get('name'), pooling=encoder.get('pooling'),
      epochs=epoch)


def save_pth(weights: Weights, folder, epoch: int = 0):
  """Writes FOLDER/m2d_clap_vit_base-80x608p16x16-YYMMDD/checkpoint-EPOCH.pth, which the authors' tools load -> its path.

  Entries: `model` and `epoch`; for a model that pre-training can continue from also `args`, see `run_arguments`.

  Raises:
    UserError: torch is not installed, or the folder cannot be written.
  """
  try:
    import torch
  except ImportError:
    raise UserError(f'writing .pth files needs PyTorch: {install("torch")}, or export a portable folder instead') from None
  tensors = {name: torch.from_numpy(np.array(value)) for name, value in public_tensors(weights).items()}
  path = as_path(folder) / checkpoint_folder(weights, datetime.date.today()) / f'checkpoint-{epoch}.pth'

  content = {'model': tensors, 'epoch': epoch}
  if weights.complete:  # torch's weights-only loading refuses a Namespace, so files for inference omit it
    content['args'] = run_arguments(weights, epoch)
  in_place(path, lambda temporary: torch.save(content, temporary))
  return path
