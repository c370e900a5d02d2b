"""Data sets of TensorFlow Datasets' catalogue as evaluation tasks.

A data set is written once as FLAC files and the metadata CSV that `tasks.metadata` reads. From then on it is a task like
any other: the same errors for damaged files, the same feature cache, random access for fine-tuning (the catalogue's
records can only be read sequentially).
"""
import csv
import io
from collections.abc import Iterator

import numpy as np

from m2d_clap_jax.audio.decode import save_flac
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.paths import as_path, make_folder, write_text
from m2d_clap_jax.progress import Progress
from m2d_clap_jax.tables.published import tenth_of
from m2d_clap_jax.tasks.table import CATALOGUE, Source

REJECTED = 'rejected.csv'


class Rejected(ValueError):
  """A clip that cannot be used; the message is the reason."""


def fetch(task: str, out, *, data_dir: str | None = None, manual_dir: str | None = None) -> str:
  """Downloads and prepares a data set if necessary, and writes it as a task -> one line with the counts.

  The same call resumes an interrupted one.

  Args:
    task: a key of tasks.table.CATALOGUE.
    out: folder that receives SPLIT/CLASS/NUMBER.flac and, at the end, TASK.csv and rejected.csv.
    data_dir: where the catalogue keeps its data; None: ~/tensorflow_datasets.
    manual_dir: folder of archives that must be downloaded by hand.

  Raises:
    UserError: the task is unknown, or its data are unavailable or not as this mapping expects.
  """
  source = CATALOGUE.get(task)
  if source is None:
    raise UserError(f'{task}: unknown task; known: {", ".join(CATALOGUE)}')
  out = as_path(out)
  table = out / f'{task}.csv'
  if table.exists():
    return f'{table}: already exists; delete it to write it again'
  builder = _prepared(source, data_dir, manual_dir)
  check(builder.info.features, list(builder.info.splits), source)
  rows, rejected = [], []
  progress = Progress('clips', sum(builder.info.splits[name].num_examples for name in source.splits))
  for file, label, split, example in _examples(builder, source):
    try:
      part = split or fold_of(example['audio/filename'].decode())
      _write(out / file, example['audio'], source.rate)
      rows.append((file, label, part))
    except Rejected as error:
      rejected.append((file, str(error)))
    progress.step()
  progress.close()
  if not rows:
    raise UserError(f'{task}: none of the {len(rejected)} clips can be used'
                    + (f', the first because {rejected[0][1]}' if rejected else ''))
  if rejected:
    _write_table(out / REJECTED, ('file_name', 'reason'), rejected)
  _write_table(table, ('file_name', 'label', 'fold' if '' in source.splits.values() else 'split'), rows)
  return (f'{table}: {len(rows) + len(rejected)} clips = {len(rows)} written + {len(rejected)} rejected'
          + f' (reasons in {out / REJECTED})' * bool(rejected))


def check(features, splits: list[str], source: Source):
  """Raises UserError if the catalogue's features (a `tfds.features.FeaturesDict`) or splits differ from the mapping."""
  import tensorflow_datasets as tfds
  audio, label = _at(features, ('audio',)), _at(features, source.label)
  wrong = []
  if not isinstance(audio, tfds.features.Audio) or len(audio.shape) != 1:
    wrong.append('its audio is not a single-channel feature')
  elif audio.sample_rate not in (None, source.rate):
    wrong.append(f'its sample rate is {audio.sample_rate} Hz, not {source.rate}')
  if not isinstance(label, tfds.features.ClassLabel):
    wrong.append(f'it has no class label {"/".join(source.label)}')
  if '' in source.splits.values() and not isinstance(_at(features, ('audio/filename',)), tfds.features.Text):
    wrong.append('it has no file names, from which the folds are derived')
  if not set(source.splits) <= set(splits):
    wrong.append(f'its splits are {", ".join(splits)}, not {", ".join(source.splits)}')
  if wrong:
    raise UserError(f'{source.builder}: the catalogue differs from that of tensorflow-datasets 4.9 ({"; ".join(wrong)}): '
                    'use that version')


def fold_of(name: str) -> int:
  """GTZAN file name, such as blues.00042.wav -> one of ten folds, because there are no official splits."""
  fold = tenth_of(name)
  if fold is None:
    raise Rejected(f'no number in its name {name!r}')
  return fold


def samples_of(audio: np.ndarray) -> np.ndarray:
  """The catalogue's audio [S] -> int16 where that is exact, else float32 in [-1, 1]; Rejected if it is invalid."""
  if not len(audio):
    raise Rejected('it has no samples')
  if np.issubdtype(audio.dtype, np.floating):
    if not np.abs(audio).max() <= 1:  # also false for NaN
      raise Rejected('its samples are not within [-1, 1]')
    whole = audio.astype(np.float64) * 32768
    return whole.astype(np.int16) if np.array_equal(whole, np.clip(np.rint(whole), -32768, 32767)) else audio
  if audio.max() > 32767 or audio.min() < -32768:
    raise Rejected('its samples are beyond 16 bits')
  return audio.astype(np.int16)


def _at(tree, path: tuple[str, ...]):
  """tree[path[0]][path[1]]... of a FeaturesDict or an example; None if there is no such entry."""
  for key in path:
    if not hasattr(tree, 'keys') or key not in tree:
      return None
    tree = tree[key]
  return tree


def _prepared(source: Source, data_dir, manual_dir):
  """The builder, with its data on disk."""
  import tensorflow_datasets as tfds
  by_hand = None
  try:
    builder = tfds.builder(source.builder, data_dir=data_dir)
    by_hand = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
    return builder
  except Exception as error:  # the builder's code may raise anything
    # A missing manual folder is an AssertionError, which only names the folder.
    reason = by_hand if by_hand and isinstance(error, AssertionError) else str(error) or type(error).__name__
    hint = 'download it by hand into --manual_dir' if by_hand else 'fix that, or name a --data_dir in which it is prepared'
    raise UserError(f'{source.builder}: its data are not available ({" ".join(reason.split())[:600]}): {hint}') from error


def _examples(builder, source: Source) -> Iterator[tuple[str, str, str, dict]]:
  """Yields file to write, class, split ('' with folds) and example of every clip, always in the same order."""
  import tensorflow_datasets as tfds
  feature = _at(builder.info.features, source.label)
  in_order = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
  for theirs, ours in source.splits.items():
    for i, example in enumerate(tfds.as_numpy(builder.as_dataset(theirs, read_config=in_order))):
      label = feature.int2str(int(_at(example, source.label)))
      yield f'{ours or "audio"}/{label}/{i:06d}.flac', label, ours, example


def _write(path, audio: np.ndarray, rate: int):
  samples = samples_of(audio)
  if path.exists():  # from an interrupted call; files appear under their names only when complete
    return
  try:
    make_folder(path.parent)
    save_flac(path, samples, rate)
  except OSError as error:
    raise UserError(f'{path}: cannot be written ({error.strerror or error}): choose another --out') from error


def _write_table(path, header, rows):
  text = io.StringIO(newline='')
  csv.writer(text, lineterminator='\n').writerows([header, *rows])
  try:
    write_text(path, text.getvalue())
  except OSError as error:
    raise UserError(f'{path}: cannot be written ({error.strerror or error}): choose another --out') from error
