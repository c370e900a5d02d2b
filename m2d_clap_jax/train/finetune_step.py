"""One fine-tuning update and the scoring of clips: pure functions from waves to losses and logits.

Alphabet: B batch, C classes, S samples, F mel bins, T frames.
"""
import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from m2d_clap_jax.audio.logmel import LogMel
from m2d_clap_jax.models.classifier import Classifier
from m2d_clap_jax.tasks.decoded import SCALE
from m2d_clap_jax.train import augment


@flax.struct.dataclass
class FinetuneState:
  """step: int32 updates done; params: encoder and head; stats: running statistics of the head's norm; opt_state: optax;
  rng: the run's key, never advanced: each step folds its number in."""
  step: jax.Array
  params: Any
  stats: Any
  opt_state: Any
  rng: jax.Array


@dataclasses.dataclass(frozen=True)
class Inputs:
  """Converts waves to the classifier's input: log-mels, standardised by norm_stats.

  last_patch: 'pad' pads the frames to whole patches; 'drop' leaves out those that do not fill a patch.
  zero_padded: beyond the end of a short clip its log-mel is 0 before standardisation, instead of that of silence.
  """
  logmel: LogMel
  norm_stats: tuple[float, float]
  patch: tuple[int, int]  # mel bins, frames
  last_patch: str = 'pad'
  zero_padded: bool = False

  def size(self, samples: int) -> tuple[int, int]:
    """(F, T) of the classifier's input for waves of this number of samples."""
    frames = self.logmel.num_frames(samples)
    return self.logmel.n_mels, frames + (-frames % self.patch[1] if self.last_patch == 'pad' else 0)

  def grid(self, samples: int) -> tuple[int, int]:
    """Patches along (frequency, time) for waves of this number of samples."""
    bins, frames = self.size(samples)
    return bins // self.patch[0], frames // self.patch[1]

  def shortest(self, samples: int) -> int:
    """The frames that silence fills up short clips to; 0 where something else does."""
    return 0 if self.zero_padded else self.logmel.num_frames(samples)

  def logmels(self, waves: jax.Array, lengths: jax.Array) -> jax.Array:
    """int16 [B, S], `lengths` [B] samples of clips followed by silence -> log-mels [B, F, T]."""
    x = waves.astype(jnp.float32) / SCALE
    if not self.zero_padded:
      return self.logmel.jax(x)
    # The clip's own last frames first: beyond its end it continues by reflection, as the log-mel of it alone does.
    place, last = jnp.arange(x.shape[1]), lengths[:, None] - 1
    x = jnp.take_along_axis(x, jnp.clip(jnp.where(place <= last, place, 2 * last - place), 0), axis=1)
    frames = self.logmel.num_frames(lengths)
    out = self.logmel.jax(x)
    return jnp.where(jnp.arange(out.shape[2]) < frames[:, None, None], out, 0)

  def standardised(self, logmel: jax.Array) -> jax.Array:
    return (logmel - self.norm_stats[0]) / self.norm_stats[1]

  def filled(self, x: jax.Array) -> jax.Array:
    """Pads [B, F, T] with 0, the mean, to whole patches, as inference does, unless the rest is to be dropped."""
    missing = -x.shape[2] % self.patch[1] if self.last_patch == 'pad' else 0
    return jnp.pad(x, ((0, 0), (0, 0), (0, missing)))


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """mixup: a of Beta(a, a), 0 for none; mixup_on: 'waves' or 'logmel'; spec_frequency, spec_time: widest masks in bins
  and frames, 0 for none; resize_crop: whether to apply it; patchout: share of the patches to drop."""
  mixup: float = 0.0
  mixup_on: str = 'waves'
  spec_frequency: int = 0
  spec_time: int = 0
  resize_crop: bool = False
  patchout: float = 0.0

  def __call__(self, key: jax.Array, batch: dict, inputs: Inputs, drop: tuple[int, int]):
    """batch as in `finetune_step` -> (input [B, F, T], targets [B, C], patches to keep int [B, K] or None)."""
    keys = jax.random.split(key, 4)
    waves, targets = batch['waves'], batch['targets']
    if self.mixup and self.mixup_on == 'waves':
      waves, targets = augment.mixup(keys[0], waves.astype(jnp.float32), targets, self.mixup)
    x = inputs.logmels(waves, batch['lengths'])
    if self.mixup and self.mixup_on == 'logmel':
      x, targets = augment.mixup(keys[0], x, targets, self.mixup)
    x = inputs.standardised(x)
    if self.spec_frequency or self.spec_time:
      x = augment.spec_augment(keys[1], x, self.spec_frequency, self.spec_time)
    if self.resize_crop:
      x = augment.resize_crop(keys[2], x)
    keep = None
    if self.patchout:
      keep = augment.structured_patchout(keys[3], len(x), inputs.grid(waves.shape[1]), drop)
    return inputs.filled(x), targets, keep


def create_state(seed: int, *, model: Classifier, tx: optax.GradientTransformation,
                 shape: tuple[int, int]) -> FinetuneState:
  """Initialises everything at random, from one seed; traceable. shape: (F, T) of an input."""
  rng, init = jax.random.split(jax.random.key(seed))
  variables = model.init(init, jnp.zeros((1, *shape)))
  params = variables['params']
  return FinetuneState(jnp.zeros((), jnp.int32), params, variables['batch_stats'], tx.init(params),
                       jax.random.key_data(rng))


def classification_loss(logits: jax.Array, targets: jax.Array, multi_label: bool) -> jax.Array:
  """Binary cross-entropy, or softmax cross-entropy with soft targets; both averaged over B and over C, as in EVAR."""
  if multi_label:
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, targets))
  return -jnp.mean(targets * jax.nn.log_softmax(logits))


def finetune_step(state: FinetuneState, batch, tables, *, model: Classifier, tx: optax.GradientTransformation,
                  inputs: Inputs, augmentation: Augmentation, multi_label: bool, drop: tuple[int, int] = (0, 0),
                  gather=None):
  """One update -> (state, {'loss', 'grad_norm'}).

  Args:
    batch: 'waves' int16 [B, S], 'lengths' int [B], their numbers of samples before the padding, and 'targets' float32
      [B, C].
    tables: the classifier's variables 'tables'.
    drop: numbers of rows and columns that structured patchout drops; it determines shapes, so each pair is compiled
      separately.
    gather: as in `step.pretrain_step`.
  """
  gather = gather or (lambda tree: tree)
  key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
  x, targets, keep = augmentation(key, batch, inputs, drop)

  def loss(params):
    variables = {'params': gather(params), 'batch_stats': state.stats, 'tables': tables}
    logits, new = model.apply(variables, x, keep, True, mutable=['batch_stats'])
    return classification_loss(logits, targets, multi_label), new['batch_stats']
  with precision(model):
    (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  state = state.replace(step=state.step + 1, params=optax.apply_updates(state.params, updates), stats=stats,
                        opt_state=opt_state)
  return state, {'loss': value, 'grad_norm': optax.tree.norm(grads)}


def score(params, stats, tables, waves, lengths, *, model: Classifier, inputs: Inputs,
          method: str = '__call__') -> jax.Array:
  """int16 waves [B, S], of which `lengths` [B] samples are not padding -> logits [B, C], without augmentation; with the
  method 'features' the head's input, [B, H]."""
  x = inputs.filled(inputs.standardised(inputs.logmels(waves, lengths)))
  with precision(model):
    return model.apply({'params': params, 'batch_stats': stats, 'tables': tables}, x, method=method)


def precision(model: Classifier):
  """A context for full-precision float32 matrix products, which accelerators would round to TF32 or bfloat16."""
  return jax.default_matmul_precision('highest' if model.pretrained.dtype == 'float32' else None)


def freezing(tx: optax.GradientTransformation, part: str) -> optax.GradientTransformation:
  """`tx`, except that parameters below `part` of 'network' never change, neither by gradient nor by weight decay."""
  def frozen(params):
    return {name: {key: jax.tree.map(lambda _, own=(name, key): own == ('network', part), leaves)
                   for key, leaves in tree.items()} for name, tree in params.items()}
  return optax.chain(tx, optax.masked(optax.set_to_zero(), frozen))
