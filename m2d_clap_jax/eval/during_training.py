"""Evaluations of a model in training: a prepared folder in, numbers and figures out.

An evaluator is called with `encode(split) -> (features [n, f * D], audio embeddings [n, E] or None, clips)` and
`project_text(embeddings [C, width]) -> [C, E]`, so that it knows neither models nor devices; and with `embed(captions) ->
[C, E]` where the text encoder is in training, too, else None: then frozen embeddings count.
"""
import functools
import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from m2d_clap_jax import paths, sharding
from m2d_clap_jax.data.read import Folder, Split
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.eval import class_plots, linear_protocol, metrics, plots
from m2d_clap_jax.eval.encode import SplitEncoder
from m2d_clap_jax.eval.linear_protocol import Protocol
from m2d_clap_jax.eval.logistic_probe import logistic_probe
from m2d_clap_jax.eval.metrics import normalise, statistics, zeroshot
from m2d_clap_jax.models import M2DCLAP
from m2d_clap_jax.options import bind
from m2d_clap_jax.weights.core import pooling_of

STATISTICS_CLIPS = 1024


class Result(NamedTuple):
  """scalars: name -> number, the one that counts first. figures: name -> function(path, title) that draws it."""
  scalars: dict[str, float]
  figures: dict[str, Callable]


class ZeroShot:
  """Zero-shot classification (M2D-CLAP, section 3.3): accuracy, or mean average precision with `multi_label`.

  Args:
    folder, split: prepared data with labels.
    classes: the labels to tell apart, in the order of the figures; all of the split's when left out. A clip's label
      is the one that is among the classes, so clips with labels of several kinds serve several evaluations.
    template: how a label becomes a caption; of several the normalised embeddings are averaged.
    multi_label: clips may have any number of the classes.
  """

  def __init__(self, folder: str, split: str = 'test', classes: Sequence[str] | None = None,
               template: str | Sequence[str] = '{} can be heard', multi_label: bool = False):
    self.folder = Folder(folder)
    self.split = self.folder.split(split)
    self.classes, self.multi_label = classes and list(classes), multi_label
    self.templates = (template,) if isinstance(template, str) else tuple(template)

  def __call__(self, encode, project_text, embed=None) -> Result:
    _, audio, clips = encode(self.split)
    _need_clap(audio, 'zero-shot evaluation')
    classes, targets = _targets(clips, self.classes, self.split, self.multi_label)
    names = [name.replace('_', ' ') for name in classes]
    captions = tuple(template.replace('{}', name) for template in self.templates for name in names)
    text = normalise(embed(captions) if embed else project_text(_embed(_encoder_key(self.folder), captions)))
    text = text.reshape(len(self.templates), len(classes), -1).mean(axis=0)
    if self.multi_label:
      precisions = metrics.average_precision(targets, normalise(audio) @ normalise(text).T)
      return Result({'mAP': float(precisions.mean()), 'chance': metrics.chance(targets)},
                    {'classes': functools.partial(class_plots.class_bars, precisions, classes, counts=targets.sum(axis=0),
                                                  chance=targets.mean(axis=0), label='average precision')})
    result = zeroshot(audio, text, targets.argmax(axis=1))
    # Templates are averaged: where there are several, no one caption stands for them.
    columns = captions if len(self.templates) == 1 else names

    def similarity(path, title):
      where = title.partition(':')[0]  # 'NAME, step N', without the accuracy, which is not what this figure shows
      class_plots.similarity_map(result['class_similarity'], classes, columns, path, title=f'{where}: {class_plots.MEAN_COSINES}')
    return Result({'accuracy': result['accuracy'], 'chance': result['chance']},
                  {**_confusion(result['confusion'], classes), 'similarity': similarity})


class Linear:
  """The paper's linear evaluation (`eval.linear_protocol`) on frozen clip features.

  Args:
    folder, classes, multi_label: as in `ZeroShot`.
    train_split, valid_split, split: of the folder; without a valid_split a tenth of the training clips is drawn for it.
    seed: as in `linear_protocol.run`.
  """

  def __init__(self, folder: str, train_split: str = 'train', valid_split: str | None = None, split: str = 'test',
               classes: Sequence[str] | None = None, multi_label: bool = False,
               seed: int = linear_protocol.SEED, protocol: Protocol = Protocol()):
    folder = Folder(folder)
    self.splits = {'train': folder.split(train_split), 'valid': valid_split and folder.split(valid_split),
                   'test': folder.split(split)}
    self.classes, self.multi_label = classes and list(classes), multi_label
    self.seed, self.protocol = seed, protocol

  def __call__(self, encode, project_text, embed=None) -> Result:
    del project_text, embed
    classes, features, targets, rows, start = self.classes, [], [], {'valid': np.array([], int)}, 0
    for name, split in self.splits.items():
      if split:
        x, _, clips = encode(split)
        classes, y = _targets(clips, classes, split, self.multi_label)
        features.append(x)
        targets.append(y)
        rows[name] = np.arange(start, start + len(x))
        start += len(x)
    features, targets = np.concatenate(features), np.concatenate(targets)
    every = linear_protocol.problems_of(targets, [rows], self.protocol.runs, self.seed)
    outcomes = linear_protocol.run(features, targets, every, seed=self.seed, multi_label=self.multi_label,
                                   protocol=self.protocol)
    mean, interval = linear_protocol.mean_and_interval([outcome.test_score for outcome in outcomes])
    scalars = ({'interval': interval} if self.protocol.runs > 1 else {}) | {'chance': metrics.chance(targets[rows['test']])}
    if self.multi_label:
      return Result({'mAP': mean, **scalars}, {})
    matrix = metrics.confusion_matrix(targets[rows['test']].argmax(axis=1), outcomes[0].scores.argmax(axis=1),
                                      len(classes))
    return Result({'accuracy': mean, **scalars},
                  {'confusion': _titled(class_plots.confusion_matrix, matrix, classes, note=' (drawn: the first run)')})


class LogisticProbe:
  """Accuracy of a logistic regression on frozen clip features; arguments as in `ZeroShot`, C as in scikit-learn."""

  def __init__(self, folder: str, train_split: str = 'train', split: str = 'test',
               classes: Sequence[str] | None = None, C: float = 0.01):
    folder = Folder(folder)
    self.train, self.test = folder.split(train_split), folder.split(split)
    self.classes, self.C = classes and list(classes), C

  def __call__(self, encode, project_text, embed=None) -> Result:
    del project_text, embed
    train_x, _, clips = encode(self.train)
    classes, train_y = _targets(clips, self.classes, self.train)
    test_x, _, clips = encode(self.test)
    _, test_y = _targets(clips, classes, self.test)
    result = logistic_probe(train_x, train_y.argmax(axis=1), test_x, test_y.argmax(axis=1), C=self.C)
    matrix = metrics.confusion_matrix(test_y.argmax(axis=1), result['predictions'], len(classes))
    return Result({'accuracy': result['accuracy'], 'train_accuracy': result['train_accuracy'],
                   'chance': 1 / len(classes)}, _confusion(matrix, classes))


class Retrieval:
  """Recall, mAP@10 and median rank of clips and their captions, both ways; the folder's own caption embeddings."""

  def __init__(self, folder: str, split: str = 'test'):
    self.split = Folder(folder).split(split)

  def __call__(self, encode, project_text, embed=None) -> Result:
    _, audio, clips = encode(self.split)
    _need_clap(audio, 'retrieval')
    captions = [clip.captions if embed else () if clip.caption_embeddings is None else np.float32(clip.caption_embeddings)
                for clip in clips]
    counts = list(map(len, captions))
    if not all(counts):
      raise UserError(f'{clips[counts.index(0)].key} in split {self.split.name!r} has no caption'
                      + ('' if embed else ' embeddings') + ', which retrieval needs: prepare the data with captions'
                      + ('' if embed else ' and --text_encoder'))
    text = embed([text for own in captions for text in own]) if embed else project_text(np.concatenate(captions))
    similarity = normalise(audio) @ normalise(text).T
    both = metrics.audio_text_retrieval(similarity, np.repeat(np.arange(len(clips)), counts))
    return Result({f'{direction}/{name}': value for direction in ('text_to_audio', 'audio_to_text')
                   for name, value in both[direction].items()}, {})


KINDS = {'zeroshot': ZeroShot, 'linear': Linear, 'logistic': LogisticProbe, 'retrieval': Retrieval}


def make_evaluators(specs: dict[str, dict], default_folder: str) -> dict[str, Callable]:
  """{'name': {'kind': 'zeroshot', ...options}} -> {'name': evaluator}; UserError for unknown kinds and options."""
  evaluators = {}
  for name, spec in specs.items():
    spec = {'folder': default_folder, **spec}
    kind = spec.pop('kind', None)
    if kind not in KINDS:
      raise UserError(f'config.evals.{name}.kind: {kind!r} is unknown; known kinds: {", ".join(KINDS)}')
    if kind == 'linear':
      spec['protocol'] = Protocol.of(spec.get('protocol', {}), f'config.evals.{name}.protocol')
    evaluators[name] = bind(KINDS[kind], spec, f'config.evals.{name}')()
  return evaluators


class Evaluations:
  """What is measured of a model in training: its methods are actions of `train.loop`.

  Args:
    split: the training clips.
    evaluators: name -> evaluator.
    watchdog: of `train.faults`; scores are computed unwatched, because they may take long and wait for nobody.
    variables: state -> what the model is applied with.
    embed: (state, captions) -> [C, E], where the text encoder is in training.
  """

  def __init__(self, model: M2DCLAP, mesh, split: Split, evaluators: dict[str, Callable], watchdog, *,
               variables: Callable = lambda state: {'params': state.params}, embed: Callable | None = None):
    self._split, self._evaluators, self._watchdog = split, evaluators, watchdog
    self._variables, self._embed = variables, embed
    self._encode = SplitEncoder(model, mesh, watchdog.beat)
    self._project_text = jax.jit(functools.partial(project_text, model=model), out_shardings=sharding.replicated(mesh))

  def statistics(self, step: int, state, log):
    """Logs effective rank and the like of the features of the first training clips."""
    features, _, _ = self._encode(self._variables(state), self._split, STATISTICS_CLIPS)
    log.write(step, {f'features/{name}': value for name, value in statistics(features).items()})
    self._watchdog.beat(f'the statistics of step {step}')

  def evaluate(self, step: int, state, log):
    """Runs the evaluators; logs and prints their scores, draws their figures and the curves so far."""
    variables = self._variables(state)

    def encode(split):
      found = self._encode(variables, split)
      self._watchdog.rest()
      return found
    for name, evaluator in self._evaluators.items():
      scalars, figures = evaluator(encode, functools.partial(self._project_text, variables),
                                   self._embed and functools.partial(self._embed, state))
      self._watchdog.beat(f'evaluation {name} of step {step}')
      log.write(step, {f'{name}/{key}': value for key, value in scalars.items()})
      shown = [f'{key} {value:.1f}' if key.endswith('rank') else f'{key} {100 * value:.1f}%'
               for key, value in scalars.items()]
      log.note(f'step {step}: {name} ' + ', '.join(shown))
      if log.active:
        paths.write_text(log.workdir / f'{name}.json', json.dumps({'step': step, **scalars}, indent=2))
        score = ', '.join(shown[:1] + [each for each in shown[1:] if each.startswith('chance')])
        for key, draw in figures.items():
          draw(log.workdir / f'{name}_{key}.png', title=f'{name}, step {step}: {score}')
    if log.active and step:
      plots.loss_curves(log.history(), log.workdir / 'curves.png', title=log.workdir.name)


def project_text(variables, text, *, model: M2DCLAP):
  """Sentence embeddings [C, text width] -> [C, E] in the space shared with audio, not normalised."""
  return model.apply(variables, text, method='project_text')


def _targets(clips, classes, split: Split, multi_label: bool = False) -> tuple[list[str], np.ndarray]:
  """The class names, and for each clip which it has: float32 [n, C]."""
  if classes is None:
    classes = sorted({label for clip in clips for label in clip.labels})
  numbers = {name: i for i, name in enumerate(classes)}
  targets = np.zeros((len(clips), len(classes)), np.float32)
  for row, clip in zip(targets, clips):
    row[[numbers[label] for label in clip.labels if label in numbers]] = 1
    if not multi_label and row.sum() != 1:
      raise UserError(f'{clip.key} in split {split.name!r} has {int(row.sum())} labels of the {len(classes)} classes '
                      'where classification needs exactly one: give `classes`, prepare data with one label a clip, or '
                      'set multi_label')
  return classes, targets


def _need_clap(audio, what: str):
  if audio is None:
    raise UserError(f'{what} needs a model with a CLAP head: set config.model.text_width, or remove it from '
                    'config.evals')


def _confusion(matrix, classes) -> dict[str, Callable]:
  return {'confusion': functools.partial(class_plots.confusion_matrix, matrix, classes)}


def _titled(draw, *args, note: str):
  """A figure whose title gets a note."""
  return lambda path, title: draw(*args, path, title=title + note)


def _encoder_key(folder: Folder) -> tuple[str, str | None]:
  if not folder.meta['text_encoder']:
    raise UserError(f'{folder.path}: was prepared without a text encoder, which zero-shot captions need')
  return folder.meta['text_encoder']['name'], folder.meta['text_encoder']['hash']


@functools.lru_cache(maxsize=16)
def _embed(encoder: tuple[str, str | None], captions: tuple[str, ...]) -> np.ndarray:
  """Embeds captions with the encoder that a data folder names; frozen, so each set is computed once."""
  from m2d_clap_jax.text import TextEncoder
  name, weights_hash = encoder
  text_encoder = TextEncoder(name, pooling='mean' if weights_hash else pooling_of(name, 'mean'))
  if weights_hash and text_encoder.weights_hash != weights_hash:
    raise UserError(f'text encoder {name!r} has weights {text_encoder.weights_hash} where the data were prepared with '
                    f'{weights_hash}: use the same weights, or prepare the data again')
  return text_encoder(list(captions))
