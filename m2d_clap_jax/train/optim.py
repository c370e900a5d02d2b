"""Optimizers."""
import jax
import optax

from m2d_clap_jax.train.schedule import Schedule


def decays(params):
  """Which parameters weight decay applies to: matrices and tokens, not biases, norm scales or scalars."""
  return jax.tree.map(lambda p: p.ndim > 1, params)


def make_optimizer(learning_rate: Schedule, *, b1: float = 0.9, b2: float = 0.95, weight_decay: float = 0.05,
                   clip_norm: float = 3.0) -> optax.GradientTransformation:
  """AdamW behind global-norm clipping (M2D-CLAP, section 3.1)."""
  return optax.chain(
      optax.clip_by_global_norm(clip_norm),
      optax.adamw(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=decays))
