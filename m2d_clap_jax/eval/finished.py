"""Evaluates a finished model on a task: linear, zero-shot and retrieval; results go to the workdir."""
import functools
import sys

import numpy as np

from m2d_clap_jax import api
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.eval import class_plots, linear_protocol, metrics, report
from m2d_clap_jax.eval.linear_protocol import Protocol
from m2d_clap_jax.eval.metrics import normalise, zeroshot
from m2d_clap_jax.options import bind
from m2d_clap_jax.progress import Progress
from m2d_clap_jax.tasks.clips import Features, extract, missing_files, refuse_damaged, summary
from m2d_clap_jax.tasks.metadata import Task, check_all_have, check_classes, open_task
from m2d_clap_jax.tasks.names import unnamed
from m2d_clap_jax.tasks.table import TASKS
from m2d_clap_jax.workdir import own_workdir


def run(config, workdir: str):
  """Evaluates a model according to `config` (see configs/linear.py, zeroshot.py, retrieval.py)."""
  settings = config.to_dict()
  bind(evaluate, settings, 'config', given=('workdir',))(workdir)


def evaluate(workdir: str, *, job: str, task: str, init: str, data: dict, seed: int, model: dict, protocol: dict):
  """Every argument is a key of the configuration, which documents it."""
  settings = {key: value for key, value in locals().items() if key != 'workdir'}
  if not init:
    raise UserError('config.init is empty: name the model, a run, portable folder, .pth, .safetensors or released name')
  if not data.get('root'):
    raise UserError('config.data.root is empty: name the folder of the audio')
  if job == 'linear':
    protocol = {'protocol': Protocol.of(protocol, 'config.protocol')}
  function = bind(KINDS[job], protocol, 'config.protocol', given=('opened', 'extracted', 'pipeline', 'seed', 'folder'))
  data = dict(data)
  damaged = data.pop('damaged', 'fail')
  load = functools.cache(lambda: api.load(init, **{key: value for key, value in model.items() if value}))
  needed = not data.get('seconds') and task not in TASKS and job != 'retrieval'
  opened = bind(open_data, data, 'config.data', given=('task', 'whole', 'tests', 'crop'))(
      task, whole=job == 'retrieval', tests=job != 'linear', crop=load().weights.crop_seconds if needed else None)
  if job != 'linear':  # training clips only contribute classes
    opened = opened.restrict({clip.file for clip in test_clips(opened)})
  check(job, opened)
  with own_workdir(workdir) as folder:
    refuse_damaged(opened, missing_files(opened), folder, damaged)
    pipeline = load()
    report.refuse_other(folder, pipeline.fingerprint)
    if job != 'linear' and pipeline.network.text_width is None:
      raise UserError(f'{pipeline.weights.source}: has no CLAP head, which {job} needs; linear evaluation does not')
    whole = opened
    opened, extracted = extract(pipeline, opened, folder / 'features', seed=seed)
    refuse_damaged(whole, extracted.rejected, folder, damaged)
    notice = check(job, opened)  # again, because the remaining clips may lack a class
    if notice:
      print(notice, file=sys.stderr)
    print(summary(opened, extracted), file=sys.stderr)
    result = function(opened, extracted, pipeline, seed, folder)
    report.write(folder, {
        'job': job, 'task': task, 'metric': opened.metric, **result, 'settings': settings,
        'model': {'source': pipeline.weights.source, 'fingerprint': pipeline.fingerprint},
        'clips': {'used': len(extracted.files), 'rejected': extracted.rejected}, 'notice': notice})
    print((folder / report.TABLE).read_text())


def check(job: str, opened: Task) -> str:
  """Raises UserError if a task does not fit the kind of evaluation -> a notice for the user, or ''."""
  if job == 'linear':
    return check_classes(opened)
  if not test_clips(opened):
    raise UserError(f'{opened.name}: has no test clips')
  check_all_have(opened, 'captions' if job == 'retrieval' else 'labels')
  if job == 'zeroshot' and unnamed(opened.captions):
    raise UserError(f'{opened.name}: {unnamed(opened.captions)!r} is not a caption: give config.data.names=FILE, AudioSet\'s '
                    'class_labels_indices.csv, for the names of its labels')
  return ''


def test_clips(opened: Task) -> list:
  """The clips of the test split, or of all folds together."""
  return [clip for clip in opened.clips if opened.folds or clip.split == 'test']


def open_data(task: str, *, root: str, csv: str | None = None, columns: str = '', seconds: float | None = None,
              template: str | None = None, names: str | None = None, whole: bool, tests: bool,
              crop: float | None = None) -> Task:
  """`config.data` -> the task, as by `open_task`, in which an empty text means that nothing is given. Raises UserError."""
  return open_task(task, root, csv or None, columns=columns, seconds=seconds, template=template, names=names or None,
                   whole=whole, tests=tests, crop=crop)


def linear(opened: Task, extracted: Features, pipeline, seed: int, folder, *, protocol: Protocol) -> dict:
  """The paper's linear evaluation: one layer per fold and run; each run's score is the mean over the folds."""
  del pipeline
  targets = opened.targets(opened.clips)
  number = {clip.file: i for i, clip in enumerate(opened.clips)}
  folds = opened.folds or (None,)
  splits = [{name: np.array([number[clip.file] for clip in clips], int)
             for name, clips in opened.splits(fold).items()} for fold in folds]
  problems = linear_protocol.problems_of(targets, splits, protocol.runs, seed)
  progress = Progress('epochs')
  outcomes = linear_protocol.run(extracted.features, targets, problems, seed=seed, multi_label=opened.multi_label,
                                 protocol=protocol, progress=progress)
  progress.close()
  scores = np.array([outcome.test_score for outcome in outcomes]).reshape(len(folds), protocol.runs)
  mean, interval = linear_protocol.mean_and_interval(scores.mean(axis=0))
  first = range(0, len(problems), protocol.runs)
  per_class = class_plots.draw_classes(
      folder, opened.classes, np.concatenate([targets[problems[i].test] for i in first]),
      np.concatenate([outcomes[i].scores for i in first]), multi_label=opened.multi_label,
      title=f'{opened.name}, linear, first run')
  class_plots.embedding_map(extracted.features, targets.argmax(axis=1), opened.classes, folder / 'embeddings.png',
                            title=f'{opened.name}: clip embeddings (t-SNE)')
  return {'score': mean, 'interval': interval, 'chance': metrics.chance(opened.targets(test_clips(opened))),
          'scores': [{'fold': fold, 'runs': row.tolist()} for fold, row in zip(folds, scores)],
          'epochs': [outcome.epochs for outcome in outcomes], 'per_class_of_first_run': per_class}


def zero_shot(opened: Task, extracted: Features, pipeline, seed: int, folder, *, templates: tuple = ()) -> dict:
  """Zero-shot classification of the test clips; those of all folds are scored together.

  templates: captions for each label, averaged; without them the task's captions.
  """
  del seed
  clips = test_clips(opened)
  _, audio = extracted.of(clips)
  text = (pipeline.encode_labels(opened.names, templates) if templates
          else pipeline.encode_labels(opened.captions, '{}'))
  targets = opened.targets(clips)
  per_class = class_plots.draw_classes(folder, opened.classes, targets, normalise(audio) @ normalise(text).T,
                                       multi_label=opened.multi_label, title=f'{opened.name}, zero-shot')
  if opened.multi_label:
    return {'score': float(np.mean(list(per_class.values()))), 'chance': metrics.chance(targets), 'per_class': per_class}
  result = zeroshot(audio, text, targets.argmax(axis=1))
  class_plots.similarity_map(result['class_similarity'], opened.classes, opened.names if templates else opened.captions,
                             folder / 'similarity.png', title=f'{opened.name}: {class_plots.MEAN_COSINES}')
  return {'score': result['accuracy'], 'chance': result['chance'], 'per_class': per_class}


def retrieval(opened: Task, extracted: Features, pipeline, seed: int, folder) -> dict:
  """Audio-to-text and text-to-audio retrieval over whole test clips, each with all its captions."""
  del seed, folder
  clips = test_clips(opened)
  _, audio = extracted.of(clips)
  captions = [(i, text) for i, clip in enumerate(clips) for text in clip.captions]
  text = pipeline.encode_text([caption for _, caption in captions])
  similarity = normalise(audio) @ normalise(text).T
  both = metrics.audio_text_retrieval(similarity, np.array([i for i, _ in captions]))
  return {'metric': 'R@1', 'score': both['text_to_audio']['R@1'], **both, 'captions': len(captions)}


KINDS = {'linear': linear, 'zeroshot': zero_shot, 'retrieval': retrieval}
