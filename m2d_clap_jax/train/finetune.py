"""The fine-tuning driver: from a configuration and a task to trained classifiers and their scores."""
import json
import math
import sys

import jax
import numpy as np
from etils import epath

from m2d_clap_jax.audio import LogMel, io
from m2d_clap_jax.data.tasks import Task, open_task
from m2d_clap_jax.data.waves import SCALE, Waves
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.models import M2DCLAP
from m2d_clap_jax.models.classifier import Classifier, position_table
from m2d_clap_jax.options import bind
from m2d_clap_jax.train import sharding
from m2d_clap_jax.train.finetune_step import Augmentation, Inputs
from m2d_clap_jax.train.optim import FINE_TUNING
from m2d_clap_jax.train.pretrain import count_parameters, make_workdir
from m2d_clap_jax.train.trial import Trial
from m2d_clap_jax.weights import Weights, read

MEASURED = 1000  # clips that the statistics of the log-mels are taken from


def run(config, workdir: str):
  """Fine-tunes as `config` (see configs/finetune.py) says, or continues what was begun in `workdir`."""
  bind(finetune, config.to_dict(), 'config', given=('workdir',))(workdir)


def finetune(workdir: str, *, job: str, seed: int, init: str, task: dict, data: dict, model: dict, batch_size: int,
             epochs: int, schedule: dict, optim: dict, freeze_patch_embed: bool, augmentation: dict, sampling: dict,
             runs: int, mesh: dict, checkpoints: dict, log_every: int, save_every: int, evals_every: int) -> dict:
  """Every argument is a key of the configuration and explained there. Returns what results.json gets."""
  settings = {key: value for key, value in locals().items() if key != 'workdir'}
  for key in ('batch_size', 'epochs', 'runs', 'log_every', 'save_every', 'evals_every'):
    if settings[key] < 1:
      raise UserError(f'config.{key}={settings[key]}: must be at least 1')
  workdir = make_workdir(workdir)
  opened = bind(open_task, task, 'config.task')()
  weights = read(init) if init else None
  waves, rate = bind(open_waves, data, 'config.data', given=('workdir', 'task', 'weights'))(workdir, opened, weights)
  inputs, classifier, table = make_classifier(model, opened, waves, rate, weights, bool(augmentation.get('patchout')))
  devices = bind(sharding.mesh_for, mesh, 'config.mesh', given=('parameters',))(count_parameters(classifier.pretrained))
  sharding.check_batch(batch_size, devices)
  trial = Trial(task=opened, waves=waves, inputs=inputs, classifier=classifier, table=table, mesh=devices,
                weights=weights, settings=settings, make_optimizer=optimizer_of(optim),
                augmentation=make_augmentation(augmentation))
  note(f'{opened.name}: {len(opened.clips)} clips, {len(opened.classes)} classes, {opened.metric}; inputs of '
       f'{inputs.logmel.n_mels} x {inputs.logmel.num_frames(waves.samples)}; {devices.size} '
       f'{jax.devices()[0].platform} device(s); ' + (f'starts from {init}' if init else 'starts at random'))
  rows = []
  for number in range(runs):
    for fold in opened.folds or (None,):
      name = f'run{number}' + ('' if fold is None else f'_fold{fold}')
      rows.append({'run': number, 'fold': fold, **trial.run(workdir / name, seed + number, fold)})
      note(f'{opened.name}, {name}: {opened.metric} {100 * rows[-1]["score"]:.2f}% (epoch {rows[-1]["epoch"]})')
      write_results(workdir, opened, rows)
  results = write_results(workdir, opened, rows)
  note(f'{opened.name}: {opened.metric} {100 * results["score"]:.2f}%'
       + (f' +- {100 * results["ci95"]:.2f}' if runs > 1 else '') + f', in {workdir / "results.json"}')
  return results


def note(text: str):
  if jax.process_index() == 0:
    print(text, file=sys.stderr, flush=True)


def open_waves(workdir, task: Task, weights: Weights | None, *, cache: str = '', sample_rate: int = 16000):
  """Decodes the task's recordings -> (Waves in the order of task.clips, rate in Hz).

  What the weights were trained with decides the rate; `sample_rate` is that of a model that starts at random.
  """
  rate = weights.sample_rate if weights else sample_rate
  LogMel.for_rate(rate)
  root = epath.Path(task.root)

  def load(i: int) -> np.ndarray:
    return io.load(root / task.clips[i].file, rate, task.seconds)[0]
  waves = Waves(cache or workdir / 'waves', [clip.file for clip in task.clips], load,
                samples=round(task.seconds * rate), rate=rate,
                note=lambda done, total: note(f'decoded {done} of {total} recordings'))
  return waves, rate


def make_classifier(options: dict, task: Task, waves: Waves, rate: int, weights: Weights | None, flat: bool):
  """-> (Inputs, Classifier, position table). `options` are fields of M2DCLAP; where there are weights, they are those
  of the weights but for how to compute (dtype, remat, scan) and norm_stats."""
  if weights:
    how = {key: value for key, value in options.items() if key in ('dtype', 'remat', 'scan')}
    network = bind(M2DCLAP, weights.model | how, 'config.model')()
  else:
    network = bind(M2DCLAP, {key: value for key, value in options.items() if key != 'norm_stats'}, 'config.model')()
  logmel = LogMel.for_rate(rate)
  stats = options.get('norm_stats') or (network.norm_stats if weights else measure(task, waves, logmel))
  inputs = Inputs(logmel, tuple(float(x) for x in stats), network.patch_size)
  rows, columns = inputs.grid(waves.samples)
  size = logmel.n_mels, columns * network.patch_size[1]
  if not weights:
    network = network.clone(input_size=size)
  if network.grid[0] != rows:
    raise UserError(f'config.init: the model has {network.input_size[0]} mel bins where log-mels have {logmel.n_mels}')
  table = position_table(network, columns, weights and weights.trees.get('tables', {}).get('pos_embed'))
  network = network.clone(input_size=size, norm_stats=inputs.norm_stats, text_width=None)
  return inputs, Classifier(network, len(task.classes), flat=flat), table


def measure(task: Task, waves: Waves, logmel: LogMel) -> tuple[float, float]:
  """Mean and standard deviation of the log-mels of some clips that are trained on in every fold or split."""
  train = [i for i, clip in enumerate(task.clips) if clip.split in ('train', '')]
  chosen = train[::max(1, len(train) // MEASURED)][:MEASURED]
  sums = np.zeros(3)
  for i in chosen:
    values = logmel.numpy(waves[i].astype(np.float32) / SCALE).astype(np.float64)
    sums += values.size, values.sum(), np.square(values).sum()
  mean = sums[1] / sums[0]
  return float(mean), math.sqrt(max(sums[2] / sums[0] - mean ** 2, 1e-12))


def optimizer_of(options: dict):
  """{'name': 'sgd', ...} -> function of the learning rate."""
  options = dict(options)
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


def write_results(workdir, task: Task, rows: list[dict]) -> dict:
  """results.json: every trial, and the mean over runs of the mean over folds with its 95% confidence interval."""
  numbers = sorted({row['run'] for row in rows})
  scores = [float(np.mean([row['score'] for row in rows if row['run'] == number])) for number in numbers]
  results = {'task': task.name, 'metric': task.metric, 'score': float(np.mean(scores)), 'ci95': interval(scores),
             'runs': scores, 'trials': rows}
  if jax.process_index() == 0:
    partial = workdir / '.results.json.tmp'
    partial.write_text(json.dumps(results, indent=2) + '\n')
    partial.replace(workdir / 'results.json')
  return results


def interval(scores: list[float]) -> float | None:
  """Half of the 95% confidence interval of the mean by Student's t; None for a single run."""
  if len(scores) < 2:
    return None
  from scipy import stats
  return float(stats.t.ppf(0.975, len(scores) - 1) * np.std(scores, ddof=1) / math.sqrt(len(scores)))
