"""Labelled clips to evaluate on: a metadata CSV and a folder of audio, with splits or folds, or a published data set.

The CSV has `file_name`, `label`, and either `split` (train, valid or val, test) or `fold` (a number), as EVAR writes
them, or neither. A comma separates the labels of a clip. For retrieval it has `caption`, one row a caption, and needs no `label`.
"""
import dataclasses
import functools
import os
import re
import sys

import numpy as np

from m2d_clap_jax.errors import UserError
from m2d_clap_jax.paths import as_path, is_remote, stamps
from m2d_clap_jax.tables.entries import OUTSIDE, Contents, Entry, parse_columns, read_entries
from m2d_clap_jax.tables.published import Absent, read_published
from m2d_clap_jax.tasks.division import drawn_tests
from m2d_clap_jax.tasks.names import captions_of, read_names
from m2d_clap_jax.tasks.table import PUBLISHED, TASKS, Settings

SPLITS = ('train', 'valid', 'test')
SYNONYMS = {'val': 'valid', 'validation': 'valid'}  # the first in EVAR's metadata of AudioCaps and Clotho


@dataclasses.dataclass(frozen=True)
class Clip:
  """file: relative to the task's root; split: one of SPLITS, '' with folds; captions: for retrieval."""
  file: str
  labels: tuple[str, ...] = ()
  split: str = ''
  fold: int | None = None
  captions: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Task:
  """A task; classes are sorted. seconds: that clips are cut or padded to, None for whole clips; metric: 'accuracy' or
  'mAP', of the labels; captions: for zero-shot classification, one a class; folds: () with splits; names: of the
  classes, as people read them."""
  name: str
  root: str
  clips: tuple[Clip, ...]
  classes: tuple[str, ...]
  seconds: float | None
  metric: str
  captions: tuple[str, ...]
  folds: tuple[int, ...] = ()
  names: tuple[str, ...] = ()

  @functools.cached_property
  def stamps(self) -> dict[str, tuple[int, str]]:
    """`paths.stamps` of the clips' files, taken when first asked for."""
    return stamps(self.root, [clip.file for clip in self.clips])

  @property
  def multi_label(self) -> bool:
    return self.metric == 'mAP'

  def path(self, clip: Clip) -> str:
    return os.path.join(self.root, clip.file)

  def targets(self, clips) -> np.ndarray:
    """-> float32 [n, C], 1 where a clip has the label."""
    number = {name: i for i, name in enumerate(self.classes)}
    out = np.zeros((len(clips), len(self.classes)), np.float32)
    for row, clip in zip(out, clips):
      row[[number[label] for label in clip.labels]] = 1
    return out

  def splits(self, fold: int | None = None) -> dict[str, list[Clip]]:
    """-> {'train', 'valid', 'test'} clips; with a fold, its clips are the test and all others the training clips."""
    if fold is None:
      return {name: [clip for clip in self.clips if clip.split == name] for name in SPLITS}
    return {'train': [clip for clip in self.clips if clip.fold != fold], 'valid': [],
            'test': [clip for clip in self.clips if clip.fold == fold]}

  def restrict(self, files: set[str]) -> 'Task':
    """The same task with these files alone."""
    return dataclasses.replace(self, clips=tuple(clip for clip in self.clips if clip.file in files))


def open_task(name: str, root: str, csv_file: str | None = None, *, columns: str = '', seconds: float | None = None,
              crop: float | None = None, template: str | None = None, names: str | None = None, whole: bool = False,
              tests: bool = False) -> Task:
  """Reads a task's metadata; the audio itself is not opened.

  Args:
    name: a task of the paper (tasks.table.TASKS), or any other name for a CSV of one's own.
    root: folder that file names are relative to.
    csv_file: metadata; None looks for ROOT/NAME.csv and ROOT/../../evar/metadata/NAME.csv, as in an EVAR work folder, and
      then whether ROOT is the data set as its makers publish it.
    columns: names of the metadata's columns as in 'file_name:filename,label:category', where they are not ours.
    seconds: length of a clip; for tasks that the table does not have `crop`, that of the model, if it is left out.
    template: how a label becomes a zero-shot caption.
    names: CSV of display names for labels that are AudioSet's machine identifiers, with its columns mid, display_name.
    whole: clips are neither cut nor padded, as retrieval has it.
    tests: only test clips are asked for, which are all of a table without parts.

  Raises:
    UserError: says which file, column or row is wrong.
  """
  settings = TASKS.get(name)
  if whole and seconds is not None:
    raise UserError(f'config.data.seconds={seconds}: retrieval is of whole clips; leave it out')
  if settings is None and seconds is None and not whole:
    if not crop:
      raise UserError(f'config.task={name}: is none of {", ".join(TASKS)}; for a task of your own also give '
                      'config.data.seconds, the length of its clips')
    print(f'config.data.seconds={crop:g}: clips are as long as those that the model was trained on', file=sys.stderr)
    seconds = crop
  settings = settings or Settings(seconds, None)
  root = os.fspath(as_path(root))
  path = csv_file or _find(name, root)
  if columns and not path:
    raise UserError(f'config.data.columns={columns}: of which table? Give it as config.data.csv=FILE')
  clips = read_metadata(path, root, columns, parts=not tests) if path else _read_published(name, root)
  path = path or root
  _check_files(root, [clip for clip in clips if clip.split == 'test'] or clips, path)  # which every evaluation needs
  classes = tuple(sorted({label for clip in clips for label in clip.labels}))
  display = read_names(names) if names else {}
  return Task(
      name=name, root=root, clips=tuple(clips), classes=classes,
      seconds=None if whole else seconds or settings.seconds, metric=_metric(name, clips, settings),
      captions=captions_of(classes, settings, template, display),
      names=tuple(display.get(label, label) for label in classes),
      folds=tuple(sorted({clip.fold for clip in clips if clip.fold is not None})))


def check_classes(task: Task) -> str:
  """A classifier can be trained on the task and scored: UserError names what it lacks otherwise.

  Returns:
    what is to be told all the same, else '': with folds, labels whose clips are all in one fold cannot be learned when
    that fold is the test. They count as wrong, as they do in EVAR; a split's test clip with such a label is an error.
  """
  check_all_have(task, 'labels')
  if len(task.classes) < 2:
    raise UserError(f'{task.name}: all clips have the one label {task.classes[0]!r}: there is nothing to tell apart')
  lost, count = {}, 0
  for fold in task.folds or (None,):
    where = '' if fold is None else f' when fold {fold} is the test'
    parts = task.splits(fold)
    for name in ('train', 'test'):
      if not parts[name]:
        raise UserError(f'{task.name}: has no {name} clips{where}')
    known = {label for clip in parts['train'] for label in clip.labels}
    for clip in parts['valid'] + parts['test']:
      unknown = [label for label in clip.labels if label not in known]
      if unknown and fold is None:
        raise UserError(f'{task.name}: {clip.file} in {clip.split} has the label {unknown[0]!r}, which no training '
                        'clip has: correct the label, add training clips, or delete the rows')
      lost.update(dict.fromkeys(unknown))
      count += bool(unknown)
  if not lost:
    return ''
  some = ', '.join(list(lost)[:3]) + (', ...' if len(lost) > 3 else '')
  return (f'{task.name}: {count} clips have labels of one fold alone ({len(lost)} of {len(task.classes)}: {some}), '
          'which cannot be learned when it is the test')


def check_all_have(task: Task, kind: str):
  """Each clip has what an evaluation is about, kind: 'labels' or 'captions'; UserError names one that has not."""
  without = [clip.file for clip in task.clips if not getattr(clip, kind)]
  if without and len(without) == len(task.clips):
    job, column = ('retrieval', 'label') if kind == 'labels' else ('zeroshot', 'caption')
    raise UserError(f'{task.name}: has no {kind}: add the column {column} to its CSV, or use configs/{job}.py')
  if without:
    raise UserError(f'{task.name}: {len(without)} of {len(task.clips)} clips have no {kind}, such as {without[0]}: '
                    'complete or delete their rows')


def read_metadata(path: str, root: str = '.', columns: str = '', *, parts: bool = True) -> list[Clip]:
  """A metadata CSV -> clips, rows of the same file joined; UserError naming the row that is wrong.

  parts: a table without split and fold has training clips all the same; else all of it are test clips.
  """
  option = 'config.data.columns'
  return clips_of(read_entries(path, root, parse_columns(columns, option), folds=True, option=option), path, parts)


def clips_of(contents: Contents, path: str, parts: bool = True) -> list[Clip]:
  """The same of rows that were read; what is to be reported about them is printed on stderr."""
  for note in contents.notes:
    print(note, file=sys.stderr)
  found: dict[str, Clip] = {}
  undivided = all(entry.split is None and entry.fold is None for entry in contents.entries)
  if undivided and not parts:
    print(f'note: {path}: has neither split nor fold: all its clips are test clips', file=sys.stderr)
  for entry in contents.entries:
    where = f'{path} {entry.where}'
    clip = _clip(dataclasses.replace(entry, split='test') if undivided else entry, where)
    before = found.get(clip.file)
    if before is None:
      found[clip.file] = clip
    elif (before.split, before.fold) != (clip.split, clip.fold):
      raise UserError(f'{where}: {clip.file} was in {before.split or before.fold} above and is in '
                      f'{clip.split or clip.fold} here: a clip belongs to one part')
    else:
      found[clip.file] = dataclasses.replace(
          before, labels=tuple(dict.fromkeys(before.labels + clip.labels)), captions=before.captions + clip.captions)
  return _divided(found, path) if undivided and parts else list(found.values())


def _divided(clips: dict[str, Clip], path: str) -> list[Clip]:
  tests = drawn_tests({file: clip.labels for file, clip in clips.items()})
  print(f'note: {path}: has neither split nor fold: {len(tests)} of its {len(clips)} clips, a fifth of each class, are test clips '
        '(where clips have a source in common, such as a speaker, divide them yourself in a column split)', file=sys.stderr)
  return [dataclasses.replace(clip, split='test' if file in tests else 'train') for file, clip in clips.items()]


def _clip(entry: Entry, where: str) -> Clip:
  if entry.reason and not entry.missing:  # missing recordings are counted later, with those that cannot be read
    named = f'{entry.file[:200]}: ' if entry.reason == OUTSIDE else ''
    raise UserError(f'{where}: {named}{entry.reason}: correct or delete the row')
  if not entry.labels and not entry.captions:
    raise UserError(f'{where}: label or caption is empty: complete or delete the row')
  part = {}
  if entry.split is not None:
    split = SYNONYMS.get(entry.split.lower(), entry.split.lower())
    if split not in SPLITS:
      raise UserError(f'{where}: split {entry.split[:50]!r} is none of {", ".join(SPLITS)}')
    part['split'] = split
  elif re.fullmatch(r'[0-9]{1,9}', entry.fold or ''):
    part['fold'] = int(entry.fold)
  else:
    raise UserError(f'{where}: fold {str(entry.fold)[:50]!r} is no number')
  return Clip(entry.file, labels=tuple(entry.labels), captions=tuple(entry.captions), **part)


def _metric(name: str, clips: list[Clip], settings: Settings) -> str:
  """The table's; else a clip of several labels makes it 'mAP'."""
  several = next((clip for clip in clips if len(clip.labels) > 1), None)
  if settings.metric == 'accuracy' and several:
    raise UserError(f'{name}: is scored by accuracy, so that a clip has one label, and {several.file} has '
                    f'{len(several.labels)} ({", ".join(several.labels)}): correct it, or give the task another name')
  return settings.metric or ('mAP' if several else 'accuracy')


def _places(name: str, root: str) -> list[str]:
  """Where the metadata of a task may lie."""
  return [os.path.join(root, f'{name}.csv')] + [  # a store has no '..'
      os.path.join(root, '..', '..', 'evar', 'metadata', f'{name}.csv')] * (not is_remote(root))


def _find(name: str, root: str) -> str:
  return next((place for place in _places(name, root) if as_path(place).exists()), '')


def _read_published(name: str, root: str) -> list[Clip]:
  """The clips of a data set as its makers publish it, where there is no metadata CSV."""
  like, why = PUBLISHED.get(name), ''
  try:
    if like:
      return clips_of(read_published(root, like, root, option='config.task', tenths=True), root)
  except Absent as error:
    why = f', and {error}'
  raise UserError(f'config.data.root={root}: no metadata there ({" or ".join(_places(name, root))}): give '
                  f'config.data.csv=FILE{why}')


def _check_files(root: str, clips: list[Clip], path: str):
  """A few missing files are left out later, and counted; when most are missing the folder is the wrong one."""
  if not clips:
    raise UserError(f'{path}: contains no clips')
  some = clips[::max(1, len(clips) // 50)]
  missing = [clip.file for clip in some if not as_path(os.path.join(root, clip.file)).exists()]
  if 2 * len(missing) > len(some):
    raise UserError(f'config.data.root={root}: {len(missing)} of {len(some)} files looked for are not there, such as '
                    f'{missing[0]}: is it the folder that {path} is about?')
