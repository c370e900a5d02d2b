"""What a run has trained as plain weights, for inference and export."""
import numpy as np
from flax import traverse_util

from m2d_clap_jax import fields
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.models import M2DCLAP
from m2d_clap_jax.models.classifier import Classifier
from m2d_clap_jax.models.m2d_clap import HOW
from m2d_clap_jax.paths import is_remote
from m2d_clap_jax.text.flax_bert import to_torch
from m2d_clap_jax.train.checkpoint import read_parameters
from m2d_clap_jax.weights import description
from m2d_clap_jax.weights.core import Weights, check, pooling_of


def read_run(workdir) -> Weights:
  """Weights of the newest checkpoint in the workdir of a run of pre-training or of a stage after it, which has a text
  encoder of its own; UserError where there is none."""
  step, arrays, meta = read_parameters(workdir if is_remote(workdir) else workdir.resolve())
  if 'norm_stats' not in meta:
    raise UserError(f'{workdir}: is a fine-tuning run; its classifier is in {workdir / "best"}')
  fields.check(meta, description.RUN, f'{workdir}, step {step}: ', 'its description is damaged: use another run')
  model = {key: tuple(value) if isinstance(value, list) else value
           for key, value in meta.get('model', meta['settings']['model']).items()
           if key not in (*HOW, 'scan')}  # which earlier versions had
  model['norm_stats'] = tuple(meta['norm_stats'])
  encoder = meta['text_encoder']
  if model['text_width'] is None:
    encoder = None
  params = {**arrays.get('frozen', {}), **arrays['params']}
  text = params.pop('text_encoder', {}) | params.pop('text_pooler', {})
  trees = {tree: _flat(leaves)
           for tree, leaves in (('params', params), ('target', arrays.get('target_params')), ('tables', arrays.get('tables')))
           if leaves}
  weights = Weights(model=model, trees=trees, sample_rate=meta['logmel']['sample_rate'], text=to_torch(text),
                    text_encoder=encoder and {'pooling': _pooling(encoder), **encoder}, source=str(workdir), step=step,
                    padded_to=model.get('input_size', M2DCLAP.input_size)[1],
                    labels=tuple(meta.get('data', {}).get('labels', ())))
  check(weights)
  return weights


def _pooling(encoder: dict) -> str:
  """Of captions that were embedded before training: by preparation the mean, elsewhere what is known of the encoder."""
  return 'mean' if encoder['hash'] else pooling_of(encoder['name'], 'mean')


def classifier_weights(classifier: Classifier, params, stats, *, table: np.ndarray, sample_rate: int,
                       classes: tuple[str, ...], source: str = '', step: int = 0, padded_to: int = 0) -> Weights:
  """A trained classifier as Weights with a head. params, stats: 'params' and 'batch_stats'; table [1, 1 + N, D]."""
  network = classifier.pretrained
  names = ('input_size', 'patch_size', 'width', 'depth', 'heads', 'norm_stats', 'predict')
  trees = {'params': params['network'], 'head': params['head'], 'head_stats': stats['head_norm'],
           'tables': {'pos_embed': table}}
  flat = {tree: _flat(leaves) for tree, leaves in trees.items()}
  return Weights(model={name: getattr(network, name) for name in names} | {'text_width': None}, trees=flat,
                 sample_rate=sample_rate, classes=tuple(classes), source=source, step=step, padded_to=padded_to)


def classifier_variables(weights: Weights) -> tuple[dict, dict, dict]:
  """The reverse: a classifier's variables 'params', 'batch_stats' and 'tables'."""
  return ({'network': weights.nested('params'), 'head': weights.nested('head')},
          {'head_norm': weights.nested('head_stats')},
          {'network': {'pos_embed': weights.nested('tables')['pos_embed']}})


def _flat(tree) -> dict[str, np.ndarray]:
  """A nested tree as {path: array}, as in `Weights.trees`."""
  return {path: np.asarray(value) for path, value in traverse_util.flatten_dict(tree, sep='/').items()}
