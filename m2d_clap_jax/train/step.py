"""The pre-training state and its update: pure functions; drivers jit, donate and shard them."""
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from m2d_clap_jax import losses
from m2d_clap_jax.models import M2DCLAP
from m2d_clap_jax.models.m2d_clap import LOGIT_SCALE_MAX
from m2d_clap_jax.models.masking import Mask, num_visible, random_mask

Batch = Mapping[str, jax.Array]


@flax.struct.dataclass
class TrainState:
  """step: int32 updates done; params: online network; target_params: moving average of the encoder (empty for
  MSM-MAE); opt_state: optax; rng: the run's key, never advanced: each step folds its number in."""
  step: jax.Array
  params: Any
  target_params: Any
  opt_state: Any
  rng: jax.Array


def create_state(seed: int, *, model: M2DCLAP, tx: optax.GradientTransformation) -> TrainState:
  """Initialises everything from one seed; traceable, so that drivers can create the state already sharded.

  The target encoder starts from its own random initialisation, as in the authors' public implementation.
  """
  rng, online_key, target_key = jax.random.split(jax.random.key(seed), 3)
  logmel = jnp.zeros((1, *model.input_size))
  mask = random_mask(jnp.zeros((1, model.num_patches)), num_visible(model.num_patches, model.mask_ratio))
  text = None if model.text_width is None else jnp.zeros((1, model.text_width))
  params = model.init(online_key, logmel, mask, text)['params']
  target_params = {}
  if model.predict == 'features':
    tokens = jnp.zeros((1, 2, model.width))
    target_params = model.transformer().init(target_key, tokens)['params']
  return TrainState(jnp.zeros((), jnp.int32), params, target_params, tx.init(params), jax.random.key_data(rng))


def draw_mask(rng: jax.Array, step: jax.Array, batch_size: int, *, model: M2DCLAP) -> Mask:
  """The mask of update `step`: a function of the run's key and the step number, so a resumed run draws the same mask."""
  key = jax.random.fold_in(jax.random.wrap_key_data(rng), step)
  noise = jax.random.uniform(key, (batch_size, model.num_patches))
  return random_mask(noise, num_visible(model.num_patches, model.mask_ratio))


def masked_losses(params, target_params, logmel, mask, *, model: M2DCLAP):
  """Masked-prediction loss (scalar) and CLAP audio embeddings [B, E] (None without a CLAP head)."""
  out = model.apply({'params': params}, logmel, mask, method='online')
  if model.predict == 'pixels':
    return losses.pixel_loss(out.prediction, out.masked_patches), out.audio
  tokens = jax.lax.stop_gradient(out.masked_tokens)
  target = model.transformer().apply({'params': target_params}, tokens)[:, 1:]
  return losses.m2d_loss(out.prediction, target), out.audio


def in_parts(function, parts: int, *arrays):
  """Maps `function` over `parts` equal parts of the batch sequentially, without keeping activations.

  Differentiating through this is gradient accumulation: each part is recomputed in the backward pass, and losses of the
  joined outputs, such as the contrastive loss, still see the whole batch. Part i takes every
  parts-th sample, so that a batch sharded over devices stays sharded in the same way.

  Of what `function` returns, scalars are averaged over the parts and arrays joined along their first axis.
  """
  if parts == 1:
    return function(*arrays)

  def split(x):
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

  def join(x):
    return jnp.mean(x) if x.ndim == 1 else x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
  return jax.tree.map(join, jax.lax.map(lambda xs: jax.checkpoint(function)(*xs), jax.tree.map(split, arrays)))


def contrast(audio: jax.Array, text: jax.Array, logit_scale: jax.Array, batch: Batch,
             folders: Sequence[str]) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Contrastive loss of paired embeddings [B, E] of the whole batch, and what is logged of it.

  folders: names of those that the batch is mixed from, whose numbers are its 'folder' int [B]. Each has its own loss in
  the log: sum and number of its pairs, compared with all of the batch.
  """
  loss, logits = losses.clip_loss(audio, text, logit_scale)
  diagonal = jnp.arange(logits.shape[0])
  metrics = {'loss_clap': loss,
             'retrieval_audio_to_text': jnp.mean(jnp.argmax(logits, axis=1) == diagonal),
             'retrieval_text_to_audio': jnp.mean(jnp.argmax(logits, axis=0) == diagonal)}
  if folders:
    each = 0.5 * sum(losses.cross_entropies(logits))
    own = batch['folder'] == jnp.arange(len(folders))[:, None]  # folders, B
    sums = jnp.stack([jnp.where(own, each, 0).sum(1), own.sum(1)], axis=1)
    metrics |= {f'loss_clap/{name}': pair for name, pair in zip(folders, sums)}
  return loss, metrics


def pretrain_loss(params, target_params, batch: Batch, mask: Mask, *, model: M2DCLAP, m2d_weight: float = 1.0,
                  clap_weight: float = 0.01, accumulate: int = 1, folders: Sequence[str] = ()):
  """L = m2d_weight * L_m2d + clap_weight * L_clap (M2D-CLAP, equation 3) and its parts.

  Args:
    batch: 'logmel' [B, F, T] raw and, with a CLAP head, 'text' [B, C] caption embeddings.
    accumulate: number of parts in which the batch is computed, to save memory; the result does not change.
    folders: as in `contrast`.
  """
  def forward(logmel, mask):
    return masked_losses(params, target_params, logmel, mask, model=model)
  masked, audio = in_parts(forward, accumulate, batch['logmel'], mask)
  loss = m2d_weight * masked
  metrics = {'loss_m2d': masked}
  if audio is not None:
    text = model.apply({'params': params}, batch['text'], method='project_text')
    clap, of_clap = contrast(audio, text, params['logit_scale'], batch, folders)
    loss += clap_weight * clap
    metrics |= of_clap
  return loss, metrics | {'loss': loss}


def clip_logit_scale(params):
  """Keeps the contrastive temperature in [0, log 100]."""
  if 'logit_scale' not in params:
    return params
  return {**params, 'logit_scale': jnp.clip(params['logit_scale'], 0.0, LOGIT_SCALE_MAX)}


def descend(state, grads, tx: optax.GradientTransformation):
  """The optimizer's step -> (state, what is logged of it); then the logit scale is clipped. Of any state that has step,
  params and opt_state."""
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = clip_logit_scale(optax.apply_updates(state.params, updates))
  metrics = {'grad_norm': optax.tree.norm(grads)}
  if 'logit_scale' in params:
    metrics['logit_scale'] = params['logit_scale']
  return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics


def pretrain_step(state: TrainState, batch: Batch, *, model: M2DCLAP, tx: optax.GradientTransformation,
                  ema_schedule: optax.Schedule, gather=None, **loss_options) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update of the online network by gradient and of the target network by moving average.

  Returns the new state and metrics, as `train.log.RunningMetrics` takes them. `gather` gathers parameters that are
  divided over devices (see `sharding.gather`); `loss_options` are those of `pretrain_loss`.
  """
  mask = draw_mask(state.rng, state.step, batch['logmel'].shape[0], model=model)
  return apply_gradients(state, batch, mask, model=model, tx=tx, ema_schedule=ema_schedule, gather=gather,
                         **loss_options)


def apply_gradients(state: TrainState, batch: Batch, mask: Mask, *, model: M2DCLAP, tx: optax.GradientTransformation,
                    ema_schedule: optax.Schedule, gather=None, **loss_options):
  """`pretrain_step` with the mask given."""
  gather = gather or (lambda tree: tree)

  def loss(params):
    return pretrain_loss(gather(params), gather(state.target_params), batch, mask, model=model, **loss_options)
  grads, metrics = jax.grad(loss, has_aux=True)(state.params)
  decay = ema_schedule(state.step)
  state, of_optimizer = descend(state, grads, tx)
  target_params = jax.tree.map(lambda t, p: decay * t + (1 - decay) * p, state.target_params,
                               state.params['encoder'] if state.target_params else {})
  return state.replace(target_params=target_params), metrics | of_optimizer | {'ema_decay': decay}
