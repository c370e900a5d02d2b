"""Evaluations of a model in training: a data folder in, numbers and figures out.

An evaluator is called with `encode(split) -> (features [n, f * D], audio embeddings [n, E] or None, clips)` and
`project_text(embeddings [C, width]) -> [C, E]`, so that it knows neither models nor devices.
"""
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from m2d_clap_jax import plots
from m2d_clap_jax.data.records import Folder, Split
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.eval.linear import logistic_probe
from m2d_clap_jax.eval.zeroshot import zeroshot
from m2d_clap_jax.options import bind


class Result(NamedTuple):
  """scalars: name -> number. figures: name -> function(path) that draws it."""
  scalars: dict[str, float]
  figures: dict[str, Callable]


class ZeroShot:
  """Zero-shot classification accuracy (M2D-CLAP, section 3.3).

  Args:
    folder, split: prepared data with labels.
    classes: the labels to tell apart, in the order of the figures; all of the split's when left out. A clip's label
      is the one that is among the classes, so clips with labels of several kinds serve several evaluations.
    template: how a label becomes a caption.
  """

  def __init__(self, folder: str, split: str = 'test', classes: Sequence[str] | None = None,
               template: str = '{} can be heard'):
    self.folder = Folder(folder)
    self.split = self.folder.split(split)
    self.classes, self.template = classes and list(classes), template

  def __call__(self, encode, project_text) -> Result:
    _, audio, clips = encode(self.split)
    if audio is None:
      raise UserError('zero-shot evaluation needs a model with a CLAP head: set config.model.text_width, or remove '
                      'it from config.evals')
    classes, labels = _classes_and_labels(clips, self.classes, self.split)
    captions = tuple(self.template.format(name.replace('_', ' ')) for name in classes)
    text = project_text(_embed(_encoder_key(self.folder), captions))
    result = zeroshot(audio, text, labels)
    return Result(
        {'accuracy': result['accuracy'], 'chance': result['chance']},
        {'confusion': functools.partial(plots.confusion_matrix, result['confusion'], classes),
         'similarity': functools.partial(plots.similarity_map, result['class_similarity'], classes, captions)})


class LinearProbe:
  """Accuracy of a logistic regression on frozen clip features; arguments as in `ZeroShot`, C as in scikit-learn."""

  def __init__(self, folder: str, train_split: str = 'train', split: str = 'test',
               classes: Sequence[str] | None = None, C: float = 0.01):
    folder = Folder(folder)
    self.train, self.test = folder.split(train_split), folder.split(split)
    self.classes, self.C = classes and list(classes), C

  def __call__(self, encode, project_text) -> Result:
    del project_text
    train_x, _, clips = encode(self.train)
    classes, train_y = _classes_and_labels(clips, self.classes, self.train)
    test_x, _, clips = encode(self.test)
    _, test_y = _classes_and_labels(clips, classes, self.test)
    result = logistic_probe(train_x, train_y, test_x, test_y, C=self.C)
    return Result({'accuracy': result['accuracy'], 'train_accuracy': result['train_accuracy'],
                   'chance': 1 / len(classes)}, {})


KINDS = {'zeroshot': ZeroShot, 'linear': LinearProbe}


def make_evaluators(specs: dict[str, dict], default_folder: str) -> dict[str, Callable]:
  """{'name': {'kind': 'zeroshot', ...options}} -> {'name': evaluator}; UserError for unknown kinds and options."""
  evaluators = {}
  for name, spec in specs.items():
    spec = {'folder': default_folder, **spec}
    kind = spec.pop('kind', None)
    if kind not in KINDS:
      raise UserError(f'config.evals.{name}.kind: {kind!r} is unknown; known kinds: {", ".join(KINDS)}')
    evaluators[name] = bind(KINDS[kind], spec, f'config.evals.{name}')()
  return evaluators


def _classes_and_labels(clips, classes, split: Split) -> tuple[list[str], np.ndarray]:
  """The class names, and each clip's class number."""
  if classes is None:
    classes = sorted({label for clip in clips for label in clip.labels})
  numbers = {name: i for i, name in enumerate(classes)}
  labels = []
  for clip in clips:
    found = [numbers[label] for label in clip.labels if label in numbers]
    if len(found) != 1:
      raise UserError(f'{clip.key} in split {split.name!r} has {len(found)} labels of the {len(classes)} classes where '
                      'classification needs exactly one: give `classes`, or prepare data with one label a clip')
    labels += found
  return classes, np.asarray(labels)


def _encoder_key(folder: Folder) -> tuple[str, str]:
  if not folder.meta['text_encoder']:
    raise UserError(f'{folder.path}: was prepared without a text encoder, which zero-shot captions need')
  return folder.meta['text_encoder']['name'], folder.meta['text_encoder']['hash']


@functools.lru_cache(maxsize=16)
def _embed(encoder: tuple[str, str], captions: tuple[str, ...]) -> np.ndarray:
  """Embeds captions with the encoder that a data folder names; frozen, so each set is computed once."""
  from m2d_clap_jax.text import TextEncoder
  name, weights_hash = encoder
  text_encoder = TextEncoder(name)
  if text_encoder.weights_hash != weights_hash:
    raise UserError(f'text encoder {name!r} has weights {text_encoder.weights_hash} where the data were prepared with '
                    f'{weights_hash}: use the same weights, or prepare the data again')
  return text_encoder(list(captions))
