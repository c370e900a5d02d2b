"""One fine-tuning: a split or fold of a task, trained from one seed; continued where it stopped."""
import dataclasses
import functools
import json
import sys
from collections.abc import Callable

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from m2d_clap_jax import paths, sharding
from m2d_clap_jax.data.batches import prefetch
from m2d_clap_jax.data.sampling import Epochs, rarity, validation_crops
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.eval import linear_protocol, plots
from m2d_clap_jax.eval.figures import draw_classes
from m2d_clap_jax.models.classifier import Classifier
from m2d_clap_jax.options import bind
from m2d_clap_jax.tasks.decoded import Waves
from m2d_clap_jax.tasks.metadata import Task
from m2d_clap_jax.train.augment import patchout_counts
from m2d_clap_jax.train.checkpoint import Checkpoints, abstract, report_changes
from m2d_clap_jax.train.faults import Preempted, Preemption, Watchdog
from m2d_clap_jax.train.finetune_step import (
  Augmentation,
  FinetuneState,
  Inputs,
  create_state,
  finetune_step,
  freezing,
  score,
)
from m2d_clap_jax.train.log import Progress, RunLog
from m2d_clap_jax.train.schedule import Schedule, cosine_behind_warmup
from m2d_clap_jax.train.start import merge
from m2d_clap_jax.train.log import RunningMetrics as Window
from m2d_clap_jax.weights import Weights, read
from m2d_clap_jax.weights.portable import CONFIG
from m2d_clap_jax.weights.run import classifier_weights

SCORE_BATCH = 64
BEST, RESULT = 'best', 'result.json'
UNIMPORTANT = ('mesh', 'checkpoints', 'stall_seconds', 'log_every', 'save_every', 'runs')


@dataclasses.dataclass(frozen=True)
class Trial:
  """What all runs and folds have in common; `run` does one of them.

  places: {file: number in waves}; table: position table [1, 1 + N, D]; settings: the whole configuration.
  """
  task: Task
  waves: Waves
  places: dict[str, int]
  inputs: Inputs
  classifier: Classifier
  table: np.ndarray
  mesh: jax.sharding.Mesh
  weights: Weights | None
  settings: dict
  make_optimizer: Callable[[Schedule], optax.GradientTransformation]
  augmentation: Augmentation

  def run(self, folder, seed: int, fold) -> dict:
    """Trains in `folder`, or goes on there -> {'score', 'epoch', 'seed', 'steps'}; at once where it is finished.

    The score is the test score of the epoch that is best on the valid split; without one, the best epoch's on test, as
    EVAR reports. That epoch's classifier is left in FOLDER/best as a portable folder.
    """
    made_with = self._made_with()
    if (folder / RESULT).exists():
      return _finished(folder, made_with)
    paths.make_folder(folder)
    splits = self.task.splits(fold)
    where = 'valid' if splits['valid'] else 'test'
    for name in ('train', where):
      if not splits[name]:
        raise UserError(f'{self.task.name}: no clips in split {name!r}{"" if fold is None else f" of fold {fold}"}')
    best = self._train(folder, seed, splits, where)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(str(folder))  # the first process has written what all read
    variables = jax.device_put(_variables(read(_place(folder, best['epoch']))), sharding.replicated(self.mesh))
    targets, logits = self._predict(variables, splits['test'] or splits['valid'])
    found = self._metric(targets, logits)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f'{folder} is read')
    result = {'score': found, 'epoch': best['epoch'], 'seed': seed, f'best_{where}': best['score']}
    if jax.process_index() == 0:
      draw_classes(folder, self.task.classes, targets, logits, multi_label=self.task.metric == 'mAP',
                   title=f'{self.task.name}, fine-tuned')
      place = _place(folder, best['epoch'])
      if place != folder / BEST:
        paths.move(place, folder / BEST)
      _forget(folder, set())
      paths.write_text(folder / RESULT, json.dumps(result | {'made_with': made_with}, indent=2) + '\n')
    return result

  def _made_with(self) -> dict:
    """What a result depends on: settings, but for those of speed and logging, and the weights that it starts from."""
    kept = {key: value for key, value in self.settings.items() if key not in UNIMPORTANT}
    kept['data'] = {key: value for key, value in kept['data'].items() if key != 'cache'}
    return json.loads(json.dumps(kept | {'weights': self.weights and self.weights.fingerprint}))

  def _train(self, folder, seed: int, splits: dict, where: str) -> dict:
    settings = self.settings
    clips, targets = self._numbers(splits['train']), self.task.targets(splits['train']).astype(bool)
    epochs = bind(_epochs, settings['sampling'], 'config.sampling', given=('targets', 'batch_size', 'seed'))(
        targets, settings['batch_size'], seed)
    total = settings['epochs'] * epochs.steps
    rate = bind(_schedule, settings['schedule'], 'config.schedule', given=('epoch', 'total'))(epochs.steps, total)
    tx = self.make_optimizer(rate)
    if settings['freeze_patch_embed']:
      tx = freezing(tx, 'patch_embed')
    saved = bind(Checkpoints, settings['checkpoints'], 'config.checkpoints', given=('workdir',))(folder)
    continued = saved.latest() is not None
    state, meta = self._create_or_restore(saved, seed, tx, splits)
    step = first = int(state.step)
    log = RunLog(folder, step if continued else None, active=jax.process_index() == 0)
    window = Window(settings['batch_size'], meta['window'], saved.latest)
    progress, best = Progress(first, total, log), meta['best']
    update = self._update(tx, state)
    preemption, watchdog = Preemption(), Watchdog(settings['stall_seconds'])
    tables = self._tables()

    recorded = [best]  # in the newest checkpoint

    def save():
      window.check()
      if saved.latest() != step:
        log.sync()
        saved.save(state, {'settings': settings, 'window': window.rows, 'best': best})
        # The save goes on in the background: what the checkpoint before calls the best may still be needed.
        now = {each['epoch'] for each in (best, *recorded) if each}
        if log.active:
          _forget(folder, now)
        recorded[:] = [best]

    def batch(step: int) -> dict:
      rows, draws = sharding.own_part(epochs.clips(step)), sharding.own_part(epochs.crops(step))
      return self._inputs(clips[rows], draws) | {'targets': targets[rows].astype(np.float32)}
    feed = prefetch(batch, first, total)
    for step in range(first + 1, total + 1):
      with window.waiting():
        arrays = sharding.to_devices(self.mesh, next(feed))
      state, metrics = update(state, arrays, tables, drop=self._drop(epochs.patchout(step - 1)))
      window.add(metrics)
      if step % settings['log_every'] == 0 or step == total:
        row = window.flush() | {'learning_rate': float(rate(step - 1))}
        log.write(step, row)
        progress.show(step, row)
      epoch, rest = divmod(step, epochs.steps)
      with window.uncounted():
        if not rest and (epoch % settings['evals_every'] == 0 or step == total):
          window.check()
          best = self._evaluate(folder, log, step, epoch, state, splits[where], where, best, seed)
        if not rest and (epoch % settings['save_every'] == 0 or step == total):
          save()
      watchdog.beat(f'step {step}')
      if preemption.reached():
        save()
        saved.close()
        log.close()
        raise Preempted(f'{folder} stopped after step {step} of {total}, which is saved: the same command continues')
    watchdog.close()
    saved.close()
    log.close()
    return best

  def _evaluate(self, folder, log: RunLog, step: int, epoch: int, state: FinetuneState, clips, where: str, best: dict,
                seed: int):
    """Scores the state; where it is the best so far, writes its weights -> the best so far."""
    draws = validation_crops(len(clips), seed, epoch) if where == 'valid' else None
    found = self._metric(*self._predict((state.params, state.stats, self._tables()), clips, draws))
    log.write(step, {f'{where}/{self.task.metric}': found})
    if best is None or found > best['score']:
      best = {'score': found, 'epoch': epoch}
      whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(self.mesh))((state.params, state.stats))
      if log.active:
        from m2d_clap_jax.weights.portable import save_portable
        save_portable(classifier_weights(self.classifier, *jax.device_get(whole), table=self.table,
                                         sample_rate=self.inputs.logmel.sample_rate, classes=self.task.classes,
                                         source=str(folder), step=step), folder / f'{BEST}-{epoch}')
    log.note(f'epoch {epoch}: {where} {self.task.metric} {100 * found:.2f}%, best {100 * best["score"]:.2f}% '
             f'(epoch {best["epoch"]})')
    if log.active:
      plots.loss_curves(log.history(), folder / 'curves.png')
    return best

  def _predict(self, variables, clips, draws=None, method: str = '__call__') -> tuple[np.ndarray, np.ndarray]:
    """-> targets and logits [n, C] of clips, or what another method of the classifier gives.

    variables: (params, stats, tables); draws: where the clips are cropped, as for `Waves.crops`; None: at their start.
    """
    size = -(-SCORE_BATCH // self.mesh.size) * self.mesh.size
    numbers, found = self._numbers(clips), []
    draws = np.zeros(len(clips)) if draws is None else draws
    for start in range(0, len(numbers), size):
      some = slice(start, start + size)
      count = len(numbers[some])
      # Filled up with the last clip: one shape, one compilation.
      rows, places = (np.pad(x[some], (0, size - count), mode='edge') for x in (numbers, draws))
      arrays = sharding.to_devices(self.mesh, self._inputs(sharding.own_part(rows), sharding.own_part(places)))
      found.append(np.asarray(self._score(*variables, **arrays, method=method))[:count])
    return self.task.targets(clips), np.concatenate(found)

  def _inputs(self, numbers, draws) -> dict[str, np.ndarray]:
    """Crops of clips, and how many samples of them are no padding."""
    return {'waves': self.waves.crops(numbers, draws),
            'lengths': np.minimum(self.waves.lengths[numbers], self.waves.samples).astype(np.int32)}

  def _drop(self, u: float) -> tuple[int, int]:
    """How many rows and columns structured patchout leaves out in a step.

    They are static arguments, so that each pair (four of 5 x 62 patches) is compiled once, when it first comes. Padding
    to the longest with a mask would be one program that always computes its 172 patches, where the mean is 159: 8% more.
    """
    ratio = self.augmentation.patchout
    return patchout_counts(self.inputs.grid(self.waves.samples), ratio, u) if ratio else (0, 0)

  def _metric(self, targets, logits) -> float:
    """The task's metric, in 0..1."""
    return linear_protocol.score_of(logits, targets, self.task.metric == 'mAP')

  @functools.cached_property
  def _score(self):
    return jax.jit(functools.partial(score, model=self.classifier, inputs=self.inputs), static_argnames='method',
                   out_shardings=sharding.replicated(self.mesh))

  def _numbers(self, clips) -> np.ndarray:
    return np.array([self.places[clip.file] for clip in clips])

  def _tables(self):
    return jax.device_put({'network': {'pos_embed': self.table}}, sharding.replicated(self.mesh))

  def _update(self, tx, state):
    step = functools.partial(
        finetune_step, model=self.classifier, tx=tx, inputs=self.inputs, augmentation=self.augmentation,
        multi_label=self.task.multi_label, gather=sharding.gather(self.mesh))
    return jax.jit(step, donate_argnums=0, static_argnames='drop',
                   out_shardings=(sharding.of_state(state, self.mesh), sharding.replicated(self.mesh)))

  def _create_or_restore(self, saved: Checkpoints, seed: int, tx, splits: dict) -> tuple[FinetuneState, dict]:
    """A new state on the mesh, from the weights if there are any, or the newest checkpoint's -> (state, JSON data)."""
    create = functools.partial(create_state, seed, model=self.classifier, tx=tx,
                               shape=self.classifier.pretrained.input_size)
    shapes = jax.eval_shape(create)
    shardings = sharding.of_state(shapes, self.mesh)
    if saved.latest() is not None:
      state, meta = saved.restore(abstract(shapes, shardings))
      report_changes(meta['settings'], self.settings)
      return state, meta
    state = jax.jit(create, out_shardings=shardings)()
    if self.weights:
      network, _, fresh = merge(state.params['network'], self.weights.trees['params'], self.weights.source)
      if fresh:
        raise UserError(f'config.init={self.weights.source}: lacks {", ".join(fresh)}, without which there is no encoder')
      state = state.replace(params=state.params | {'network': network})
    if self.settings['head'] == 'linear':
      state = self._with_linear_head(state, splits, seed)
    return state, {'window': [], 'best': None}

  def _with_linear_head(self, state: FinetuneState, splits: dict, seed: int) -> FinetuneState:
    """The state with the head that linear evaluation of its encoder finds on the training clips."""
    clips = splits['train'] + splits['valid']
    draws = validation_crops(len(clips), seed, 0)
    targets, features = self._predict((state.params, state.stats, self._tables()), clips, draws, 'features')
    rows = np.split(np.arange(len(clips)), [len(splits['train'])])
    problems = linear_protocol.problems_of(targets, [dict(zip(('train', 'valid'), rows), test=rows[0])], 1, seed)
    found, = linear_protocol.run(features, targets, problems, seed=seed, multi_label=self.task.multi_label)
    made = ({'kernel': found.kernel, 'bias': found.bias}, {'mean': found.mean, 'var': np.square(found.deviation)})
    if jax.process_count() > 1:  # each trained on its own device, and may have rounded differently
      made = multihost_utils.broadcast_one_to_all(made)
    head, stats = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), made,
                               (state.params['head'], state.stats['head_norm']))
    if jax.process_index() == 0:
      print(f'the head starts from linear evaluation: {100 * found.valid_score:.2f}% on validation clips, epoch '
            f'{found.best_epoch}', file=sys.stderr, flush=True)
    return state.replace(params=state.params | {'head': head}, stats={'head_norm': stats})


def _finished(folder, made_with: dict) -> dict:
  """A result that is there already; UserError if it was made with other settings or weights than are wanted now."""
  result = json.loads((folder / RESULT).read_text())
  before = result.pop('made_with')
  other = sorted(key for key in set(before) | set(made_with) if before.get(key) != made_with.get(key))
  if other:
    raise UserError(f'{folder / RESULT}: was made with other settings ({", ".join(other)}): choose another --workdir, or '
                    'delete the folder to do it again')
  return result


def _place(folder, epoch: int):
  """Where an epoch's classifier lies while it may still be the best. A name of its own, because after a kill the epochs
  since the newest checkpoint come again and may, on some devices, come out a little differently."""
  place = folder / f'{BEST}-{epoch}'
  # Killed between the last two steps of a run, it has its final name already. A store moves file by file, the
  # description before the tensors: while it is there, the rest is.
  return place if (place / CONFIG).exists() or not (folder / BEST).exists() else folder / BEST


def _forget(folder, epochs: set[int]):
  """Deletes all classifiers but those of `epochs`."""
  for path in folder.glob(f'{BEST}-*'):
    if path.name not in {f'{BEST}-{epoch}' for epoch in epochs}:
      path.rmtree()


def _schedule(epoch: int, total: int, *, learning_rate: float, warmup_epochs: float = 0.0,
              end: float = 1e-7) -> Schedule:
  """Half a cosine over all epochs to `end`, behind a warm-up from 0 over `warmup_epochs` of `epoch` steps, by step."""
  return cosine_behind_warmup(learning_rate, warmup_epochs * epoch, total, end)


def _epochs(targets, batch_size: int, seed: int, *, weighted: bool = False, per_epoch: int | None = None) -> Epochs:
  if per_epoch is not None and not weighted:
    raise UserError(f'config.sampling.per_epoch={per_epoch}: goes with config.sampling.weighted=True only')
  return Epochs(len(targets), batch_size, seed, rarity(targets) if weighted else None, per_epoch)


def _variables(weights: Weights):
  """An exported classifier as (params, stats, tables) of `score`."""
  return ({'network': weights.nested('params'), 'head': weights.nested('head')},
          {'head_norm': weights.nested('head_stats')},
          {'network': {'pos_embed': weights.nested('tables')['pos_embed']}})
