"""Names and layouts of the public PyTorch checkpoints and of our Flax parameters, as one table of rules."""
import re
from collections.abc import Mapping

import numpy as np
from flax import traverse_util

BLOCK = r'(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)'

# Torch module name -> (which tree, Flax module path). 'params' is the online network, 'target' the moving average.
MODULES = (
    (rf'blocks\.(\d+)\.{BLOCK}', 'params', r'encoder/blocks_\1/\2'),
    (r'norm', 'params', 'encoder/norm'),
    (rf'target_blocks\.(\d+)\.{BLOCK}', 'target', r'blocks_\1/\2'),
    (r'target_norm', 'target', 'norm'),
    (r'patch_embed\.proj', 'params', 'patch_embed'),
    (r'decoder_embed', 'params', 'predictor/embed'),
    (rf'decoder_blocks\.(\d+)\.{BLOCK}', 'params', r'predictor/transformer/blocks_\1/\2'),
    (r'decoder_norm', 'params', 'predictor/transformer/norm'),
    (r'decoder_pred', 'params', 'predictor/pred'),
    (r'audio_proj\.0', 'params', 'audio_proj/fc1'),
    (r'audio_proj\.2', 'params', 'audio_proj/fc2'),
    (r'text_proj', 'params', 'text_proj'),
)
LEAVES = {'cls_token': 'cls_token', 'mask_token': 'predictor/mask_token', 'logit_scale': 'logit_scale'}
# Computed or kept elsewhere: the sin-cos tables are fixed and norm_stats is a field of the model.
NOT_PARAMETERS = ('pos_embed', 'decoder_pos_embed', 'norm_stats')


def flax_path(name: str) -> tuple[str, str] | None:
  """'blocks.0.attn.qkv.weight' -> ('params', 'encoder/blocks_0/attn/qkv/kernel'); None for an unknown name."""
  if name in LEAVES:
    return 'params', LEAVES[name]
  module, _, leaf = name.rpartition('.')
  for pattern, tree, path in MODULES:
    match = re.fullmatch(pattern, module)
    if match:
      path = match.expand(path).replace('.', '/')
      is_norm = path.rpartition('/')[2].startswith('norm')
      return tree, f'{path}/{"bias" if leaf == "bias" else "scale" if is_norm else "kernel"}'
  return None


def to_flax(state_dict: Mapping[str, np.ndarray]) -> dict[str, dict]:
  """Converts arrays under the public names to {'params': tree, 'target': tree}.

  Linear weights [out, in] are transposed; the convolution [D, 1, PF, PT] becomes the matrix [PF * PT, D].

  Raises:
    KeyError: a name that is not part of the model.
  """
  trees = {'params': {}, 'target': {}}
  for name, value in state_dict.items():
    if name in NOT_PARAMETERS:
      continue
    place = flax_path(name)
    if place is None:
      raise KeyError(f'{name} is not a tensor of an M2D-CLAP, M2D or MSM-MAE model')
    tree, path = place
    value = np.asarray(value)
    if path.endswith('kernel'):
      value = value.reshape(value.shape[0], -1).T
    trees[tree][path] = value
  return {tree: traverse_util.unflatten_dict(leaves, sep='/') for tree, leaves in trees.items()}
