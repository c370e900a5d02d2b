"""A small random model, and music for it."""
import numpy as np

from m2d_clap_jax import weights
from m2d_clap_jax.models import M2DCLAP
from m2d_clap_jax.weights import Weights
from tests import reference


def tiny_weights(seed=0, **changes):
  """A random model for crops of 96 frames; MiniLM's captions."""
  fields = dict(reference.TINY, norm_stats=(-7.1, 4.2), text_width=384) | changes
  rng = np.random.default_rng(seed)
  shapes = weights.expected_shapes(M2DCLAP(**fields))['params']
  params = {path: (0.2 if len(shape) > 1 else 0.02) * rng.standard_normal(shape).astype(np.float32)
            + (path.endswith('scale') and path != 'logit_scale') for path, shape in shapes.items()}
  encoder = {'name': 'minilm', 'pooling': 'mean', 'hash': None, 'width': fields['text_width']}
  return Weights(model=fields, trees={'params': params}, text_encoder=encoder, source='tiny')


def arpeggio(rate, shift=1.0, seconds=4):
  """Plucked notes with overtones, and a little noise."""
  time = np.arange(seconds * rate) / rate
  notes = sum(np.sin(2 * np.pi * 220 * shift * 2 ** (k / 3) * h * time) / h * (np.floor(time * 4) % 4 == k)
              for k in range(4) for h in range(1, 6))
  return (0.15 * notes + 0.005 * np.random.default_rng(1).standard_normal(len(time))).astype(np.float32)


def close(actual, expected, tolerance):
  difference = np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)
  assert difference <= tolerance, f'{difference:.1e}'
