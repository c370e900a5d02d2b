"""`m2d-clap info`: describes a model."""
import json

import numpy as np

from m2d_clap_jax.cli import model_options

# Parts of the parameters -> the modules that belong to them.
PARTS = {'encoder': ('patch_embed', 'cls_token', 'encoder'), 'predictor': ('predictor',),
         'clap_head': ('audio_proj', 'text_proj', 'logit_scale')}


def add_arguments(p):
  """Declares the model and the form of the description."""
  p.description = 'Describes a model: kind, sizes, parameters, input, statistics, text encoder, classes.'
  p.epilog = 'example:\n  m2d-clap info m2d_clap_vit_base-80x608p16x16-240128'
  p.add_argument('model', metavar='MODEL', help=model_options.KINDS)
  p.add_argument('--json', action='store_true', help='for programs: one JSON object')
  model_options.add_overrides(p)


def run(args):
  """Prints the description of the model."""
  from m2d_clap_jax.weights import read
  facts = describe(read(args.model, **model_options.overrides(args)))
  if args.json:
    print(json.dumps(facts, indent=2, ensure_ascii=False))
  else:
    width = max(map(len, facts))
    print('\n'.join(f'{_words(name):{width}}  {_text(name, value)}' for name, value in facts.items()))


def describe(weights) -> dict:
  """Weights -> JSON data, the most important first."""
  from m2d_clap_jax.audio import LogMel
  from m2d_clap_jax.weights import family
  network, (rows, columns) = weights.network(), weights.network().grid
  logmel = LogMel.for_rate(weights.sample_rate)
  return {
      'model': family(weights),
      'source': weights.source,
      'updates_made_here': weights.step,
      'parameters': {'total': weights.num_parameters} | _parts(weights),
      'encoder': {'width': network.width, 'blocks': network.depth, 'heads': network.heads},
      'sample_rate': weights.sample_rate,
      'norm_stats': {'mean': round(float(network.norm_stats[0]), 4),
                     'deviation': round(float(network.norm_stats[1]), 4)},
      'input': {'mel_bins': network.input_size[0], 'frames': network.input_size[1],
                'seconds': round(network.input_size[1] * logmel.hop / logmel.sample_rate, 3)},
      'patch': {'mel_bins': network.patch_size[0], 'frames': network.patch_size[1]},
      'grid': {'rows': rows, 'columns': columns},
      'clip_embedding': rows * network.width,
      'text_encoder': weights.text_encoder,
      'logit_scale': _logit_scale(weights),
      'classes': _classes(weights),
      'pretraining_can_continue': weights.complete,
      'fingerprint': weights.fingerprint}


def _parts(weights) -> dict:
  params = weights.trees['params']
  sizes = {part: sum(value.size for path, value in params.items() if path.partition('/')[0] in modules)
           for part, modules in PARTS.items()}
  for part, leaves in (('classifier', weights.trees.get('head')), ('target_not_in_total',
                       weights.trees.get('target')), ('text_encoder_not_in_total', weights.text)):
    sizes[part] = sum(np.size(value) for value in leaves.values()) if leaves else 0
  return {part: int(size) for part, size in sizes.items() if size}


def _logit_scale(weights) -> dict | None:
  """The CLAP head's logit scale; files for inference may lack it, as embeddings do not depend on it."""
  if weights.network().text_width is None:
    return None
  return {'value': round(float(weights.nested('params')['logit_scale']), 4), 'is_a_default': weights.default_logit_scale}


def _classes(weights) -> list | None:
  if 'head' not in weights.trees:
    return None
  return list(weights.classes or map(str, range(len(weights.trees['head']['bias']))))


def _text(name: str, value) -> str:
  """A value formatted for reading."""
  if value is None:
    return 'none'
  if isinstance(value, bool):
    return 'yes' if value else 'no'
  if isinstance(value, dict):
    return ', '.join(f'{_words(key)} {_text(key, each)}' for key, each in value.items() if each is not None)
  if name == 'classes':
    return f'{len(value)}: ' + ', '.join(value[:10]) + (', ...' if len(value) > 10 else '')
  return f'{value:,}' if isinstance(value, int) and value >= 100_000 else str(value)


def _words(key: str) -> str:
  return key.replace('_', ' ')
