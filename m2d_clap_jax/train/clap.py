"""The driver of M2D-CLAP 2025's later stages: a text encoder and the audio projector learn on a finished audio encoder."""
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence

import jax
import numpy as np
import optax

from m2d_clap_jax import sharding
from m2d_clap_jax.data.batches import Tokens, TrainingBatches
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.eval.during_training import Evaluations, make_evaluators, project_text
from m2d_clap_jax.models import M2DCLAP
from m2d_clap_jax.models.classifier import position_table
from m2d_clap_jax.models.m2d_clap import HOW
from m2d_clap_jax.options import at_least_one, bind
from m2d_clap_jax.text import TextEncoder, TextTower
from m2d_clap_jax.train import faults
from m2d_clap_jax.train.augment import patchout_counts
from m2d_clap_jax.train.checkpoint import Checkpoints
from m2d_clap_jax.train.clap_step import AUDIO_ENCODER, ClapState, clap_loss, clap_step, create_state, variables
from m2d_clap_jax.train.loop import Every, create_or_restore, train
from m2d_clap_jax.train.optim import make_optimizer
from m2d_clap_jax.train.prepared_data import open_data
from m2d_clap_jax.train.pretrain import check_data, check_model, check_source, count_steps, describe, make_schedule
from m2d_clap_jax.train.start import like, merge
from m2d_clap_jax.weights import Weights, read
from m2d_clap_jax.workdir import own_workdir

PROJECTORS = 'new', 'init'


def run(config, workdir: str):
  """Trains as `config` (see configs/clap.py) says, or continues the run in `workdir`."""
  bind(clap, config.to_dict(), 'config', given=('workdir',))(workdir)


def clap(workdir: str, *, job: str, seed: int, init: str, train_audio: bool, projector: str, mask_ratio: float,
         data: dict, text: dict, batch_size: int, epochs: float, steps: int | None, model: dict, schedule: dict,
         optim: dict, loss: dict, mesh: dict, checkpoints: dict, stall_seconds: float, log_every: int, save_every: int,
         evals_every: int, evals: dict, wandb: str | None):
  """Every argument is a key of the configuration and explained there."""
  settings = {key: value for key, value in locals().items() if key != 'workdir'}
  at_least_one('config', batch_size=batch_size, log_every=log_every, save_every=save_every, evals_every=evals_every)
  at_least_one('config.loss', accumulate=loss.get('accumulate', 1))
  if not 0 <= mask_ratio < 1:
    raise UserError(f'config.mask_ratio={mask_ratio}: is a share, from 0 to below 1')
  if not init:
    raise UserError('config.init is empty: name the model whose audio encoder goes on, such as the run of pre-training')
  bind(clap_loss, loss, 'config.loss', given=('state', 'batch', 'keep', 'keys', 'model', 'tower', 'folders'))
  with faults.guards(stall_seconds) as guards, own_workdir(workdir) as workdir:
    found = bind(open_data, data, 'config.data', given=('captions',))(False)
    weights = read(init)
    saved = bind(Checkpoints, checkpoints, 'config.checkpoints', given=('workdir',))(workdir)
    before = saved.metadata()
    check_data(before and before | {'text_encoder': found.meta['text_encoder']}, found)  # captions are taken as texts
    check_source(dataclasses.replace(weights, text_encoder=None), found)
    text, dropout = dict(text), text.get('dropout', True)
    text.pop('dropout', None)
    tower = bind(make_tower, text, 'config.text', given=('weights', 'dtype'))(weights, model.get('dtype', 'float32'))
    network = bind(make_network, model, 'config.model', given=('weights', 'projector', 'text_width'))(
        weights, projector, tower.width)
    batches = TrainingBatches(
        found.split, frames=network.input_size[1], batch_size=batch_size, seed=seed, sizes=found.sizes,
        weights=found.weights, captions=Tokens(tower, 'few' if jax.process_count() == 1 else 'one'),
        part=(jax.process_index(), jax.process_count()))
    total = count_steps(steps, epochs, batches.order)
    learning_rate = bind(make_schedule, schedule, 'config.schedule', given=('batch_size', 'epoch', 'total'))(
        batch_size=batch_size, epoch=batches.order.epoch_clips / batch_size, total=total)
    tx = bind(make_optimizer, optim, 'config.optim', given=('learning_rate',))(learning_rate)
    create = functools.partial(create_state, seed, model=network, text_shapes=tower.params, pooler_shapes=tower.pooler,
                               tx=tx, train_audio=train_audio)
    shapes = jax.eval_shape(create)
    devices = bind(sharding.mesh_for, mesh, 'config.mesh', given=('parameters',))(
        sharding.count_elements((shapes.params, shapes.frozen)))
    sharding.check_batch(batch_size, devices, loss.get('accumulate', 1))
    evaluations = Evaluations(
        network, devices, found.split, make_evaluators(evals, found.folder.path), guards.watchdog, variables=variables,
        embed=functools.partial(embed_captions, network, devices, TextEncoder(tower)))
    guards.watchdog.beat('opening the data')
    state, meta = create_or_restore(saved, create, devices, settings)
    if not meta:
      state, taken = start_from(state, weights, network, tower, projector)
      if jax.process_index() == 0:
        print(taken, file=sys.stderr)
    guards.watchdog.beat('making or restoring the state')
    update = compiled(state, devices, lambda number: patchout_counts(network.grid, mask_ratio, batches.order.patchout(number)),
                      model=network.clone(platform=sharding.platform(devices)), tower=tower, tx=tx, dropout=dropout,
                      folders=found.labels, **loss)
    about = found.about(before) | {
        'settings': settings, 'model': model_fields(network), 'norm_stats': network.norm_stats,
        'text_encoder': {'name': tower.name, 'pooling': tower.pooling, 'hash': None, 'width': tower.width}}
    train(state, update, batches, workdir=workdir, saved=saved, guards=guards, mesh=devices, total=total,
          batch_size=batch_size, learning_rate=learning_rate, log_every=log_every, save_every=save_every,
          rows=meta.get('window', ()), actions=[Every(log_every, functools.partial(found.log_counts, batches.order)),
                                              Every(evals_every, evaluations.evaluate, at_start=True)],
          metadata=lambda: about, description=describe(network, found.split, state, devices, total),
          wandb=wandb, settings=settings)


def make_tower(weights: Weights, dtype: str, *, encoder: str = '', pooling: str = 'mean',
               max_length: int = 128) -> TextTower:
  """The text encoder that a run starts from: `encoder`, or, where that is empty, the one that the weights come with."""
  if encoder:
    return TextTower(encoder, pooling=pooling, max_length=max_length, dtype=dtype)
  about = weights.text_encoder
  if not about:
    raise UserError(f'config.text.encoder is empty, and {weights.source} does not tell a text encoder: name one')
  return TextTower(about['name'], pooling=about['pooling'], tensors=weights.text or None, max_length=max_length, dtype=dtype)


def make_network(weights: Weights, projector: str, text_width: int, *, frames: int | None = None,
                 semantic_depth: int = 1, semantic_mlp_ratio: float = 1.0, dtype: str = 'float32', remat: str = 'none') -> M2DCLAP:
  """The model of the weights for inputs of so many frames, with a new semantic projector or, as told, its own heads."""
  if projector not in PROJECTORS:
    raise UserError(f'config.projector={projector!r}: unknown; known: {", ".join(PROJECTORS)}')
  network = weights.network()
  network = network.clone(input_size=(network.input_size[0], frames or network.input_size[1]), dtype=dtype, remat=remat)
  if projector == 'new':
    network = network.clone(text_width=text_width, text_projector=None, audio_projector='semantic',
                            semantic_depth=semantic_depth, semantic_mlp_ratio=semantic_mlp_ratio)
  elif network.text_width != text_width:
    raise UserError(f"config.projector='init': {weights.source} has projectors for text embeddings "
                    + (f'{network.text_width} wide' if network.text_width else 'of no width: it has none')
                    + f" where the text encoder's are {text_width} wide: take 'new'")
  check_model(network)
  return network


def model_fields(network: M2DCLAP) -> dict:
  """The fields of a model, as JSON data."""
  return {field.name: getattr(network, field.name) for field in dataclasses.fields(network)
          if field.name not in ('parent', 'name', *HOW)}


def start_from(state: ClapState, weights: Weights, network: M2DCLAP, tower: TextTower,
               projector: str) -> tuple[ClapState, str]:
  """Puts encoders, and projectors where they are to go on, into a new state -> (state, what was taken, for people)."""
  parts = AUDIO_ENCODER + (('audio_proj', 'text_proj') if projector == 'init' else ())
  wanted = {path: value for path, value in weights.trees['params'].items() if path.partition('/')[0] in parts}
  tree = {**state.frozen, **state.params}
  text = {name: jax.tree.map(like, values, tree.pop(name)) for name, values in
          (('text_encoder', tower.params), ('text_pooler', tower.pooler)) if values}
  merged, taken, fresh = merge(tree, wanted, weights.source)
  merged |= text
  table = position_table(weights.network(), network.grid[1], weights.trees.get('tables', {}).get('pos_embed'))
  state = state.replace(params={name: merged[name] for name in state.params},
                        frozen={name: merged[name] for name in state.frozen},
                        tables={'pos_embed': like(table, state.tables['pos_embed'])})
  return state, (f'starts from {weights.source}: {", ".join(taken)}; text encoder {tower.name}'
                 + (f'; at random: {", ".join(name for name in fresh if name != "logit_scale")}' if fresh else ''))


def embed_captions(network: M2DCLAP, mesh, encoder: TextEncoder, state: ClapState, captions: Sequence[str]) -> np.ndarray:
  """Captions by both text encoder and projector of a state -> [n, E]; each process computes all of them by itself."""
  own = sharding.on_one_device(mesh, {'text_encoder': state.params['text_encoder'], 'variables': variables(state)})
  embedded = encoder.with_parameters(own['text_encoder'])(captions)
  return np.asarray(project_text(own['variables'], embedded, model=network))


def compiled(state: ClapState, mesh, drop_at: Callable[[int], tuple[int, int]], *, tx: optax.GradientTransformation,
             **options):
  """`clap_step` as an update of `train.loop`. drop_at: step from 0 -> rows and columns that the structured mask hides."""
  step = functools.partial(clap_step, tx=tx, gather=sharding.gather(mesh), **options)
  update = sharding.Jitted(step, mesh, static_argnames='drop', donate_argnums=0,
                           out_shardings=(sharding.of_state(state, mesh), sharding.replicated(mesh)))
  return lambda state, arrays, number: update(state, arrays, drop=drop_at(number))
