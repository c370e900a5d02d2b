"""Files of tensors: .pth by torch (weights alone, nothing in a file is executed) and .safetensors without it.

Memory is bounded by the size of the file: tensors of a .pth stay in it until they are used, and the sizes that its parts
claim are checked before anything is unpacked. bfloat16, which numpy lacks, becomes float32.
"""
import argparse
import itertools
import pathlib
import pickletools
import re
import zipfile

import numpy as np

from m2d_clap_jax.errors import UserError, install
from m2d_clap_jax.paths import as_path, local_copy, replacing, size
from m2d_clap_jax.weights.names import flax_path

# Prefixes of the encoder's names in public checkpoints: EVAR's wrapper, the runtime, its encoder.
PREFIX = re.compile(r'(module\.)?(ar\.)?(runtime\.)?(backbone\.)?')
WRAPPERS = ('model', 'state_dict')
# First name of a BERT's state dict; the text before it is the text encoder's prefix.
BERT_MARK = 'embeddings.word_embeddings.weight'
# Classes used to pickle tensors, as 'module name'.
OF_TENSORS = re.compile(r'collections OrderedDict|torch \w+Storage|torch\.storage \w+Storage|torch (Size|device|b?float\d+)|'
                        r'torch\._utils _rebuild_(tensor|tensor_v2|parameter)|(__builtin__|builtins) set')
# The arguments of a training run: plain values. Stored paths become pure paths, without access to a file system.
OF_ARGUMENTS = {'argparse Namespace': argparse.Namespace} | {
    f'{module} {name}': getattr(pathlib, 'Pure' + name.removeprefix('Pure'))
    for module, name in itertools.product(('pathlib', 'pathlib._local'), (
        'Path', 'PosixPath', 'WindowsPath', 'PurePath', 'PurePosixPath', 'PureWindowsPath'))}
# A tensor of one value can be broadcast to any shape without taking space in the file. All tensors together may exceed the
# file by this much, which is more than the largest model (ViT-Large, complete) needs.
SPREAD = 4 << 30


def read_tensors(path) -> dict[str, np.ndarray]:
  """A .pth or .safetensors file -> its tensors under the names in the file.

  Raises:
    UserError: missing, truncated, not a checkpoint, or with objects other than tensors and the arguments of a run.
  """
  path = as_path(path)
  if not path.is_file():
    raise UserError(f'{path}: no such file; give a checkpoint (.pth, .safetensors)')
  if not size(path):
    raise UserError(f'{path}: the file is empty (0 bytes); copy or download it again')
  with local_copy(path) as name:
    return _read_safetensors(path, name) if path.suffix == '.safetensors' else _read_pth(path, name)


def unwrap(tensors: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[str]]:
  """Tensors of a file -> (the audio model's under their plain names, those of an included text encoder, names of the
  rest)."""
  text = {}
  prefix = text_prefix(tensors)
  if prefix is not None:
    text = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    tensors = {name: value for name, value in tensors.items() if not name.startswith(prefix)}
  audio, rest = {}, []
  for name, value in tensors.items():
    plain = name if flax_path(name) else without_prefix(name).replace('decoder_blocks.layers.', 'decoder_blocks.')
    if flax_path(plain):
      audio[plain] = value
    else:
      rest.append(name)
  if not any(name.startswith('decoder_blocks.') for name in audio):  # an incomplete predictor is useless
    rest += [name for name in audio if name.startswith(('decoder_', 'mask_token'))]
    audio = {name: value for name, value in audio.items() if name not in rest}
  return audio, text, rest


def text_prefix(tensors) -> str | None:
  """The prefix of a BERT's names in a file; None without a BERT."""
  return next((name.removesuffix(BERT_MARK) for name in tensors if name.endswith(BERT_MARK)), None)


def without_prefix(name: str) -> str:
  """A tensor's name without what wrappers of the model put before it, such as module."""
  return PREFIX.sub('', name, count=1)


def _read_safetensors(path, name: str) -> dict[str, np.ndarray]:
  """path: for messages; name: of the local file."""
  from safetensors.numpy import load_file
  try:
    tensors = load_file(name)
  except Exception as error:  # each kind of damage raises a different exception
    raise _unreadable(path, '.safetensors file', error) from None
  return {name: value.astype(np.float32) if value.dtype.kind == 'V' else value for name, value in tensors.items()}


def _read_pth(path, name: str) -> dict[str, np.ndarray]:
  """path, name: as in `_read_safetensors`."""
  try:
    import torch
  except ImportError:
    raise UserError(f'{path}: reading .pth files needs PyTorch: {install("torch")}, or convert the file to .safetensors '
                    'elsewhere') from None
  try:
    others = _other_classes(name)
    if not others:
      allowed: list = [(cls, key.replace(' ', '.')) for key, cls in OF_ARGUMENTS.items()]
      with torch.serialization.safe_globals(allowed):
        content = torch.load(name, map_location='cpu', weights_only=True, mmap=True)
  except Exception as error:  # as above
    raise _unreadable(path, 'PyTorch checkpoint', error) from None
  if others:
    raise UserError(f'{path}: not opened because it contains {", ".join(others[:3])} beside tensors and the arguments of a '
                    'run, and such objects can run code; save only its state dict and try again')
  for key in WRAPPERS:
    if isinstance(content, dict) and isinstance(content.get(key), dict):
      content = content[key]
      break
  content = content if isinstance(content, dict) else {}
  tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, torch.Tensor)}
  if not tensors:
    raise UserError(f'{path}: contains no state dict of tensors, neither at the top level nor under {" or ".join(WRAPPERS)}')
  if sum(value.numel() * value.element_size() for value in tensors.values()) > size(path) + SPREAD:
    raise UserError(f'{path}: its tensors claim to be more than {SPREAD >> 30} GiB larger than the file, unlike any model')
  return {name: _to_numpy(value, torch) for name, value in tensors.items()}


def _other_classes(name: str) -> list[str]:
  """Classes in a .pth file that are not allowed; found without unpickling anything.

  Raises:
    Exception: the file is damaged, compressed, or of the format before PyTorch 1.6.
  """
  with zipfile.ZipFile(name) as archive:
    entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
      raise ValueError('its parts are compressed, which PyTorch does not do')
    if sum(entry.file_size for entry in entries) > size(name):
      raise ValueError('its parts claim to be larger than the file')
    content, = (entry for entry in entries if entry.filename.rpartition('/')[2] == 'data.pkl')
    found = [str(value) for opcode, value, _ in pickletools.genops(archive.read(content)) if opcode.name == 'GLOBAL']
  return sorted({each.replace(' ', '.') for each in found
                 if each not in OF_ARGUMENTS and not OF_TENSORS.fullmatch(each)})


def _to_numpy(tensor, torch) -> np.ndarray:
  tensor = tensor.detach()
  return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _unreadable(path, kind: str, error: Exception) -> UserError:
  return UserError(f'{path}: not a readable {kind} ({_first_line(error)}): is it cut off? Copy or download it again')


def _first_line(error) -> str:
  return str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__


def in_place(path, write):
  """Calls write(name of a local file), which then atomically becomes `path`."""
  try:
    with replacing(path) as name:
      write(name)
  except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
    raise UserError(f'{path}: cannot be written ({error}): choose another folder or free space') from error
