"""The fine-tuning driver: from a configuration and a task to trained classifiers and their scores."""
import math
import os
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m2d_clap_jax import sharding
from m2d_clap_jax.audio import LogMel, decode
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.eval import report
from m2d_clap_jax.eval.linear_protocol import mean_and_interval
from m2d_clap_jax.models import M2DCLAP
from m2d_clap_jax.models.classifier import Classifier, position_table
from m2d_clap_jax.options import at_least_one, bind
from m2d_clap_jax.paths import is_remote, stamps
from m2d_clap_jax.progress import Progress
from m2d_clap_jax.tasks.clips import missing_files, refuse_damaged
from m2d_clap_jax.tasks.decoded import SCALE, Waves
from m2d_clap_jax.tasks.metadata import Task, check_classes, open_task
from m2d_clap_jax.train.finetune_step import Augmentation, Inputs
from m2d_clap_jax.train.optim import FINE_TUNING
from m2d_clap_jax.train.pretrain import check_model
from m2d_clap_jax.train.trial import Trial
from m2d_clap_jax.weights import Weights, read
from m2d_clap_jax.workdir import make_workdir

HEADS = 'random', 'linear'
LAST_PATCH = 'drop', 'pad'
LONGEST = 300.0  # seconds kept of a recording: more than any of the paper's tasks has, and no day-long one fills the disk
MEASURED = 1000  # clips that the statistics of the log-mels are taken from


class Data(NamedTuple):
  """task: of the clips that can be read; waves: of all; places: {file: number in waves}; rejected: {file: reason}."""
  task: Task
  waves: Waves
  places: dict[str, int]
  rejected: dict[str, str]


def run(config, workdir: str):
  """Fine-tunes as `config` (see configs/finetune.py) says, or continues what was begun in `workdir`."""
  bind(finetune, config.to_dict(), 'config', given=('workdir',))(workdir)


def finetune(workdir: str, *, job: str, seed: int, task: str, init: str, data: dict, model: dict, head: str,
             last_patch: str, batch_size: int, epochs: int, schedule: dict, optim: dict, freeze_patch_embed: bool,
             augmentation: dict, sampling: dict, runs: int, mesh: dict, checkpoints: dict, stall_seconds: float,
             log_every: int, save_every: int, evals_every: int):
  """Every argument is a key of the configuration and explained there."""
  settings = {key: value for key, value in locals().items() if key != 'workdir'}
  at_least_one('config', batch_size=batch_size, epochs=epochs, runs=runs, log_every=log_every, save_every=save_every,
               evals_every=evals_every)
  if head not in HEADS:
    raise UserError(f'config.head={head!r}: unknown; known: {", ".join(HEADS)}')
  if head == 'linear' and not init:
    raise UserError("config.head='linear': is trained on a model's features: name the model as config.init, or take "
                    "'random'")
  if last_patch not in LAST_PATCH:
    raise UserError(f'config.last_patch={last_patch!r}: unknown; known: {", ".join(LAST_PATCH)}')
  if not data.get('root'):
    raise UserError('config.data.root is empty: name the folder of the audio')
  workdir = make_workdir(workdir)
  weights = read(init) if init else None
  found, rate = bind(open_data, data, 'config.data', given=('workdir', 'task', 'weights'))(workdir, task, weights)
  opened = found.task
  augment = make_augmentation(augmentation)
  inputs, classifier, table = make_classifier(model, found, rate, weights, augment, last_patch)
  devices = bind(sharding.mesh_for, mesh, 'config.mesh', given=('parameters',))(count_parameters(classifier))
  sharding.check_batch(batch_size, devices)
  trial = Trial(task=opened, waves=found.waves, places=found.places, inputs=inputs, classifier=classifier, table=table,
                mesh=devices, weights=weights, settings=settings, make_optimizer=optimizer_of(optim),
                augmentation=augment)
  note(f'{task}: {len(opened.clips)} clips used, {len(found.rejected)} that cannot be read, {len(opened.classes)} '
       f'classes; inputs of {inputs.logmel.n_mels} x {inputs.logmel.num_frames(found.waves.samples)}; {devices.size} '
       f'{jax.devices()[0].platform} device(s); ' + (f'starts from {init}' if init else 'starts at random'))
  rows = []
  for number in range(runs):
    for fold in opened.folds or (None,):
      name = f'run{number}' + ('' if fold is None else f'_fold{fold}')
      rows.append({'run': number, 'fold': fold, **trial.run(workdir / name, seed + number, fold)})
      note(f'{task}, {name}: {opened.metric} {100 * rows[-1]["score"]:.2f}%, of epoch {rows[-1]["epoch"]}')
  scores = [np.mean([row['score'] for row in rows if row['run'] == number]) for number in range(runs)]
  mean, interval = mean_and_interval(scores)
  if jax.process_index() == 0:
    report.write(workdir, {
        'job': job, 'task': task, 'metric': opened.metric, 'score': mean, 'interval': interval, 'trials': rows,
        'settings': settings, 'model': {'source': init or 'at random',
                                        'fingerprint': weights.fingerprint if weights else 'at random'},
        'clips': {'used': len(opened.clips), 'rejected': found.rejected}})
    print((workdir / report.TABLE).read_text())


def note(text: str):
  if jax.process_index() == 0:
    print(text, file=sys.stderr, flush=True)


def open_data(workdir, task: str, weights: Weights | None, *, root: str, csv: str | None = None,
              seconds: float | None = None, damaged: str = 'fail', cache: str = '', sample_rate: int = 16000):
  """Opens the task and decodes its recordings -> (Data, rate in Hz).

  What the weights were trained with decides the rate; `sample_rate` is that of a model that starts at random. Test clips
  are cut to the task's seconds; the others, which are cropped anew each epoch, are kept whole up to LONGEST.
  """
  opened = open_task(task, root, csv or None, seconds=seconds)
  check_classes(opened)
  refuse_damaged(opened, missing_files(opened), workdir, damaged)
  rate = weights.sample_rate if weights else sample_rate
  LogMel.for_rate(rate)  # refuses others

  def load(i: int) -> np.ndarray:
    return decode.load(opened.path(opened.clips[i]), rate, kept[i])[0]
  kept = [opened.seconds if clip.split == 'test' else max(opened.seconds, LONGEST) for clip in opened.clips]
  progress = Progress('recordings', len(opened.clips)) if jax.process_index() == 0 else None
  names = [f'{identity} {seconds}' for seconds, identity in zip(kept, _identities(opened))]
  waves = Waves(cache or _cache(workdir), names, load, samples=round(opened.seconds * rate), rate=rate,
                tell=note, note=progress or (lambda done, total: None), part=(jax.process_index(), jax.process_count()))
  if progress:
    progress.close()
  rejected = {opened.clips[i].file: reason for i, reason in waves.rejected.items()}
  places = {clip.file: i for i, clip in enumerate(opened.clips) if i not in waves.rejected}
  if not places:
    raise UserError(f'{root}: none of the {len(rejected)} clips of {task} can be read, the first because '
                    f'{next(iter(rejected.values()))}')
  refuse_damaged(opened, rejected, workdir, damaged)
  used = opened.restrict(set(places))
  notice = check_classes(used)  # again: what is left of the clips may lack a class
  if notice:
    note(notice)
  return Data(used, waves, places, rejected), rate


def _cache(workdir) -> str:
  """Where decoded recordings are kept unless told: with the run, or in the home folder if that is in a store."""
  return os.path.expanduser('~/.cache/m2d_clap_jax/waves') if is_remote(workdir) else os.path.join(workdir, 'waves')


def _identities(task: Task) -> list[str]:
  """Which files these are and in what state: another one under the same name must not be taken from the cache."""
  about = stamps(task.root, [clip.file for clip in task.clips])

  def whole(clip):
    path = task.path(clip)
    return path if is_remote(path) else os.path.abspath(path)
  return [' '.join(map(str, (whole(clip), *about.get(clip.file, ())))) for clip in task.clips]


def make_classifier(options: dict, data: Data, rate: int, weights: Weights | None, augment: Augmentation,
                    last_patch: str):
  """-> (Inputs, Classifier, position table). `options` are fields of M2DCLAP; where there are weights, they are those
  of the weights but for how to compute (dtype, remat, scan) and norm_stats."""
  bound = bind(M2DCLAP, {key: value for key, value in options.items() if key != 'norm_stats'}, 'config.model')
  if weights:
    how = {key: value for key, value in options.items() if key in ('dtype', 'remat', 'scan')}
    network = bind(M2DCLAP, weights.model | how, 'config.model')()
  else:
    network = bound()
  check_model(network)
  logmel = LogMel.for_rate(rate)
  stats = options.get('norm_stats') or (network.norm_stats if weights else measure(data, logmel))
  inputs = Inputs(logmel, tuple(float(x) for x in stats), network.patch_size, last_patch,
                  zero_padded=augment.mixup_on == 'logmel')
  size, (rows, columns) = inputs.size(data.waves.samples), inputs.grid(data.waves.samples)
  if not columns:
    raise UserError(f"config.last_patch='drop': clips of {data.task.seconds} s have {size[1]} frames, less than a patch of "
                    f"{network.patch_size[1]}: take 'pad'")
  if not weights:
    network = network.clone(input_size=size)
  if network.grid[0] != rows:
    raise UserError(f'config.init: the model has {network.input_size[0]} mel bins where log-mels have {logmel.n_mels}')
  table = position_table(network, columns, weights and weights.trees.get('tables', {}).get('pos_embed'))
  network = network.clone(input_size=size, norm_stats=inputs.norm_stats, text_width=None)
  return inputs, Classifier(network, len(data.task.classes), flat=augment.patchout > 0), table


def count_parameters(classifier: Classifier) -> int:
  shapes = jax.eval_shape(classifier.init, jax.random.key(0), jnp.zeros((1, *classifier.pretrained.input_size)))
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes['params']))


def measure(data: Data, logmel: LogMel) -> tuple[float, float]:
  """Mean and standard deviation of the log-mels of some training clips, of all folds where there are folds."""
  train = [data.places[clip.file] for clip in data.task.clips if clip.split in ('train', '')]
  chosen = train[::max(1, len(train) // MEASURED)][:MEASURED]
  sums = np.zeros(3)
  for i in chosen:
    values = logmel.numpy(data.waves.crops([i], [0.0])[0].astype(np.float32) / SCALE).astype(np.float64)
    sums += values.size, values.sum(), np.square(values).sum()
  mean = sums[1] / sums[0]
  return float(mean), math.sqrt(max(sums[2] / sums[0] - mean ** 2, 1e-12))


def optimizer_of(options: dict):
  """{'name': 'sgd', ...} -> function of the learning rate; options that are None are left to the optimizer."""
  options = {key: value for key, value in options.items() if value is not None}
  name = options.pop('name', None)
  if name not in FINE_TUNING:
    raise UserError(f'config.optim.name={name!r}: unknown; known: {", ".join(FINE_TUNING)}')
  return bind(FINE_TUNING[name], options, 'config.optim', given=('learning_rate',))


def make_augmentation(options: dict) -> Augmentation:
  made = bind(Augmentation, options, 'config.augmentation')()
  if made.mixup_on not in ('waves', 'logmel'):
    raise UserError(f"config.augmentation.mixup_on={made.mixup_on!r}: unknown; known: waves, logmel")
  if made.mixup < 0:
    raise UserError(f'config.augmentation.mixup={made.mixup}: Beta(a, a) needs a above 0; 0 is no mixup')
  if not 0 <= made.patchout < 1:
    raise UserError(f'config.augmentation.patchout={made.patchout}: is a share, from 0 to below 1')
  return made
