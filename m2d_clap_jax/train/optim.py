"""Schedules and optimizers. Schedules are functions of the step, 0 for the first update."""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


def warmup_cosine(peak: float, warmup_steps: float, total_steps: float, end: float = 0.0) -> optax.Schedule:
  """Linear warm-up from 0 to `peak`, then half a cosine to `end` at `total_steps` (M2D-CLAP's learning rate)."""
  return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, max(total_steps, warmup_steps + 1), end)


def cosine_behind_warmup(peak: float, warmup_steps: float, total_steps: float, end: float = 0.0) -> optax.Schedule:
  """Half a cosine from `peak` at step 0 to `end` at `total_steps`, whose first `warmup_steps` a line from 0 to `peak`
  hides (EVAR's fine-tuning).

  So the rate drops at the end of the warm-up, to the cosine's value there: 0.891 of the peak after 15 of 70 epochs.
  """
  warm = optax.linear_schedule(0.0, peak, warmup_steps)
  cosine = optax.cosine_decay_schedule(peak, total_steps, alpha=end / peak)
  return lambda step: jnp.where(step < warmup_steps, warm(step), cosine(step))


def warmup_notice(warmup_steps: float, total_steps: float) -> str:
  """What to report of a schedule that never reaches its peak; '' of others."""
  if 0 < total_steps <= warmup_steps:
    return (f'notice: the warm-up, {warmup_steps:g} steps, is no shorter than the run, {total_steps:g} steps: the learning '
            'rate never reaches its peak. Shorten the warm-up in config.schedule, or train for longer')
  return ''


def linear_ramp(start: float, end: float, total_steps: int) -> optax.Schedule:
  """From `start` at the first update to `end` at the last, in equal steps (the EMA decay)."""
  return optax.linear_schedule(start, end, max(total_steps - 1, 1))


def decays(params):
  """Which parameters weight decay applies to: matrices and tokens, not biases, norm scales or scalars."""
  return jax.tree.map(lambda p: p.ndim > 1, params)


def make_optimizer(learning_rate: optax.Schedule, *, b1: float = 0.9, b2: float = 0.95, weight_decay: float = 0.05,
                   clip_norm: float = 3.0) -> optax.GradientTransformation:
  """Pre-training: AdamW behind global-norm clipping (M2D-CLAP, section 3.1).

  The same as optax's, state included, with factors in place of divisions: XLA computes a quotient once and writes it to
  memory, where a product becomes part of the loop that needs it (docs/performance.md).
  """
  return optax.chain(
      clip_by_global_norm(clip_norm),
      optax.chain(scale_by_adam(b1, b2), optax.add_decayed_weights(weight_decay, decays),
                  optax.scale_by_learning_rate(learning_rate)))


def clip_by_global_norm(most: float) -> optax.GradientTransformation:
  """Multiplies the gradient by most / norm where its norm is larger than `most`."""
  def clip(grads, params):
    del params
    factor = most / jnp.maximum(optax.tree.norm(grads), most)
    return jax.tree.map(lambda g: factor * g, grads)
  return optax.stateless(clip)


def scale_by_adam(b1: float, b2: float, eps: float = 1e-8) -> optax.GradientTransformation:
  """mu_hat / (sqrt(nu_hat) + eps), the hats for moments whose bias is corrected."""
  def update(grads, state, params=None):
    del params
    count = state.count + 1
    mu = optax.tree.update_moment(grads, state.mu, b1, 1)
    nu = optax.tree.update_moment(grads, state.nu, b2, 2)
    return corrected(mu, nu, count, b1, b2, eps), optax.ScaleByAdamState(count, mu, nu)
  return optax.GradientTransformation(optax.scale_by_adam(b1, b2, eps).init, update)


def corrected(mu, nu, count: jax.Array, b1: float, b2: float, eps: float):
  """Adam's direction from its moments after `count` updates."""
  by_mu, by_nu = (1 / (1 - b ** count.astype(jnp.float32)) for b in (b1, b2))
  return jax.tree.map(lambda m, v: by_mu * m / (jnp.sqrt(by_nu * v) + eps), mu, nu)


def sgd(learning_rate: optax.Schedule, *, momentum: float = 0.9) -> optax.GradientTransformation:
  """Momentum SGD without weight decay, as torch.optim.SGD: v = momentum * v + g, p = p - learning_rate * v."""
  return optax.sgd(learning_rate, momentum=momentum)


def lars(learning_rate: optax.Schedule, *, momentum: float = 0.9, weight_decay: float = 0.0,
         trust_coefficient: float = 0.001) -> optax.GradientTransformation:
  """Layer-wise adaptive rates (You et al., arXiv 1708.03888, algorithm 1).

  The gradient of each matrix, plus weight_decay * p, is multiplied by trust_coefficient * |p| / (|g| + weight_decay *
  |p|) before rate and momentum. Biases, norm scales and scalars are neither adapted nor decayed, as is usual.
  """
  def adapt(grads, params):
    def one(g, p, decayed):
      if not decayed:
        return g
      p_norm, g_norm = jnp.linalg.norm(p), jnp.linalg.norm(g)
      trust = trust_coefficient * p_norm / jnp.maximum(g_norm + weight_decay * p_norm, 1e-12)
      return jnp.where((p_norm > 0) & (g_norm > 0), trust, 1.0) * (g + weight_decay * p)
    return jax.tree.map(one, grads, params, decays(params))
  # optax.lars divides by |g + weight_decay * p| instead, and applies the rate outside its momentum.
  return optax.chain(optax.stateless(adapt), optax.scale_by_learning_rate(learning_rate), optax.trace(momentum))


def amsgrad(learning_rate: optax.Schedule, *, b1: float = 0.9, b2: float = 0.95,
            weight_decay: float = 1e-4) -> optax.GradientTransformation:
  """AdamW that never forgets a large gradient, as torch.optim.AdamW(amsgrad=True): all parameters decay."""
  return optax.chain(scale_by_amsgrad(b1, b2), optax.add_decayed_weights(weight_decay),
                     optax.scale_by_learning_rate(learning_rate))


class AmsgradState(NamedTuple):
  """count: int32 updates; mu, nu: moments; largest: the largest `nu` so far, before its bias is corrected."""
  count: jax.Array
  mu: Any
  nu: Any
  largest: Any


def scale_by_amsgrad(b1: float, b2: float, eps: float = 1e-8) -> optax.GradientTransformation:
  """mu_hat / (sqrt(largest nu / (1 - b2^t)) + eps).

  optax's version uses the maximum of the bias-corrected moments, which the noisy first ones dominate; torch's uses that
  of the uncorrected moments.
  """
  def init(params):
    zeros = optax.tree.zeros_like(params)
    return AmsgradState(jnp.zeros((), jnp.int32), zeros, zeros, zeros)

  def update(grads, state, params=None):
    del params
    count = state.count + 1
    mu = optax.tree.update_moment(grads, state.mu, b1, 1)
    nu = optax.tree.update_moment(grads, state.nu, b2, 2)
    largest = jax.tree.map(jnp.maximum, state.largest, nu)
    return corrected(mu, largest, count, b1, b2, eps), AmsgradState(count, mu, nu, largest)
  return optax.GradientTransformation(init, update)


# For fine-tuning. EVAR's LARS adapts a layer only where its weight decay is not 0, and EVAR passes 0: in effect it ran
# plain momentum SGD.
FINE_TUNING = {'sgd': sgd, 'lars': lars, 'lars_as_run': sgd, 'adamw_amsgrad': amsgrad}
