"""Names and layouts of the public PyTorch checkpoints and of the Flax parameters, as one table for both directions.

A tensor of a public file has a flat name ('blocks.0.attn.qkv.weight'); here it has a tree and a path in it ('params',
'encoder/blocks_0/attn/qkv/kernel'). The trees:

  params: online network    target: moving average of the encoder    tables: fixed tables, unchanged
  head, head_stats: linear classifier of a fine-tuned model, and the running statistics of the BatchNorm before it

Layouts: linear weights [out, in] are transposed kernels; the patch embedding's convolution [D, 1, PF, PT] is the
matrix [PF * PT, D]; the rest is unchanged. Only shapes and names change, so a round trip is bit-identical.
"""
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

LEAVES = {'.weight': '/kernel', '.bias': '/bias'}
NORM_LEAVES = {'.weight': '/scale', '.bias': '/bias'}


class Rule(NamedTuple):
  """`name` and `path` are templates in which # stands for the number of a block."""
  name: str
  tree: str
  path: str


def _blocks(names: str, tree: str, path: str):
  for module in ('norm1', 'norm2'):
    yield from _leaves(f'{names}.#.{module}', tree, f'{path}blocks_#/{module}', NORM_LEAVES)
  for module in ('attn.qkv', 'attn.proj', 'mlp.fc1', 'mlp.fc2'):
    yield from _leaves(f'{names}.#.{module}', tree, f'{path}blocks_#/{module.replace(".", "/")}')


def _leaves(module: str, tree: str, path: str, leaves=LEAVES):
  for name, leaf in leaves.items():
    yield Rule(module + name, tree, path + leaf)


RULES = (
    Rule('cls_token', 'params', 'cls_token'),
    Rule('pos_embed', 'tables', 'pos_embed'),
    Rule('mask_token', 'params', 'predictor/mask_token'),
    Rule('decoder_pos_embed', 'tables', 'decoder_pos_embed'),
    Rule('norm_stats', 'tables', 'norm_stats'),
    Rule('logit_scale', 'params', 'logit_scale'),
    *_leaves('patch_embed.proj', 'params', 'patch_embed'),
    *_blocks('blocks', 'params', 'encoder/'),
    *_leaves('norm', 'params', 'encoder/norm', NORM_LEAVES),
    *_leaves('decoder_embed', 'params', 'predictor/embed'),
    *_blocks('decoder_blocks', 'params', 'predictor/transformer/'),
    *_leaves('decoder_norm', 'params', 'predictor/transformer/norm', NORM_LEAVES),
    *_leaves('decoder_pred', 'params', 'predictor/pred'),
    *_blocks('target_blocks', 'target', ''),
    *_leaves('target_norm', 'target', 'norm', NORM_LEAVES),
    *_leaves('audio_proj.0', 'params', 'audio_proj/fc1'),
    *_leaves('audio_proj.2', 'params', 'audio_proj/fc2'),
    Rule('audio_proj.sem_token', 'params', 'audio_proj/token'),
    *_blocks('audio_proj.sem_blocks', 'params', 'audio_proj/transformer/'),
    *_leaves('audio_proj.norm', 'params', 'audio_proj/transformer/norm', NORM_LEAVES),
    *_leaves('text_proj', 'params', 'text_proj'),
    *_leaves('text_proj.0', 'params', 'text_proj/fc1'),
    *_leaves('text_proj.2', 'params', 'text_proj/fc2'),
    # For fine-tuned models. The checkpoints wrap the encoder in one more module than the head.
    Rule('module.head.norm.running_mean', 'head_stats', 'mean'),
    Rule('module.head.norm.running_var', 'head_stats', 'var'),
    *_leaves('module.head.mlp.mlp.0', 'head', ''),
)


def _compiled(template: str) -> re.Pattern:
  return re.compile(re.escape(template).replace(r'\#', r'(\d+)'))


_TO_FLAX = [(_compiled(rule.name), rule.tree, rule.path.lstrip('/')) for rule in RULES]
_TO_TORCH = [(rule.tree, _compiled(rule.path.lstrip('/')), rule.name) for rule in RULES]


def flax_path(name: str) -> tuple[str, str] | None:
  """'blocks.0.attn.qkv.weight' -> ('params', 'encoder/blocks_0/attn/qkv/kernel'); None for an unknown name."""
  for pattern, tree, path in _TO_FLAX:
    if match := pattern.fullmatch(name):
      return tree, path.replace('#', match[1]) if match.groups() else path
  return None


def torch_name(tree: str, path: str) -> str | None:
  """('params', 'encoder/blocks_0/attn/qkv/kernel') -> 'blocks.0.attn.qkv.weight'; None for an unknown path."""
  for own_tree, pattern, name in _TO_TORCH:
    if own_tree == tree and (match := pattern.fullmatch(path)):
      return name.replace('#', match[1]) if match.groups() else name
  return None


def to_flax(tensors: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
  """Public names and layouts -> {tree: {path: array}}, as views where a transposition suffices.

  Raises:
    KeyError: a name that is not part of any model.
  """
  trees: dict[str, dict[str, np.ndarray]] = {}
  for name, value in tensors.items():
    place = flax_path(name)
    if place is None:
      raise KeyError(f'{name} is not a tensor of an M2D-CLAP, M2D or MSM-MAE model')
    tree, path = place
    value = np.asarray(value)
    if path.endswith('kernel'):
      value = value.reshape(value.shape[0], -1).T
    trees.setdefault(tree, {})[path] = value
  return trees


def to_torch(trees: Mapping[str, Mapping[str, np.ndarray]], patch_size: tuple[int, int]) -> dict[str, np.ndarray]:
  """The reverse of `to_flax`.

  Raises:
    KeyError: a path that has no public name.
  """
  tensors = {}
  for tree, leaves in trees.items():
    for path, value in leaves.items():
      name = torch_name(tree, path)
      if name is None:
        raise KeyError(f'{tree}/{path} has no name in a public checkpoint')
      value = np.asarray(value)
      if path.endswith('kernel'):
        value = value.T
      if name == 'patch_embed.proj.weight':
        value = value.reshape(-1, 1, *patch_size)
      tensors[name] = np.ascontiguousarray(value).reshape(value.shape)  # ascontiguousarray turns a scalar into [1]
  return tensors
