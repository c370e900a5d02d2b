"""Files of tensors: .pth by torch (weights alone, nothing in a file is executed) and .safetensors without it."""
import json
import pickle
import zipfile

import numpy as np

from m2d_clap_jax.errors import UserError
from m2d_clap_jax.paths import as_path, local_copy, replacing, size
from m2d_clap_jax.weights.names import flax_path

# What public checkpoints put in front of the encoder's names, the longest first.
PREFIXES = ('module.ar.runtime.backbone.', 'ar.runtime.backbone.', 'backbone.', 'module.')
WRAPPERS = ('model', 'state_dict')
# Buffers of the audio front end that a fine-tuned model was wrapped in: its settings are this package's own.
FRONT_END = 'module.ar.'
# How the state dict of a BERT begins; whatever stands before it is the text encoder's prefix.
BERT_MARK = 'embeddings.word_embeddings.weight'


def read_tensors(path) -> dict[str, np.ndarray]:
  """A .pth or .safetensors file -> its tensors under the names in the file.

  Raises:
    UserError: missing, truncated, not a checkpoint, or holding more than tensors.
  """
  path = as_path(path)
  if not path.is_file():
    raise UserError(f'{path}: no such file; give a checkpoint (.pth, .safetensors)')
  if not size(path):
    raise UserError(f'{path}: the file is empty (0 bytes); copy or download it again')
  with local_copy(path) as name:
    return _read_safetensors(path, name) if path.suffix == '.safetensors' else _read_pth(path, name)


def unwrap(tensors: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Tensors as found in a file -> (the audio model's under their plain names, a text encoder's that is inside)."""
  text = {}
  mark = next((name for name in tensors if name.endswith(BERT_MARK)), None)
  if mark is not None:
    prefix = mark.removesuffix(BERT_MARK)
    text = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    tensors = {name: value for name, value in tensors.items() if not name.startswith(prefix)}
  audio = {}
  for name, value in tensors.items():
    plain = _without_prefix(name)
    if flax_path(plain) or not plain.startswith(FRONT_END):
      audio[plain] = value
  return audio, text


def _without_prefix(name: str) -> str:
  if flax_path(name):
    return name
  return next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)
               and flax_path(name.removeprefix(prefix))), name)


def _read_safetensors(path, name: str) -> dict[str, np.ndarray]:
  """path: for messages; name: of the local file."""
  from safetensors import SafetensorError
  from safetensors.numpy import load_file
  try:
    return load_file(name)
  except (SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
    raise UserError(f'{path}: not a readable .safetensors file ({_first_line(error)}): is it cut off? Copy or download '
                    'it again') from None


def _read_pth(path, name: str) -> dict[str, np.ndarray]:
  """The same two."""
  try:
    import torch
  except ImportError:
    raise UserError(f"{path}: reading .pth files needs PyTorch: pip install -e '.[torch]', or convert the file "
                    'to .safetensors elsewhere') from None
  try:
    content = torch.load(name, map_location='cpu', weights_only=True)
  except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, KeyError, zipfile.BadZipFile) as error:
    if 'weights_only' in str(error) or 'Unsupported' in str(error):
      raise UserError(f'{path}: is no PyTorch checkpoint of plain tensors, and is not opened, because other objects '
                      'can run code; save its state dict alone and try again') from None
    raise UserError(f'{path}: not a readable PyTorch checkpoint ({_first_line(error)}): is it cut off? Copy or download '
                    'it again') from None
  for key in WRAPPERS:
    if isinstance(content, dict) and isinstance(content.get(key), dict):
      content = content[key]
      break
  if not isinstance(content, dict) or not any(isinstance(value, torch.Tensor) for value in content.values()):
    raise UserError(f'{path}: holds no state dict of tensors, neither by itself nor under {" or ".join(WRAPPERS)}')
  return {name: _to_numpy(value, torch) for name, value in content.items() if isinstance(value, torch.Tensor)}


def _to_numpy(tensor, torch) -> np.ndarray:
  tensor = tensor.detach()
  return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()  # numpy has no bfloat16


def _first_line(error) -> str:
  return str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__


def in_place(path, write):
  """Calls write(name of a local file), which becomes `path`: no half file ever stands under that name."""
  try:
    with replacing(path) as name:
      write(name)
  except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
    raise UserError(f'{path}: cannot be written ({error}): choose another folder or free space') from error
