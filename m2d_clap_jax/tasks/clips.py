"""Features of a task's clips, extracted once per model and cached."""
import contextlib
import csv
import hashlib
import io
import json
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from m2d_clap_jax import paths
from m2d_clap_jax.audio.decode import AudioError, load
from m2d_clap_jax.audio.files import in_groups
from m2d_clap_jax.audio.inputs import CheckedClip
from m2d_clap_jax.audio.pool import STREAM, Pool
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.progress import Progress
from m2d_clap_jax.tasks.metadata import Clip, Task

GROUP = 256  # clips in memory at a time
REJECTED = 'rejected.csv'


class Features(NamedTuple):
  """files: of the readable clips, in the task's order; features [n, f * D]; audio [n, E] or None.

  rejected: {file: reason} of the others.
  """
  files: list[str]
  features: np.ndarray
  audio: np.ndarray | None
  rejected: dict[str, str]

  def of(self, clips: list[Clip]) -> tuple[np.ndarray, np.ndarray | None]:
    """The rows of some clips."""
    number = {file: i for i, file in enumerate(self.files)}
    rows = [number[clip.file] for clip in clips]
    return self.features[rows], None if self.audio is None else self.audio[rows]


def extract(model, task: Task, cache, *, seed: int = 0) -> tuple[Task, Features]:
  """Features of a task's clips -> the task restricted to its readable clips, and their features.

  A clip is cut or padded with silence to the task's seconds: test clips and those of folds from their start, training
  and validation clips from a random position. Without seconds it is used whole, decoded as it is processed. The
  features are cached in `cache` under the model's fingerprint and the files' names, sizes and times.

  Args:
    model: `api.Pipeline`.
    cache: folder; made if needed.
    seed: of the random positions.

  Raises:
    UserError: no clip can be read, features are not finite, or the cache cannot be written.
  """
  path = paths.as_path(cache) / f'{task.name}-{_key(model, task, seed)}.npz'
  extracted = _load(path)
  if extracted is None:
    extracted = _compute(model, task, seed)
    _save(path, extracted)
  return task.restrict(set(extracted.files)), extracted


def refuse_damaged(task: Task, rejected: dict[str, str], folder, damaged: str):
  """Ends an evaluation that lacks clips, because its score would be for other data; damaged='skip' continues.

  Args:
    rejected: {file: reason}; all are listed in FOLDER/rejected.csv.

  Raises:
    UserError: states how many clips are missing and names some.
  """
  if damaged not in ('fail', 'skip'):
    raise UserError(f'config.data.damaged={damaged!r}: unknown; use fail or skip')
  listed = paths.as_path(folder) / REJECTED
  if not rejected:
    listed.unlink(missing_ok=True)
    return
  rows = io.StringIO(newline='')
  csv.writer(rows, lineterminator='\n').writerows([('file_name', 'reason'), *rejected.items()])
  paths.write_text(listed, rows.getvalue())
  if damaged == 'fail':
    some = ', '.join(list(rejected)[:3]) + (', ...' if len(rejected) > 3 else '')
    raise UserError(f'{task.name}: {len(rejected)} of {len(task.clips)} clips cannot be read ({some}; all with reasons '
                    f'in {listed}): restore them, or leave them out with config.data.damaged=skip')


def missing_files(task: Task) -> dict[str, str]:
  """{file: reason} of missing clips, to report them before the others are decoded."""
  return {clip.file: 'no such file' for clip in task.clips if clip.file not in task.stamps}


def wave_of(path: str, clip: Clip, seconds: float, rate: int, seed: int, read=None) -> np.ndarray:
  """A clip's samples [seconds * rate], float32; their start depends only on clip and seed. `read`: see `load`."""
  size = round(seconds * rate)
  if clip.split not in ('train', 'valid'):
    wave, _ = load(path, rate, seconds, read=read)
  else:
    wave, _ = load(path, rate, read=read)
    spare = len(wave) - size
    if spare > 0:
      digest = hashlib.sha256(f'{seed}/{clip.file}'.encode()).digest()
      start = np.random.default_rng(int.from_bytes(digest[:8])).integers(spare + 1)
      wave = wave[start:start + size]
  return np.pad(wave[:size], (0, size - len(wave[:size])))


def _compute(model, task: Task, seed: int) -> Features:
  rejected: dict[str, str] = {}
  files: list[str] = []
  rows: list[list] = []
  with Pool(STREAM) as pool, contextlib.closing(Progress('clips', len(task.clips))) as progress:
    for group in _whole(task, pool) if task.seconds is None else _cut(task, model.sample_rate, seed, pool):
      read = {file: clip for file, clip in group.items() if not clip.error}
      outputs = model.features(list(read.values())) if read else ()
      good = [not clip.error for clip in read.values()]  # known for whole clips only now
      rejected |= {file: str(clip.error) for file, clip in group.items() if clip.error}
      if any(good):
        readable = [file for file, clip in read.items() if not clip.error]
        rows.append([None if kind is None else kind[good] for kind in outputs])
        _check_finite(rows[-1], readable)
        files += readable
      progress(len(files) + len(rejected), len(task.clips))
  if not files:
    raise UserError(f'{task.root}: none of the {len(task.clips)} clips of {task.name} can be read, the first because '
                    f'{next(iter(rejected.values()))}')
  features, audio = zip(*rows)
  return Features(files, np.concatenate(features), None if audio[0] is None else np.concatenate(audio), rejected)


def _cut(task: Task, rate: int, seed: int, pool: Pool) -> Iterator[dict[str, CheckedClip]]:
  """Yields {file: clip of the task's seconds}, GROUP at a time, decoding the next group meanwhile."""
  def decode(clip: Clip) -> CheckedClip:
    made = CheckedClip(clip.file, None, rate)
    try:
      return made._replace(wave=wave_of(task.path(clip), clip, task.seconds, rate, seed, pool.stream))
    except AudioError as error:
      made.error = error
      return made
  waiting: list = []
  for i in range(0, len(task.clips) + GROUP, GROUP):
    now, waiting = waiting, [pool.threads.submit(decode, clip) for clip in task.clips[i:i + GROUP]]
    if now:
      yield {future.result().name: future.result() for future in now}


def _whole(task: Task, pool: Pool) -> Iterator[dict[str, CheckedClip]]:
  """Yields {file: whole clip}; only one clip is decoded at a time, in blocks."""
  for group in in_groups(task.clips, lambda clip: task.stamps.get(clip.file, (0, ''))[0]):
    yield {clip.file: CheckedClip(task.path(clip), None, 0, pool.stream) for clip in group}


def _check_finite(row: list, files: list[str]):
  for kind in row:
    if kind is not None and not np.isfinite(kind).all():
      first = int(np.argmin(np.isfinite(kind).all(axis=1)))
      raise UserError(f'{files[first]}: the model gives NaN or infinite features for it: its weights are damaged or '
                      'diverged in training; use an earlier checkpoint')


def _key(model, task: Task, seed: int) -> str:
  digest = hashlib.sha256(json.dumps(
      [model.fingerprint, model.sample_rate, task.seconds, seed, *filter(None, [model.padded_to])]).encode())
  for clip in task.clips:
    part = clip.split if clip.split in ('train', 'valid') else ''
    digest.update(json.dumps([clip.file, part, task.stamps.get(clip.file)]).encode())
  return digest.hexdigest()[:16]


def _load(path) -> Features | None:
  if not path.exists():
    return None
  with paths.local_copy(path) as name, np.load(name) as content:
    about = json.loads(str(content['about']))
    return Features(about['files'], content['features'], content['audio'] if 'audio' in content else None,
                    about['rejected'])


def _save(path, extracted: Features):
  arrays = {'features': extracted.features} | ({} if extracted.audio is None else {'audio': extracted.audio})
  try:
    with paths.replacing(path) as name, open(name, 'wb') as file:
      np.savez(file, about=json.dumps({'files': extracted.files, 'rejected': extracted.rejected}), **arrays)
  except OSError as error:
    raise UserError(f'{path.parent}: the features cannot be written ({error}): choose another --workdir') from error


def summary(task: Task, extracted: Features) -> str:
  """One line with the numbers of used and rejected clips."""
  total = len(extracted.files) + len(extracted.rejected)
  return f'{task.name}: {total} clips = {len(extracted.files)} used + {len(extracted.rejected)} that cannot be read'
