"""A task's decoded recordings, and a matching classifier."""
import math
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m2d_clap_jax import sharding
from m2d_clap_jax.audio import LogMel, decode
from m2d_clap_jax.audio.pool import STREAM, Pool
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.models import M2DCLAP
from m2d_clap_jax.models.classifier import Classifier, position_table
from m2d_clap_jax.models.m2d_clap import HOW
from m2d_clap_jax.options import bind
from m2d_clap_jax.paths import is_remote
from m2d_clap_jax.progress import Progress
from m2d_clap_jax.tasks.clips import missing_files, refuse_damaged
from m2d_clap_jax.tasks.decoded import SCALE, Waves
from m2d_clap_jax.tasks.metadata import Task, check_classes, open_task
from m2d_clap_jax.train.finetune_step import Augmentation, Inputs
from m2d_clap_jax.train.optim import FINE_TUNING
from m2d_clap_jax.train.pretrain import check_model
from m2d_clap_jax.train.same_data import check_parts, refuse_other
from m2d_clap_jax.weights import Weights

LONGEST = 300.0  # seconds kept of a recording: more than in any of the paper's tasks, and too little to fill the disk
MEASURED = 1000  # clips from which the statistics of the log-mels are computed


class Data(NamedTuple):
  """task: of the clips that can be read; waves: of all; places: {file: number in waves}; rejected: {file: reason}; parts:
  what a run records of each clip (see `same_data`)."""
  task: Task
  waves: Waves
  places: dict[str, int]
  rejected: dict[str, str]
  parts: dict[str, list]

  def numbers(self, clips) -> np.ndarray:
    """Numbers of clips in `waves`, int [n]."""
    return np.array([self.places[clip.file] for clip in clips])

  def lengths(self, numbers: np.ndarray) -> np.ndarray:
    """Numbers of samples of the clips' crops that are not padding, int32 [n]."""
    return np.minimum(self.waves.lengths[numbers], self.waves.samples).astype(np.int32)


def note(text: str):
  """A line on stderr, by the first process."""
  if jax.process_index() == 0:
    print(text, file=sys.stderr, flush=True)


def open_data(workdir, task: str, weights: Weights | None, *, beat: Callable[[str], None], root: str,
              csv: str | None = None, columns: str = '', seconds: float | None = None, damaged: str = 'fail', cache: str = '',
              sample_rate: int = 16000):
  """Opens the task and decodes its recordings -> (Data, rate in Hz).

  The rate is that of the weights, or `sample_rate` for a model that starts from random weights. Test clips are cut to the
  task's seconds; the others, which are cropped anew each epoch, are kept whole up to LONGEST. `beat` is called with a
  description for each decoded recording.
  """
  opened = open_task(task, root, csv or None, columns=columns, seconds=seconds,
                     crop=weights.crop_seconds if weights else None)
  check_classes(opened)
  refuse_damaged(opened, missing_files(opened), workdir, damaged)
  rate = weights.sample_rate if weights else sample_rate
  LogMel.for_rate(rate)  # refuses others

  def load(i: int) -> np.ndarray:
    return decode.load(opened.path(opened.clips[i]), rate, kept[i], read=pool.stream)[0]
  kept = [opened.seconds if clip.split == 'test' else max(opened.seconds, LONGEST) for clip in opened.clips]
  progress = Progress('recordings', len(opened.clips)) if jax.process_index() == 0 else None

  def decoded(done: int, total: int):
    beat(f'recording {done} was decoded')
    if progress:
      progress(done, total)
  names = [f'{identity} {seconds}' for seconds, identity in zip(kept, _identities(opened))]
  with Pool(STREAM) as pool:
    waves = Waves(cache or _cache(workdir), names, load, samples=round(opened.seconds * rate), rate=rate,
                  report_space=note, report_progress=decoded, part=(jax.process_index(), jax.process_count()))
  if progress:
    progress.close()
  rejected = {opened.clips[i].file: reason for i, reason in waves.rejected.items()}
  places = {clip.file: i for i, clip in enumerate(opened.clips) if i not in waves.rejected}
  if not places:
    raise UserError(f'{root}: none of the {len(rejected)} clips of {task} can be read, the first because '
                    f'{next(iter(rejected.values()))}')
  refuse_damaged(opened, rejected, workdir, damaged)
  used = opened.restrict(set(places))
  notice = check_classes(used)  # again, because the remaining clips may lack a class
  if notice:
    note(notice)
  return Data(used, waves, places, rejected, _parts(used, opened.stamps)), rate


def _cache(workdir) -> str:
  """Default folder of decoded recordings: in the workdir, or in the home folder if the workdir is in a store."""
  return os.path.expanduser('~/.cache/m2d_clap_jax/waves') if is_remote(workdir) else os.path.join(workdir, 'waves')


def _identities(task: Task) -> list[str]:
  """Path, size and time of each file, so that the cache notices a different file with the same name."""
  def whole(clip):
    path = task.path(clip)
    return path if is_remote(path) else os.path.abspath(path)
  return [' '.join(map(str, (whole(clip), *task.stamps.get(clip.file, ())))) for clip in task.clips]


def _parts(task: Task, stamps: dict[str, tuple[int, str]]) -> dict[str, list]:
  sizes, times = zip(*(stamps[clip.file] for clip in task.clips))
  return {'file': [clip.file for clip in task.clips], 'labels': [','.join(clip.labels) for clip in task.clips],
          'part': [clip.split or f'fold {clip.fold}' for clip in task.clips], 'bytes': list(sizes), 'modified': list(times)}


def check_data(before: dict, found: Data):
  """Whether the workdir's trainings continue with the data that they began with; `before` is their record, {} for new ones.

  UserError for another number of clips or other classes; a notice for other labels, parts or files.
  """
  if not before:
    return
  root, classes, own = found.task.root, set(found.task.classes), set(before['classes'])
  refuse_other(root, 'classes that differ', sorted(classes - own), sorted(own - classes))
  mean, deviation = before['norm_stats']
  check_parts('clips', root, found.parts['file'], found.parts, before['parts'],
              f'its own mean {mean:.4f} and deviation {deviation:.4f}, and what is finished')


def make_classifier(options: dict, data: Data, rate: int, weights: Weights | None, augment: Augmentation,
                    last_patch: str):
  """-> (Inputs, Classifier, position table). `options` are fields of M2DCLAP; with weights, only dtype, remat and
  norm_stats are used and the others come from the weights."""
  bound = bind(M2DCLAP, {key: value for key, value in options.items() if key != 'norm_stats'}, 'config.model')
  if weights:
    how = {key: value for key, value in options.items() if key in HOW}
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
                    f"{network.patch_size[1]}: use 'pad'")
  if not weights:
    network = network.clone(input_size=size)
  if network.grid[0] != rows:
    raise UserError(f'config.init: the model has {network.input_size[0]} mel bins, but log-mels have {logmel.n_mels}')
  table = position_table(network, columns, weights and weights.trees.get('tables', {}).get('pos_embed'))
  network = network.clone(input_size=size, norm_stats=inputs.norm_stats, text_width=None)
  return inputs, Classifier(network, len(data.task.classes), flat=augment.patchout > 0), table


def count_parameters(classifier: Classifier) -> int:
  """The number of values that are trained; nothing is computed."""
  shapes = jax.eval_shape(classifier.init, jax.random.key(0), jnp.zeros((1, *classifier.pretrained.input_size)))
  return sharding.count_elements(shapes['params'])


def measure(data: Data, logmel: LogMel) -> tuple[float, float]:
  """Mean and standard deviation of the log-mels of some training clips, or of clips of all folds."""
  train = [data.places[clip.file] for clip in data.task.clips if clip.split in ('train', '')]
  chosen = train[::max(1, len(train) // MEASURED)][:MEASURED]
  sums = np.zeros(3)
  for i in chosen:
    values = logmel.numpy(data.waves.crops([i], [0.0])[0].astype(np.float32) / SCALE).astype(np.float64)
    sums += values.size, values.sum(), np.square(values).sum()
  mean = sums[1] / sums[0]
  return float(mean), math.sqrt(max(sums[2] / sums[0] - mean ** 2, 1e-12))


def optimizer_of(options: dict):
  """{'name': 'sgd', ...} -> function of the learning rate; options that are None keep the optimizer's defaults."""
  options = {key: value for key, value in options.items() if value is not None}
  name = options.pop('name', None)
  if name not in FINE_TUNING:
    raise UserError(f'config.optim.name={name!r}: unknown; known: {", ".join(FINE_TUNING)}')
  return bind(FINE_TUNING[name], options, 'config.optim', given=('learning_rate',))


def make_augmentation(options: dict) -> Augmentation:
  """`config.augmentation` -> Augmentation; UserError for a key or value that it does not have."""
  made = bind(Augmentation, options, 'config.augmentation')()
  if made.mixup_on not in ('waves', 'logmel'):
    raise UserError(f"config.augmentation.mixup_on={made.mixup_on!r}: unknown; known: waves, logmel")
  if made.mixup < 0:
    raise UserError(f'config.augmentation.mixup={made.mixup}: Beta(a, a) needs a above 0; 0 is no mixup')
  if not 0 <= made.patchout < 1:
    raise UserError(f'config.augmentation.patchout={made.patchout}: must be a share from 0 to below 1')
  return made
