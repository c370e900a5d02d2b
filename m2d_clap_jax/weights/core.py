"""A model's weights and the description needed to use them, from any source."""
import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from m2d_clap_jax.audio import LogMel
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.models import M2DCLAP
from m2d_clap_jax.models.m2d_clap import LOGIT_SCALE_INIT, SIZES
from m2d_clap_jax.models.masking import num_visible, random_mask
from m2d_clap_jax.models.posemb import sincos_2d
from m2d_clap_jax.options import bind
from m2d_clap_jax.weights.description import check_network

# Letters in a folder's name -> the sentence encoder of its captions, and its pooling: the mean of all tokens, the
# first one ('cls') or the one that ends the text ('eos').
TEXT_ENCODERS = {
    'A': ('thenlper/gte-base', 'mean'), 'B': ('bert-base-uncased', 'cls'), 'C': ('openai/clip-vit-large-patch14', 'eos'),
    'E': ('bert-large-uncased', 'cls'), 'L': ('Alibaba-NLP/gte-large-en-v1.5', 'cls'),
    'M': ('answerdotai/ModernBERT-base', 'cls'), 'N': ('nvidia/NV-Embed-v2', 'eos'),
    'Q': ('Alibaba-NLP/gte-Qwen2-7B-instruct', 'eos'), 'R': ('roberta-base', 'cls')}
# Prefix of a text encoder's names in the authors' files.
TEXT_PREFIX = 'text_encoder.text_encoder.'
Trees = dict[str, dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Weights:
  """Weights under this package's names, and their description.

  model: fields of `M2DCLAP`.
  trees: {tree: {path: array}} as in weights/names.py; trees and parts that the source lacks are absent.
  sample_rate: Hz of the audio that log-mels are made of.
  text_encoder: {'name', 'pooling', 'hash', 'width'} of the captions' encoder; None without a CLAP head or where the
    source does not state it.
  classes: of a fine-tuned head, or None.
  labels: some of the clips that it was trained on, the most frequent first; () where the source does not state them.
  text, text_prefix: tensors of a text encoder that the source contains, and the prefix of their names in files.
  source: origin of the weights, for messages.
  step: number of updates made by a run of this package.
  padded_to: frames that shorter clips were padded to with silence in training; 0 where the source does not tell. The authors'
    data were padded, too, but their runtime does not pad, and their files follow it.
  """
  model: dict[str, Any]
  trees: Trees
  sample_rate: int = 16000
  text_encoder: dict | None = None
  classes: tuple[str, ...] | None = None
  labels: tuple[str, ...] = ()
  text: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  text_prefix: str = TEXT_PREFIX
  source: str = ''
  step: int = 0
  padded_to: int = 0

  def network(self, dtype: str = 'float32') -> M2DCLAP:
    return bind(M2DCLAP, self.model | {'dtype': dtype}, self.source)()

  @property
  def num_parameters(self) -> int:
    return sum(x.size for tree in ('params', 'head') for x in self.trees.get(tree, {}).values())

  @property
  def complete(self) -> bool:
    """Whether pre-training can continue from these weights: they include the predictor and, if the model has one, the
    target."""
    has_predictor = any(path.startswith('predictor/') for path in self.trees['params'])
    return has_predictor and (self.model.get('predict') == 'pixels' or 'target' in self.trees)

  @property
  def crop_seconds(self) -> float:
    """The longest clip that is one crop of the model."""
    logmel = LogMel.for_rate(self.sample_rate)
    return ((self.padded_to or self.network().input_size[1]) - 1) * logmel.hop / self.sample_rate

  @property
  def default_logit_scale(self) -> bool:
    """Whether the source has a CLAP head without its logit scale, which then has its value at the start of training.

    This is so for the authors' encoder-only and fine-tuned files. Embeddings do not depend on it.
    """
    return self.model.get('text_width', M2DCLAP.text_width) is not None and 'logit_scale' not in self.trees.get('params', {})

  @functools.cached_property
  def fingerprint(self) -> str:
    """First 16 hex digits of the SHA-256 over names and float32 bytes of the parameters used in inference."""
    network = self.network()
    fields = {name: getattr(network, name) for name in ('input_size', 'patch_size', 'heads', 'audio_projector')}
    digest = hashlib.sha256(json.dumps(fields).encode())
    trees = self.with_tables().trees
    for tree in ('params', 'tables', 'head', 'head_stats'):
      for path, value in sorted(trees.get(tree, {}).items()):
        if not path.startswith(('predictor/', 'decoder_')):
          digest.update(f'{tree}/{path}'.encode())
          digest.update(np.ascontiguousarray(value, np.float32).data)
    return digest.hexdigest()[:16]

  def nested(self, tree: str) -> dict:
    """A tree as nested float32 dicts for Flax, with the logit scale of `default_logit_scale`."""
    leaves = {path: np.asarray(value, np.float32) for path, value in self.trees.get(tree, {}).items()}
    if tree == 'params' and self.default_logit_scale:
      leaves['logit_scale'] = np.asarray(LOGIT_SCALE_INIT, np.float32)
    return traverse_util.unflatten_dict(leaves, sep='/')

  def with_tables(self) -> 'Weights':
    """These weights with the fixed tables of a public checkpoint: positions and normalisation statistics."""
    network = self.network()
    tables = {'norm_stats': np.asarray(network.norm_stats, np.float32),
              'pos_embed': sincos_2d(network.width, network.grid)[None]}
    if 'predictor/mask_token' in self.trees['params']:
      tables['decoder_pos_embed'] = sincos_2d(network.predictor_width, network.grid)[None]
    return dataclasses.replace(self, trees=self.trees | {'tables': tables | self.trees.get('tables', {})})

  def encoder_only(self) -> 'Weights':
    """These weights without predictor and target: half the size, for inference and fine-tuning."""
    trees = {
        tree: {path: value for path, value in leaves.items() if not path.startswith(('predictor/', 'decoder_'))}
        for tree, leaves in self.trees.items() if tree != 'target'}
    return dataclasses.replace(self, trees=trees)


def expected_shapes(network: M2DCLAP) -> dict[str, dict[str, tuple]]:
  """{'params': {path: shape}, 'target': {path: shape}} of a complete model; nothing is computed."""
  # One block of each kind is traced and represents the others, which makes loading a second faster.
  depths = {'encoder': network.depth, 'predictor': network.predictor_depth, 'audio_proj': network.semantic_depth}
  network = network.clone(depth=1, predictor_depth=1, semantic_depth=1)

  def make():
    mask = random_mask(jnp.zeros((1, network.num_patches)), num_visible(network.num_patches, network.mask_ratio))
    text = None if network.text_width is None else jnp.zeros((1, network.text_width))
    return network.init(jax.random.key(0), jnp.zeros((1, *network.input_size)), mask, text)
  params = jax.eval_shape(make)['params']
  shapes: dict[str, tuple[int, ...]] = {}
  for path, leaf in traverse_util.flatten_dict(params, sep='/').items():
    count = depths[path.partition('/')[0]] if 'blocks_0' in path else 1
    shapes |= {path.replace('blocks_0', f'blocks_{i}'): leaf.shape for i in range(count)}
  trees = {'params': shapes}
  if network.predict == 'features':
    trees['target'] = {path.removeprefix('encoder/'): shape for path, shape in shapes.items()
                       if path.startswith('encoder/')}
  return trees


def check(weights: Weights):
  """Raises UserError that lists missing, unknown and misshaped tensors.

  Predictor and target may be absent, each as a whole; without a predictor, the logit scale may be too.
  """
  network = weights.network()
  check_network(network, f'{weights.source}: ')
  # First the tables, from whose sizes all others follow: nothing of an absurd size is computed.
  _refuse(weights, misshaped=_misshaped(weights, {'tables': {
      'pos_embed': (1, 1 + network.num_patches, network.width),
      'decoder_pos_embed': (1, 1 + network.num_patches, network.predictor_width)}, 'params': {
          'cls_token': (1, 1, network.width), 'predictor/mask_token': (1, 1, network.predictor_width)}}))
  expected = expected_shapes(network)
  missing, extra = [], []
  for tree, shapes in expected.items():
    found = weights.trees.get(tree, {})
    absent = [path for path in shapes if path not in found]
    if tree == 'target' and not found:
      continue
    if not any(path.startswith('predictor/') for path in found):
      absent = [path for path in absent if not path.startswith('predictor/') and path != 'logit_scale']
    missing += [f'{tree}/{path}' for path in absent]
    extra += [f'{tree}/{path}' for path in found if path not in shapes]
  if weights.classes is not None:
    kernel = weights.trees.get('head', {}).get('kernel', np.zeros(()))
    # The mean patch, or the patches of a time column side by side.
    width = network.width * (1 if kernel.shape[:1] == (network.width,) else network.grid[0])
    head: dict[str, dict[str, tuple]] = {
        'head': {'kernel': (width, len(weights.classes)), 'bias': (len(weights.classes),)},
        'head_stats': {'mean': (width,), 'var': (width,)}}
    missing += [f'{tree}/{path}' for tree, shapes in head.items() for path in shapes if path not in weights.trees.get(tree, {})]
    expected |= head
  _refuse(weights, missing, extra, _misshaped(weights, expected))


def _misshaped(weights: Weights, expected: dict[str, dict[str, tuple]]) -> list[str]:
  found = {(tree, path): tuple(value.shape) for tree, leaves in weights.trees.items() for path, value in leaves.items()}
  return [f'{tree}/{path} {found[tree, path]} instead of {shape}' for tree, shapes in expected.items()
          for path, shape in shapes.items() if found.get((tree, path), shape) != shape]


def _refuse(weights: Weights, missing=(), extra=(), misshaped=()):
  if missing or extra or misshaped:
    parts = [f'{kind} ({len(names)}): {_listed(names)}' for kind, names in
             (('missing', missing), ('unknown', extra), ('of another shape', misshaped)) if names]
    raise UserError(f'{weights.source}: looks like {family(weights)}, but its tensors do not fit. ' + '; '.join(parts))


def family(weights: Weights) -> str:
  """The kind of model, in words."""
  model, params = weights.network(), weights.trees.get('params', {})
  size = size_name(model) or f'width {model.width}, {model.depth} blocks'
  if model.text_width is not None:
    kind = 'M2D-CLAP (2025)' if model.audio_projector == 'semantic' else 'M2D-CLAP'
  else:
    kind = 'MSM-MAE' if model.predict == 'pixels' else 'M2D'
  parts = [f'{kind} ({size}, {model.input_size[0]}x{model.input_size[1]}, patches '
           f'{model.patch_size[0]}x{model.patch_size[1]}, {weights.sample_rate // 1000} kHz)']
  if not any(path.startswith('predictor/') for path in params):
    parts.append('encoder only')
  if 'head' in weights.trees:
    parts.append('fine-tuned, with a head')
  if weights.text:
    parts.append('with its text encoder inside')
  return ', '.join(parts)


def size_name(network: M2DCLAP) -> str | None:
  """'tiny', 'small', 'base' or 'large' of a ViT with that width and depth; None of another."""
  return next((name for name, size in SIZES.items() if (size['width'], size['depth']) == (network.width, network.depth)), None)


def _listed(names, most: int = 8) -> str:
  return ', '.join(names[:most]) + (f', and {len(names) - most} more' if len(names) > most else '')


def overridden(weights: Weights, overrides: Mapping) -> Weights:
  """The weights with a caller's values in place of their own, as `weights.read` takes them; `network` reports unknown ones."""
  overrides = dict(overrides)
  sample_rate = overrides.pop('sample_rate', None) or weights.sample_rate
  name = overrides.pop('text_encoder', None)
  text_encoder = weights.text_encoder
  if name:
    pooling = pooling_of(name, (text_encoder or {}).get('pooling', 'mean'))
    text_encoder = {'name': str(name), 'pooling': pooling, 'hash': None,
                    'width': weights.model.get('text_width')}
  return dataclasses.replace(weights, model=weights.model | overrides, sample_rate=sample_rate,
                             text_encoder=text_encoder)


def pooling_of(name, otherwise: str) -> str:
  """The pooling of a text encoder's tokens into a sentence embedding, as known for the authors' encoders."""
  return dict(TEXT_ENCODERS.values()).get(str(name), otherwise)
