"""Schedules: functions of the step (0 for the first update), usable inside jit."""
from collections.abc import Callable

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array | int], jax.Array]


def warmup_cosine(peak: float, warmup_steps: float, total_steps: float, end: float = 0.0) -> Schedule:
  """Linear warm-up from 0 to `peak`, then half a cosine to `end` at `total_steps` (M2D-CLAP's learning rate)."""
  def schedule(step):
    step = jnp.asarray(step, jnp.float32)
    warm = peak * step / jnp.maximum(warmup_steps, 1e-9)
    progress = jnp.clip((step - warmup_steps) / jnp.maximum(total_steps - warmup_steps, 1e-9), 0.0, 1.0)
    return jnp.where(step < warmup_steps, warm, end + (peak - end) * 0.5 * (1 + jnp.cos(jnp.pi * progress)))
  return schedule


def cosine_behind_warmup(peak: float, warmup_steps: float, total_steps: float, end: float = 0.0) -> Schedule:
  """Half a cosine from `peak` at step 0 to `end` at `total_steps`, whose first `warmup_steps` a line from 0 to `peak`
  hides (EVAR's fine-tuning).

  So the rate drops at the end of the warm-up, to the cosine's value there: 0.891 of the peak after 15 of 70 epochs.
  """
  def schedule(step):
    step = jnp.asarray(step, jnp.float32)
    warm = peak * step / jnp.maximum(warmup_steps, 1e-9)
    progress = jnp.clip(step / max(total_steps, 1e-9), 0.0, 1.0)
    return jnp.where(step < warmup_steps, warm, end + (peak - end) * 0.5 * (1 + jnp.cos(jnp.pi * progress)))
  return schedule


def warmup_notice(warmup_steps: float, total_steps: float) -> str:
  """What to tell of a schedule that never reaches its peak; '' of others."""
  if 0 < total_steps <= warmup_steps:
    return (f'notice: the warm-up, {warmup_steps:g} steps, is no shorter than the run, {total_steps:g} steps: the learning '
            'rate never reaches its peak. Shorten the warm-up in config.schedule, or train for longer')
  return ''


def linear_ramp(start: float, end: float, total_steps: int) -> Schedule:
  """From `start` at the first update to `end` at the last, in equal steps (the EMA decay)."""
  def schedule(step):
    return start + (end - start) * jnp.asarray(step, jnp.float32) / max(total_steps - 1, 1)
  return schedule
