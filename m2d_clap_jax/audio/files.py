"""Finds audio files in folders and runs a model on them in groups of bounded size; unusable files are reported."""
import collections
import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from m2d_clap_jax.audio import decode
from m2d_clap_jax.audio.decode import AudioError
from m2d_clap_jax.audio.inputs import CheckedClip
from m2d_clap_jax.audio.names import ENDINGS, NOT_DECODED, printable
from m2d_clap_jax.audio.pool import STREAM, Pool
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.paths import as_path, files_under, size
from m2d_clap_jax.progress import Progress

# A group's results are in memory at once: frame features of 64 MB of 128 kbit/s mp3 (1.1 hours) are 380 MB for Base.
MOST_FILES, MOST_BYTES = 256, 64e6
T = TypeVar('T')


def reason_of(error: AudioError, name: str) -> str:
  """Why a file cannot be used, without its name and without the advice about a table's rows, which does not apply."""
  return re.sub(r'(; replace it|,)? or drop its row$', '', str(error).removeprefix(f'{as_path(name)}: '))


def find(paths: Sequence[str]) -> list[str]:
  """Files and folders, which are searched recursively except hidden ones -> unique file names, in order.

  Raises:
    UserError: a folder without audio files.
  """
  names: dict[str, None] = {}
  for path in paths:
    found = _search(path) if as_path(path).is_dir() else [path]
    if not found:
      raise UserError(f'{path}: the folder contains no audio files ({" ".join(ENDINGS)}); name another, or single files')
    names |= dict.fromkeys(found)
  return list(names)


def results(names: Sequence[str], function: Callable) -> Iterator[tuple[str, object, str | None, Progress]]:
  """Runs function(clips) -> one result a clip over all files; yields (name, result or None, reason or None, progress).

  A file that takes its decoder too long, or ends its process, is left out like a damaged one.

  function: a method of `Pipeline`. Progress is shown meanwhile; print through its `write`.
  """
  progress = Progress('files', len(names))
  with Pool(STREAM, 1) as pool, contextlib.closing(progress):
    stream = pool.stream if len(names) > 1 else decode.stream  # a single one keeps nothing waiting

    def read(name: str, *arguments):
      try:
        yield from stream(name, *arguments)
      except AudioError as error:
        progress.write(f'left out: {printable(name)}: {reason_of(error, name)}', sys.stderr)
        raise
      finally:
        progress.step()
    for group in in_groups(names, _bytes):
      clips = [CheckedClip(name, None, 0, read) for name in group]
      for clip, result in zip(clips, function(clips), strict=True):
        reason = reason_of(clip.error, clip.name) if clip.error else None
        yield clip.name, None if reason else result, reason, progress


def _search(folder: str) -> list[str]:
  folder = os.fspath(as_path(folder))
  visible = [name for name in files_under(folder) if not any(part.startswith('.') for part in name.split('/'))]
  others = collections.Counter(ending for name in visible if (ending := os.path.splitext(name)[1].lower()) in NOT_DECODED)
  if others:
    listed = ', '.join(f'{count} {ending}' for ending, count in others.items())
    print(f'{folder}: {others.total()} files cannot be decoded and are skipped ({listed})', file=sys.stderr)
  return [os.path.join(folder, name) for name in visible if name.lower().endswith(ENDINGS)]


def in_groups(items: Iterable[T], bytes_of: Callable[[T], int]) -> Iterator[list[T]]:
  """Consecutive groups of at most MOST_FILES items and, unless one alone has more, MOST_BYTES."""
  group: list[T] = []
  total = 0
  for item in items:
    item_size = bytes_of(item)
    if group and (len(group) == MOST_FILES or total + item_size > MOST_BYTES):
      yield group
      group, total = [], 0
    group.append(item)
    total += item_size
  if group:
    yield group


def _bytes(name: str) -> int:
  try:
    return size(name)
  except OSError:  # missing, which reading it will report, or not on this machine
    return 0
