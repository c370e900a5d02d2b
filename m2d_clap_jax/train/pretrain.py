"""The pre-training driver: from a configuration and a data folder to checkpoints, logs and figures."""
import functools
import sys
from collections.abc import Callable

import jax
import numpy as np

from m2d_clap_jax import sharding
from m2d_clap_jax.audio import LogMel
from m2d_clap_jax.data.authors import Dictionaries
from m2d_clap_jax.data.batches import TrainingBatches, crop, embeddings
from m2d_clap_jax.data.order import Order
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.eval import plots
from m2d_clap_jax.eval.during_training import Evaluations, make_evaluators
from m2d_clap_jax.models import M2DCLAP
from m2d_clap_jax.models.masking import as_bool, num_visible
from m2d_clap_jax.options import at_least_one, bind
from m2d_clap_jax.train import faults
from m2d_clap_jax.train.checkpoint import Checkpoints, abstract
from m2d_clap_jax.train.fitting import Given, Plan, fit, plans
from m2d_clap_jax.train.loop import Every, create_or_restore, train
from m2d_clap_jax.train.optim import linear_ramp, make_optimizer, warmup_cosine, warmup_notice
from m2d_clap_jax.train.prepared_data import PreparedData, open_data
from m2d_clap_jax.train.same_data import check_parts, refuse_other
from m2d_clap_jax.train.start import start_from
from m2d_clap_jax.train.step import create_state, draw_mask, pretrain_loss, pretrain_step
from m2d_clap_jax.weights import Weights, read
from m2d_clap_jax.weights.description import check_network
from m2d_clap_jax.workdir import own_workdir


def run(config, workdir: str, dry_run: bool = False):
  """Pre-trains as `config` (see configs/pretrain.py) says, or continues the run in `workdir`."""
  settings = config.to_dict()
  bind(pretrain, settings, 'config', given=('workdir', 'dry_run'))(workdir, dry_run=dry_run)


def pretrain(workdir: str, *, dry_run: bool = False, job: str, seed: int, init: str, data: dict, batch_size: int, epochs: float,
             steps: int | None, model: dict, schedule: dict, optim: dict, ema: dict, loss: dict, mesh: dict,
             checkpoints: dict, stall_seconds: float, log_every: int, save_every: int, statistics_every: int,
             evals_every: int, evals: dict, wandb: str | None):
  """Every argument but the first two is a key of the configuration and explained there."""
  settings = {key: value for key, value in locals().items() if key not in ('workdir', 'dry_run')}
  at_least_one('config', batch_size=batch_size, log_every=log_every, save_every=save_every,
               statistics_every=statistics_every, evals_every=evals_every)
  at_least_one('config.loss', accumulate=1 if loss.get('accumulate') is None else loss['accumulate'])
  with faults.guards(stall_seconds) as guards, own_workdir(workdir) as workdir:
    found = bind(open_data, data, 'config.data', given=('captions',))(model.get('text_width') is not None)
    split = found.split
    weights = read(init) if init else None
    saved = bind(Checkpoints, checkpoints, 'config.checkpoints', given=('workdir',))(workdir)
    before = saved.metadata()
    if before and not model.get('norm_stats'):
      model = model | {'norm_stats': before['norm_stats']}
    network = make_model(model, found, weights)
    check_data(before, found)
    bind(sharding.mesh_for, mesh, 'config.mesh', given=('parameters',))  # keys only: `fitted_update` makes the mesh
    sharding.check_batch(batch_size, sharding.make_mesh(fsdp=mesh.get('fsdp') or 1), loss.get('accumulate') or 1)
    batches = TrainingBatches(
        split, frames=network.input_size[1], batch_size=batch_size, seed=seed, sizes=found.sizes, weights=found.weights,
        captions=None if network.text_width is None else embeddings, part=(jax.process_index(), jax.process_count()))
    total = count_steps(steps, epochs, batches.order)
    learning_rate = bind(make_schedule, schedule, 'config.schedule', given=('batch_size', 'epoch', 'total'))(
        batch_size=batch_size, epoch=batches.order.epoch_clips / batch_size, total=total)
    tx = bind(make_optimizer, optim, 'config.optim', given=('learning_rate',))(learning_rate)
    create = functools.partial(create_state, seed, model=network, tx=tx)
    shapes = jax.eval_shape(create)
    ema_schedule = bind(linear_ramp, ema, 'config.ema', given=('total_steps',))(total_steps=total)
    evaluators = make_evaluators(evals, found.folder.path)
    bind(pretrain_loss, loss, 'config.loss', given=('params', 'target_params', 'batch', 'mask', 'model', 'folders'))
    guards.watchdog.beat('opening the data')
    update, mesh, needs = fitted_update(
        functools.partial(pretrain_step, tx=tx, ema_schedule=ema_schedule, folders=found.labels), network, loss,
        Given(mesh.get('fsdp'), model.get('remat'), loss.get('accumulate')), shapes, functools.partial(batches, 0))
    if dry_run:
      batches(0)
      print(f'{describe(network, split, shapes, mesh, total)}\n{needs}dry run: data and model fit; nothing was trained')
      return
    state, meta = create_or_restore(saved, create, mesh, settings)
    if weights and not meta:
      state, taken = start_from(state, weights)
      if jax.process_index() == 0:
        print(taken, file=sys.stderr)
    guards.watchdog.beat('making or restoring the state')
    evaluations = Evaluations(network, mesh, split, evaluators, guards.watchdog)
    train(state, update, batches, workdir=workdir, saved=saved, guards=guards, mesh=mesh, total=total,
          batch_size=batch_size, learning_rate=learning_rate, log_every=log_every, save_every=save_every,
          rows=meta.get('window', ()),
          actions=(Every(total, functools.partial(draw_masked_clip, found, network), at_start=True),
                   Every(log_every, functools.partial(found.log_counts, batches.order)),
                   Every(statistics_every, evaluations.statistics),
                   Every(evals_every, evaluations.evaluate, at_start=True)),
          metadata=lambda: {'settings': settings, 'norm_stats': network.norm_stats, **found.about(before)},
          description=needs + describe(network, split, state, mesh, total, int(state.step)),
          wandb=wandb, settings=settings)


def count_steps(steps: int | None, epochs: float, order: Order) -> int:
  """`steps` if given, else those of so many epochs; UserError where that is none."""
  total = steps or int(epochs * order.epoch_clips / order.batch_size)
  if total < 1:
    raise UserError(f'config.epochs={epochs} of {order.epoch_clips} clips in batches of {order.batch_size} are no step at '
                    'all')
  return total


def make_model(options: dict, data: PreparedData, weights: Weights | None = None) -> M2DCLAP:
  """The model; checks that it fits the data.

  Unless told otherwise it standardises with the statistics that the weights it starts from were trained with, or with
  the data's where it starts at random.
  """
  meta, path = data.meta, data.folder.path
  stats = options.get('norm_stats') or (weights.network().norm_stats if weights else (meta['mean'], meta['std']))
  model = bind(M2DCLAP, options | {'norm_stats': stats, 'remat': options.get('remat') or 'none'}, 'config.model')()
  check_model(model)
  if weights:
    check_source(weights, data)
  if meta['logmel']['n_mels'] != model.input_size[0]:
    raise UserError(f'{path}: has {meta["logmel"]["n_mels"]} mel bins where config.model.input_size has '
                    f'{model.input_size[0]}: prepare the data again or change the model')
  if model.text_width is not None:
    encoder = meta['text_encoder']
    if not encoder:
      raise UserError(f'{path}: has no caption embeddings: prepare it with --text_encoder, or train without '
                      'captions (--config=configs/pretrain.py:m2d)')
    if encoder['width'] != model.text_width:
      raise UserError(f'{path}: caption embeddings ({encoder["name"]}) are {encoder["width"]} wide where '
                      f'config.model.text_width is {model.text_width}: set it to {encoder["width"]}')
  return model


def check_data(before: dict, found: PreparedData):
  """Whether a run goes on with the data that it began with; `before` are its checkpoint's JSON data, {} for a new one.

  UserError for another number of clips, other log-mels or another text encoder; a notice for other records, with which
  the run keeps the statistics that it standardises with.
  """
  if not before:
    return
  now, place, encoder, its = found.about({}), ','.join(found.names), found.meta['text_encoder'], before['text_encoder']
  refuse_other(place, 'log-mels', now['logmel'], before['logmel'])
  refuse_other(place, 'text encoder of the captions', encoder and (encoder['name'], encoder['hash']),
               its and (its['name'], its['hash']))
  data, (mean, std) = before.get('data'), before['norm_stats']
  if data:  # checkpoints of earlier versions have none
    refuse_other(place, 'number of clips', now['data']['clips'], data['clips'])
  if data and 'fingerprints' in data:
    check_parts('folders', place, found.names, {'fingerprint': now['data']['fingerprints']}, {'fingerprint': data['fingerprints']},
                f'its own mean {mean:.4f} and deviation {std:.4f}, where the data have {found.meta["mean"]:.4f} and '
                f'{found.meta["std"]:.4f}')


def check_source(weights: Weights, data: PreparedData):
  """Whether the data are of the kind that the weights were trained on: UserError for another rate, which is another
  input; a notice for captions of another text encoder, which can be learned anew."""
  rate, encoder, path = data.meta['logmel']['sample_rate'], data.meta['text_encoder'], data.folder.path
  if weights.sample_rate != rate:
    raise UserError(f'config.init={weights.source}: is for audio of {weights.sample_rate} Hz where the log-mels in '
                    f'{path} are of {rate} Hz: prepare with --sample_rate={weights.sample_rate}')
  known = weights.text_encoder
  if not known or not encoder or encoder['name'] == Dictionaries.name:  # which do not tell whose embeddings they hold
    return
  other = encoder['hash'] != known['hash'] if known['hash'] else encoder['name'] != known['name']
  if other and jax.process_index() == 0:
    print(f'notice: {weights.source} was trained with captions embedded by {known["name"]}, those in {path} are '
          f'by {encoder["name"]}', file=sys.stderr)


def check_model(model: M2DCLAP):
  """Raises UserError for fields that no model can have."""
  check_network(model, 'config.model.')
  visible = num_visible(model.num_patches, model.mask_ratio)
  if not 0 < visible < model.num_patches:
    raise UserError(f'config.model.mask_ratio={model.mask_ratio}: leaves {visible} of {model.num_patches} patches '
                    'visible, where some must be visible and some masked')


def make_schedule(*, batch_size: int, epoch: float, total: int, base_learning_rate: float, warmup_epochs: float = 0.0,
                  warmup_share: float | None = None, warmup_steps: int | None = None):
  """Learning rate `base_learning_rate * batch_size / 256`, warmed up over epochs (of `epoch` steps), or a share of the run
  where that is given, or steps where these are."""
  warmup = warmup_epochs * epoch if warmup_share is None else warmup_share * total
  warmup = warmup if warmup_steps is None else warmup_steps
  notice = warmup_notice(warmup, total)
  if notice and jax.process_index() == 0:
    print(notice, file=sys.stderr)
  return warmup_cosine(base_learning_rate * batch_size / 256, warmup, total)


def fitted_update(step: Callable, network: M2DCLAP, loss: dict, given: Given, state, batch):
  """`pretrain_step` as an update of `train.loop` that reuses the memory of the state it is given -> (update, mesh, a line
  about its memory, or nothing).

  Where devices report their memory, what is not given is chosen so that the compiled update fits.

  Args:
    state: shapes; batch: returns this process's part of one, which is read only where its shapes are needed.
  """
  def jitted(plan):
    mesh = sharding.make_mesh(fsdp=plan.fsdp)
    model = network.clone(remat=plan.remat, platform=sharding.platform(mesh))
    function = functools.partial(step, model=model, gather=sharding.gather(mesh), **loss | {'accumulate': plan.accumulate})
    return sharding.jit_update(function, state, mesh), mesh

  def lowered(plan):
    if jax.process_index() == 0:
      print(f'compiling the update ({plan}) ...', file=sys.stderr)
    function, mesh = jitted(plan)
    arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(x) * jax.process_count(), *x.shape[1:]), x.dtype,
                                                         sharding=sharding.over_batch(mesh)), first)
    return function.lower(abstract(state, sharding.of_state(state, mesh)), arrays)
  memory = sharding.device_memory()
  if memory:
    first = batch()
    samples = len(first['logmel']) * jax.process_count() // jax.device_count()
    update, plan, needs = fit(lowered, plans(given, devices=jax.device_count(), samples=samples, state=sharding.size_of(state),
                                             memory=memory), memory)
    mesh, needs = sharding.make_mesh(fsdp=plan.fsdp), needs + '\n'
  else:
    (update, mesh), needs = jitted(Plan(given.fsdp or 1, given.remat or 'none', given.accumulate or 1)), ''
  return lambda state, batch, _: update(state, batch), mesh, needs


def draw_masked_clip(data: PreparedData, model: M2DCLAP, step: int, state, log):
  """At the start, writes mask.png into the workdir: the first training clip with the mask of the first update."""
  if step or not log.active:
    return
  clip, mask = data.split.clip(0), draw_mask(state.rng, state.step, 1, model=model)
  logmel = crop(clip.logmel, model.grid[1] * model.patch_size[1], 0.0).astype(np.float32)
  plots.masked_clip(logmel, np.asarray(as_bool(mask))[0], model.grid, model.patch_size, log.workdir / 'mask.png',
                    spec=LogMel.for_rate(data.meta['logmel']['sample_rate']), title=clip.key, captions=clip.captions)


def describe(model: M2DCLAP, split, state, mesh, total: int, first: int = 0) -> str:
  """The sizes of model, data and machine; `state` may be of shapes."""
  return (f'{sharding.table(state, mesh)}\n{sharding.count_elements(state.params) / 1e6:.1f} M parameters, '
          f'{model.num_patches} patches; {split.num_clips} clips; {mesh.size} {jax.devices()[0].platform} device(s); '
          f'steps {first} to {total}')
