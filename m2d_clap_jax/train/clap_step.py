"""One update of stage 2 of M2D-CLAP 2025 (arXiv 2503.22104): the text encoder and the audio projector learn by the
contrastive loss alone, on an audio encoder that stays as it is. Pure functions.

Alphabet: B batch, F mel bins, T frames, N patches, K patches kept, L tokens, D width, E embedding.
"""
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from m2d_clap_jax.models import M2DCLAP
from m2d_clap_jax.models.m2d_clap import LOGIT_SCALE_MAX
from m2d_clap_jax.train.augment import structured_patchout
from m2d_clap_jax.train.step import Batch, contrast, descend, in_parts

# (parameters, token ids, attention mask, keys [B] for dropout or None) -> sentence embeddings, see text.TextTower.
Tower = Callable[..., jax.Array]
AUDIO_ENCODER = 'cls_token', 'patch_embed', 'encoder'
TEXT_ENCODER = 'text_encoder', 'text_pooler'


@flax.struct.dataclass
class ClapState:
  """step: int32 updates done; params: what is trained, projectors, logit scale and 'text_encoder'; frozen: the audio
  encoder, unless it is trained too, and 'text_pooler', which embeds nothing; tables: fixed position table; opt_state:
  optax, of params alone; rng: the run's key, never advanced: each step folds its number in."""
  step: jax.Array
  params: Any
  frozen: Any
  tables: Any
  opt_state: Any
  rng: jax.Array


def create_state(seed: int, *, model: M2DCLAP, text_shapes: Any, tx: optax.GradientTransformation,
                 pooler_shapes: Any = None, train_audio: bool = False) -> ClapState:
  """Audio encoder and projectors at random, from one seed, and a text encoder of zeros: what the run starts from takes
  their place. Traceable. text_shapes, pooler_shapes: the text encoder's parameters and those of its pooling layer, see
  `text.TextTower`, or their shapes."""
  rng, init = jax.random.split(jax.random.key(seed))
  params = model.init(init, jnp.zeros((1, *model.input_size)), jnp.zeros((1, model.text_width)), method=_pair)['params']
  frozen = {} if train_audio else {name: params.pop(name) for name in AUDIO_ENCODER}
  if pooler_shapes:
    frozen['text_pooler'] = jax.tree.map(lambda x: jnp.zeros(x.shape), pooler_shapes)
  params |= {'logit_scale': jnp.float32(LOGIT_SCALE_MAX),
             'text_encoder': jax.tree.map(lambda x: jnp.zeros(x.shape), text_shapes)}
  tables = {'pos_embed': jnp.zeros((1, 1 + model.num_patches, model.width))}
  return ClapState(jnp.zeros((), jnp.int32), params, frozen, tables, tx.init(params), jax.random.key_data(rng))


def _pair(model: M2DCLAP, logmel, text):
  """Touches every parameter that stage 2 has: for `init`."""
  return model.project_audio(model.encode(logmel)), model.project_text(text)


def variables(state: ClapState) -> dict[str, Any]:
  """All that the audio side and the projectors are applied with."""
  params = {**state.frozen, **state.params}
  return {'params': {name: tree for name, tree in params.items() if name not in TEXT_ENCODER}, 'tables': state.tables}


def clap_loss(state: ClapState, batch: Batch, keep: jax.Array | None, keys: jax.Array | None, *, model: M2DCLAP,
              tower: Tower, accumulate: int = 1, folders: Sequence[str] = ()):
  """Contrastive loss over the whole batch -> (loss, what is logged).

  Args:
    batch: 'logmel' [B, F, T] raw, 'ids' and 'mask' int [B, L].
    keep: int [B, K], patches that the audio encoder sees; None: all.
    keys: [B] for the text encoder's dropout; None: no dropout.
    accumulate: number of parts that the batch is computed in, to save memory; the result does not change.
    folders: as in `step.contrast`.
  """
  own, text_params = variables(state), state.params['text_encoder']

  def encode(logmel, keep):
    return model.apply(own, logmel, keep=keep, method='encode')

  def embed(ids, mask, keys):
    return tower(text_params, ids, mask, keys)
  z = in_parts(encode, accumulate, batch['logmel'], keep)  # B K D; of a frozen encoder nothing else is kept
  audio = in_parts(lambda z: model.apply(own, z, method='project_audio'), accumulate, z)
  text = in_parts(embed, accumulate, batch['ids'], batch['mask'], keys)
  text = model.apply(own, text, method='project_text')
  loss, metrics = contrast(audio, text, state.params['logit_scale'], batch, folders)
  return loss, metrics | {'loss': loss}


def clap_step(state: ClapState, batch: Batch, *, model: M2DCLAP, drop: tuple[int, int] = (0, 0), dropout: bool = True,
              **options) -> tuple[ClapState, dict[str, jax.Array]]:
  """One update -> (state, metrics, as `train.log.RunningMetrics` takes them).

  Args:
    drop: how many rows and columns of patches the structured mask hides; static, as in `finetune_step`.
    dropout: whether the text encoder's is on.
    options: of `apply_gradients`.
  """
  mask, dropped = jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step))
  size = batch['logmel'].shape[0]
  keep = structured_patchout(mask, size, model.grid, drop) if any(drop) else None
  keys = jax.random.split(dropped, size) if dropout else None
  return apply_gradients(state, batch, keep, keys, model=model, **options)


def apply_gradients(state: ClapState, batch: Batch, keep, keys, *, tx: optax.GradientTransformation, gather=None,
                    **loss_options):
  """`clap_step` with the patches and the keys of dropout given. gather: as in `step.pretrain_step`."""
  gather = gather or (lambda tree: tree)

  def loss(params):
    return clap_loss(state.replace(params=gather(params), frozen=gather(state.frozen)), batch, keep, keys, **loss_options)
  grads, metrics = jax.grad(loss, has_aux=True)(state.params)
  state, of_optimizer = descend(state, grads, tx)
  return state, metrics | of_optimizer
