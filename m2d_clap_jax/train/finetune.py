"""The fine-tuning driver: from a configuration and a task to trained classifiers and their scores."""
import dataclasses
import functools
import json
from collections.abc import Callable

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from m2d_clap_jax import paths, sharding
from m2d_clap_jax.data.sampling import Epochs, rarity, validation_crops
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.eval import linear_protocol, metrics, plots, report
from m2d_clap_jax.eval.class_plots import draw_classes
from m2d_clap_jax.models.classifier import Classifier
from m2d_clap_jax.options import at_least_one, bind
from m2d_clap_jax.train import faults, same_data
from m2d_clap_jax.train.augment import patchout_counts
from m2d_clap_jax.train.best import BestClassifier
from m2d_clap_jax.train.checkpoint import Checkpoints
from m2d_clap_jax.train.finetune_step import Augmentation, FinetuneState, Inputs, create_state, finetune_step, freezing
from m2d_clap_jax.train.loop import Every, create_or_restore, train
from m2d_clap_jax.train.optim import cosine_behind_warmup, warmup_notice
from m2d_clap_jax.train.scoring import Scorer
from m2d_clap_jax.train.start import merge
from m2d_clap_jax.train.task_data import (
  Data,
  check_data,
  count_parameters,
  make_augmentation,
  make_classifier,
  note,
  open_data,
  optimizer_of,
)
from m2d_clap_jax.weights import Weights, read
from m2d_clap_jax.weights.run import classifier_variables, classifier_weights
from m2d_clap_jax.workdir import own_workdir

HEADS = 'random', 'linear'
LAST_PATCH = 'drop', 'pad'
RESULT = 'result.json'
UNIMPORTANT = ('mesh', 'checkpoints', 'stall_seconds', 'log_every', 'save_every', 'wandb', 'runs')


def run(config, workdir: str, dry_run: bool = False):
  """Fine-tunes according to `config` (see configs/finetune.py), or continues the run in `workdir`."""
  bind(finetune, config.to_dict(), 'config', given=('workdir', 'dry_run'))(workdir, dry_run=dry_run)


def finetune(workdir: str, *, dry_run: bool = False, job: str, seed: int, task: str, init: str, data: dict, model: dict, head: str,
             last_patch: str, batch_size: int, epochs: int, schedule: dict, optim: dict, freeze_patch_embed: bool,
             augmentation: dict, sampling: dict, runs: int, mesh: dict, checkpoints: dict, stall_seconds: float,
             log_every: int, save_every: int, evals_every: int, wandb: str | None):
  """Every argument but the first two is a key of the configuration, which documents it."""
  settings = {key: value for key, value in locals().items() if key not in ('workdir', 'dry_run')}
  at_least_one('config', batch_size=batch_size, epochs=epochs, runs=runs, log_every=log_every, save_every=save_every,
               evals_every=evals_every)
  if head not in HEADS:
    raise UserError(f'config.head={head!r}: unknown; known: {", ".join(HEADS)}')
  if head == 'linear' and not init:
    raise UserError("config.head='linear': needs a model's features: name the model as config.init, or use "
                    "'random'")
  if last_patch not in LAST_PATCH:
    raise UserError(f'config.last_patch={last_patch!r}: unknown; known: {", ".join(LAST_PATCH)}')
  if not data.get('root'):
    raise UserError('config.data.root is empty: name the folder of the audio')
  with faults.guards(stall_seconds) as guards, own_workdir(workdir) as workdir:
    weights = read(init) if init else None
    guards.watchdog.beat('opening the workdir')
    found, rate = bind(open_data, data, 'config.data', given=('workdir', 'task', 'weights', 'beat'))(
        workdir, task, weights, beat=guards.watchdog.beat)
    opened = found.task
    augment = make_augmentation(augmentation)
    before = same_data.read_record(workdir, (f'run*/{RESULT}', 'run*/checkpoints/[0-9]*'))
    if before and not model.get('norm_stats'):
      model = model | {'norm_stats': before['norm_stats']}
    inputs, classifier, table = make_classifier(model, found, rate, weights, augment, last_patch)
    check_data(before, found)
    devices = bind(sharding.mesh_for, mesh, 'config.mesh', given=('parameters',))(count_parameters(classifier))
    sharding.check_batch(batch_size, devices)
    tuning = FineTuning(data=found, inputs=inputs, classifier=classifier, table=table, mesh=devices, weights=weights,
                        settings=settings, make_optimizer=optimizer_of(optim), augmentation=augment, guards=guards,
                        scorer=Scorer(classifier, found, inputs, devices, guards.watchdog.beat))
    note(f'{task}: {len(opened.clips)} clips used, {len(found.rejected)} that cannot be read, {len(opened.classes)} '
         f'classes; inputs of {inputs.logmel.n_mels} x {inputs.logmel.num_frames(found.waves.samples)}; {devices.size} '
         f'{jax.devices()[0].platform} device(s); ' + (f'starts from {init}' if init else 'starts from random weights'))
    if dry_run:
      print(f'dry run: {count_parameters(classifier) / 1e6:.1f} M parameters; data and model fit; nothing was trained')
      return
    if not before:
      same_data.write_record(workdir, {'norm_stats': inputs.norm_stats, 'classes': opened.classes, 'parts': found.parts})
    rows = []
    for number in range(runs):
      for fold in opened.folds or (None,):
        name = f'run{number}' + ('' if fold is None else f'_fold{fold}')
        rows.append({'run': number, 'fold': fold, **tuning.run(workdir / name, seed + number, fold)})
        note(f'{task}, {name}: {opened.metric} {100 * rows[-1]["score"]:.2f}%, of epoch {rows[-1]["epoch"]}')
  scores = [np.mean([row['score'] for row in rows if row['run'] == number]) for number in range(runs)]
  scored = [clip for clip in opened.clips if opened.folds or clip.split == 'test'] or opened.clips
  mean, interval = linear_protocol.mean_and_interval(scores)
  if jax.process_index() == 0:
    report.write(workdir, {
        'job': job, 'task': task, 'metric': opened.metric, 'score': mean, 'interval': interval,
        'chance': metrics.chance(opened.targets(scored)), 'trials': rows,
        'settings': settings, 'model': {'source': init or 'at random',
                                        'fingerprint': weights.fingerprint if weights else 'at random'},
        'clips': {'used': len(opened.clips), 'rejected': found.rejected}})
    print((workdir / report.TABLE).read_text())


@dataclasses.dataclass(frozen=True)
class FineTuning:
  """State common to all runs and folds; `run` performs one of them.

  table: position table [1, 1 + N, D]; settings: the whole configuration.
  """
  data: Data
  inputs: Inputs
  classifier: Classifier
  table: np.ndarray
  mesh: jax.sharding.Mesh
  weights: Weights | None
  settings: dict
  make_optimizer: Callable[[optax.Schedule], optax.GradientTransformation]
  augmentation: Augmentation
  scorer: Scorer
  guards: faults.Guards

  def run(self, folder, seed: int, fold) -> dict:
    """Trains in `folder`, or continues there -> {'score', 'epoch', 'seed', 'best_SPLIT'}; returns a finished result.

    The score is the test score of the epoch that is best on the valid split; without one, the best epoch's test score,
    as EVAR reports. That epoch's classifier is written to FOLDER/best as a portable folder.
    """
    made_with, task = self._made_with(), self.data.task
    if (folder / RESULT).exists():
      return _finished(folder, made_with)
    paths.make_folder(folder)
    splits = task.splits(fold)
    where = 'valid' if splits['valid'] else 'test'
    for name in ('train', where):
      if not splits[name]:
        raise UserError(f'{task.name}: no clips in split {name!r}{"" if fold is None else f" of fold {fold}"}')
    best = self._train(folder, seed, splits, where)
    self._together(f'{folder} is trained')  # the first process writes what all read
    variables = jax.device_put(classifier_variables(read(best.place)), sharding.replicated(self.mesh))
    targets, logits = self.scorer(variables, splits['test'] or splits['valid'])
    self._together(f'{folder} is read')
    result = {'score': self.scorer.metric_of(targets, logits), 'epoch': best.result['epoch'], 'seed': seed,
              f'best_{where}': best.result['score']}
    if jax.process_index() == 0:
      draw_classes(folder, task.classes, targets, logits, multi_label=task.metric == 'mAP',
                   title=f'{task.name}, fine-tuned')
      best.finish()
      paths.write_text(folder / RESULT, json.dumps(result | {'made_with': made_with}, indent=2) + '\n')
    return result

  def _made_with(self) -> dict:
    """Everything a result depends on: the settings, except for speed and logging, and the initial weights."""
    kept = {key: value for key, value in self.settings.items() if key not in UNIMPORTANT}
    kept['data'] = {key: value for key, value in kept['data'].items() if key != 'cache'}
    return json.loads(json.dumps(kept | {'weights': self.weights and self.weights.fingerprint}))

  def _train(self, folder, seed: int, splits: dict, where: str) -> BestClassifier:
    settings, writes = self.settings, jax.process_index() == 0
    clips, targets = self.data.numbers(splits['train']), self.data.task.targets(splits['train']).astype(bool)
    epochs = bind(_epochs, settings['sampling'], 'config.sampling', given=('targets', 'batch_size', 'seed'))(
        targets, settings['batch_size'], seed)
    total = settings['epochs'] * epochs.steps
    rate = bind(_schedule, settings['schedule'], 'config.schedule', given=('epoch', 'total'))(epochs.steps, total)
    tx = self.make_optimizer(rate)
    if settings['freeze_patch_embed']:
      tx = freezing(tx, 'patch_embed')
    saved = bind(Checkpoints, settings['checkpoints'], 'config.checkpoints', given=('workdir',))(folder)
    create = functools.partial(create_state, seed, model=self.classifier, tx=tx,
                               shape=self.classifier.pretrained.input_size)
    state, meta = create_or_restore(saved, create, self.mesh, settings)
    if not meta:
      state = self._with_weights(state, splits, seed)
    best, step, tables = BestClassifier(folder, meta.get('best'), writes), self._step(tx, state), self._tables()

    def update(state, arrays, number: int):
      return step(state, arrays, tables, drop=self._drop(epochs.patchout(number)))

    def batch(number: int) -> dict:
      rows, draws = sharding.own_part(epochs.clips(number)), sharding.own_part(epochs.crops(number))
      return {'waves': self.data.waves.crops(clips[rows], draws), 'lengths': self.data.lengths(clips[rows]),
              'targets': targets[rows].astype(np.float32)}

    def evaluate(number: int, state, log):
      self._evaluate(best, state, log, splits[where], where, number // epochs.steps, number, seed)
    train(state, update, batch, workdir=folder, saved=saved, guards=self.guards, mesh=self.mesh, total=total,
          batch_size=settings['batch_size'], learning_rate=rate, log_every=min(settings['log_every'], epochs.steps),
          save_every=settings['save_every'] * epochs.steps, rows=meta.get('window', ()),
          actions=[Every(settings['evals_every'] * epochs.steps, evaluate)],
          metadata=lambda: {'settings': settings, 'best': best.for_checkpoint()}, wandb=settings['wandb'],
          settings=settings)
    return best

  def _evaluate(self, best: BestClassifier, state, log, clips, where: str, epoch: int, step: int, seed: int):
    """Scores the state and keeps it if it is the best."""
    draws = validation_crops(len(clips), seed, epoch) if where == 'valid' else None
    score = self.scorer.metric((state.params, state.stats, self._tables()), clips, draws)
    metric = self.data.task.metric
    log.write(step, {f'{where}/{metric}': score})

    def make() -> Weights:
      whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(self.mesh))((state.params, state.stats))
      return classifier_weights(self.classifier, *jax.device_get(whole), table=self.table,
                                sample_rate=self.inputs.logmel.sample_rate, classes=self.data.task.classes,
                                source=str(log.workdir), step=step, padded_to=self.inputs.shortest(self.data.waves.samples))
    best.offer(score, epoch, make)
    log.note(f'epoch {epoch}: {where} {metric} {100 * score:.2f}%, best {100 * best.result["score"]:.2f}% '
             f'(epoch {best.result["epoch"]})')
    if log.active:
      plots.loss_curves(log.history(), log.workdir / 'curves.png', title=log.workdir.name)

  def _drop(self, u: float) -> tuple[int, int]:
    """Numbers of rows and columns that structured patchout drops in a step.

    They are static arguments, so each pair (four for 5 x 62 patches) is compiled once, when it first occurs. Padding
    to the longest with a mask would give one program that always computes 172 patches, where the mean is 159: 8% more.
    """
    return patchout_counts(self.inputs.grid(self.data.waves.samples), self.augmentation.patchout, u)

  def _tables(self):
    return jax.device_put({'network': {'pos_embed': self.table}}, sharding.replicated(self.mesh))

  def _step(self, tx, state):
    step = functools.partial(
        finetune_step, model=self.classifier.on(sharding.platform(self.mesh)), tx=tx, inputs=self.inputs,
        augmentation=self.augmentation, multi_label=self.data.task.multi_label, gather=sharding.gather(self.mesh))
    return sharding.Jitted(step, self.mesh, donate_argnums=0, static_argnames='drop',
                           out_shardings=(sharding.of_state(state, self.mesh), sharding.replicated(self.mesh)))

  def _together(self, name: str):
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(name)

  def _with_weights(self, state: FinetuneState, splits: dict, seed: int) -> FinetuneState:
    """A new state with the initial weights and head of the configuration."""
    if self.weights:
      network, _, fresh = merge(state.params['network'], self.weights.trees['params'], self.weights.source)
      if fresh:
        raise UserError(f'config.init={self.weights.source}: lacks {", ".join(fresh)}, which the encoder needs')
      state = state.replace(params=state.params | {'network': network})
    return self._with_linear_head(state, splits, seed) if self.settings['head'] == 'linear' else state

  def _with_linear_head(self, state: FinetuneState, splits: dict, seed: int) -> FinetuneState:
    """The state with the head that linear evaluation of its encoder trains on the training clips."""
    clips = splits['train'] + splits['valid']
    draws = validation_crops(len(clips), seed, 0)
    targets, features = self.scorer((state.params, state.stats, self._tables()), clips, draws, 'features')
    rows = np.split(np.arange(len(clips)), [len(splits['train'])])
    problems = linear_protocol.problems_of(targets, [dict(zip(('train', 'valid'), rows), test=rows[0])], 1, seed)
    self.guards.watchdog.rest()
    outcome, = linear_protocol.run(features, targets, problems, seed=seed, multi_label=self.data.task.multi_label)
    made = ({'kernel': outcome.kernel, 'bias': outcome.bias}, {'mean': outcome.mean, 'var': np.square(outcome.deviation)})
    self.guards.watchdog.beat('the linear head')
    if jax.process_count() > 1:  # each process trained its own head, with possibly different rounding
      made = multihost_utils.broadcast_one_to_all(made)
    head, stats = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), made,
                               (state.params['head'], state.stats['head_norm']))
    note(f'the head starts from linear evaluation: {100 * outcome.valid_score:.2f}% on validation clips, epoch '
         f'{outcome.best_epoch}')
    return state.replace(params=state.params | {'head': head}, stats={'head_norm': stats})


def _finished(folder, made_with: dict) -> dict:
  """An existing result; UserError if it was made with other settings or weights."""
  result = json.loads((folder / RESULT).read_text())
  before = result.pop('made_with')
  other = sorted(key for key in set(before) | set(made_with) if before.get(key) != made_with.get(key))
  if other:
    raise UserError(f'{folder / RESULT}: was made with other settings ({", ".join(other)}): choose another --workdir, or '
                    'delete the folder to do it again')
  return result


def _schedule(epoch: int, total: int, *, learning_rate: float, warmup_epochs: float = 0.0,
              end: float = 1e-7) -> optax.Schedule:
  """Half a cosine over all epochs to `end`, with a warm-up from 0 over `warmup_epochs` of `epoch` steps, by step."""
  if notice := warmup_notice(warmup_epochs * epoch, total):
    note(notice)
  return cosine_behind_warmup(learning_rate, warmup_epochs * epoch, total, end)


def _epochs(targets, batch_size: int, seed: int, *, weighted: bool = False, per_epoch: int | None = None) -> Epochs:
  if per_epoch is not None and not weighted:
    raise UserError(f'config.sampling.per_epoch={per_epoch}: requires config.sampling.weighted=True')
  return Epochs(len(targets), batch_size, seed, rarity(targets) if weighted else None, per_epoch)
