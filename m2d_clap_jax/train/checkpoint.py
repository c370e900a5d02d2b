"""Checkpoints: orbax, saved in the background, each with the settings and history position it was made with."""
import contextlib
import functools
import json
import logging
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from m2d_clap_jax import fields
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.options import at_least_one
from m2d_clap_jax.paths import as_path, is_remote, make_folder, move, scheme_of
from m2d_clap_jax.progress import quiet
from m2d_clap_jax.train.sums import bit_sums

DAMAGED = 'damaged_checkpoints'  # beside the good ones
MODEL = 'params', 'target_params', 'frozen', 'tables'  # of a state, what its model consists of; not all states have all
# TensorStore's errors begin with a status. Of FAILED_PRECONDITION only failures to decode are damage.
UNDECODABLE = re.compile(r'^(DATA_LOSS|OUT_OF_RANGE|NOT_FOUND): |^FAILED_PRECONDITION: .*(ZSTD_|Invalid JSON)', re.DOTALL)
STATUS = re.compile(r'^[A-Z]+_[A-Z_]+: |^(UNAVAILABLE|INTERNAL|UNKNOWN|ABORTED): ')  # that TensorStore's errors begin with
SUMS = 'bit_sums'  # of a checkpoint's arrays, in its JSON data
GOOD, BROKEN, UNREADABLE = range(3)  # verdicts on a checkpoint; the worst of all processes' counts


class DamagedError(Exception):
  """A checkpoint of which data are missing or cannot be decoded."""


class Checkpoints:
  """The checkpoints of a run in WORKDIR/checkpoints.

  A checkpoint appears under its final name only when it is complete: a run killed during a save falls back to the one before.

  Args:
    keep: how many of the newest to keep.
    keep_every: also keep every checkpoint whose step is a multiple of this; None for none.
  """

  def __init__(self, workdir, *, keep: int = 2, keep_every: int | None = None):
    at_least_one('config.checkpoints', keep=keep, keep_every=1 if keep_every is None else keep_every)
    self.folder = _folder(workdir)
    self._step: int | None = None  # of the last save
    _set_up_orbax()
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, keep_period=keep_every, cleanup_tmp_directories=True)
    self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=('state', 'meta'))

  def latest(self) -> int | None:
    return self._manager.latest_step()

  def metadata(self) -> dict:
    """JSON data of the newest checkpoint of which they can be read; {} where there is none."""
    for step in sorted(self._manager.all_steps(), reverse=True):
      with contextlib.suppress(Exception):  # `restore` will report it
        return {key: value for key, value in _read_meta(self.folder / str(step)).items() if key != SUMS}
    return {}

  def save(self, state: Any, meta: dict):
    """Saves in the background; `meta` is JSON data. UserError when the disk refuses this or the previous save."""
    step = int(state.step)
    self.wait()
    self._step = step
    try:
      self._manager.save(step, args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(fields.sealed({**meta, SUMS: bit_sums(state)}))))
    except Exception as error:  # orbax, TensorStore and the stores' clients have kinds of their own
      raise self._failed(step, error) from error

  def restore(self, abstract_state: Any) -> tuple[Any, dict]:
    """Restores the newest usable checkpoint onto the shardings of `abstract_state` -> (state, its JSON data).

    One that is damaged is put aside with a note, and the one before is taken, in all processes of the run.

    Raises:
      UserError: the checkpoint's arrays are not those of the configuration, it cannot be read for another reason than
        damage (memory, storage, network), or all checkpoints are damaged.
    """
    while (step := self.latest()) is not None:
      try:
        state, meta = _read_together(lambda step=step: self._read(step, abstract_state), self.folder / str(step))
        _check_sums(state, meta)  # all processes together, which all have read it by now
        return state, meta
      except DamagedError as error:
        self._put_aside(step, error)
    raise UserError(f'{self.folder}: every checkpoint is damaged (they are in {self.folder.parent / DAMAGED}); start '
                    'again with another --workdir')

  def _read(self, step: int, abstract_state: Any) -> tuple[Any, dict]:
    # By orbax's handlers, because its managers wait for all processes, which one that has failed never joins.
    place = self.folder / str(step)
    _check_complete(place)
    with quiet('absl'):
      found, wanted = _shapes(_stored_arrays(place)), _shapes(abstract_state)
    wrong = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if wrong:
      raise UserError(f'{place} does not fit this configuration ({len(wrong)} arrays differ, such as {wrong[0]}: '
                      f'{found.get(wrong[0])} where {wanted.get(wrong[0])} is expected): continue with the configuration '
                      'that it was made with, or use another --workdir')
    state = ocp.StandardCheckpointHandler().restore(place / 'state', args=ocp.args.StandardRestore(abstract_state))
    return state, _read_meta(place)

  def _put_aside(self, step: int, reason: Exception):
    if jax.process_index() == 0:
      place = self.folder.parent / DAMAGED
      make_folder(place)
      move(self.folder / str(step), place / f'{step}-{time.time_ns()}')
      print(f'note: the checkpoint of step {step} is damaged ({reason}) and was moved to {place}; taking the one before',
            file=sys.stderr)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f'put aside {step}')
    self._manager.reload()

  def wait(self):
    """Blocks until the save in the background is on disk."""
    try:
      self._manager.wait_until_finished()
    except Exception as error:  # as in `save`
      raise self._failed(self._step, error) from error

  def close(self):
    self.wait()
    self._manager.close()

  def _failed(self, step, error) -> Exception:
    if not is_remote(self.folder) and not _refused_by_disk(error):
      return error
    reason = ' '.join(str(error).split())
    system = re.search(r'([^:]+) \[os_error_code', reason)  # in TensorStore's words, after pages of them
    reason = system[1].strip() if system else reason[:300]
    return UserError(f'{self.folder}: the checkpoint of step {step} could not be written ({reason}): free disk space '
                     'or permissions are needed; the same command then continues from the last complete checkpoint')


def _refused_by_disk(error: BaseException | None) -> bool:
  while error is not None:
    if isinstance(error, OSError) or STATUS.search(str(error)):
      return True
    error = error.__cause__ or error.__context__
  return False


def _set_up_orbax():
  """Keeps what fails in its threads, and is raised by `Checkpoints`, off the terminal; writes arrays whole."""
  logging.getLogger('absl').addFilter(_not_of_orbax)
  if sys.unraisablehook is sys.__unraisablehook__:
    sys.unraisablehook = _not_of_closed_loops
  handler = ocp.type_handlers.ArrayHandler(use_replica_parallel=jax.process_count() > 1)  # else a program for each shape
  with quiet('absl'):
    ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)


def _not_of_orbax(record) -> bool:
  return record.levelno < logging.ERROR or 'orbax' not in record.pathname


def _not_of_closed_loops(event):
  """When one write fails, orbax closes the event loop that the others come back to."""
  if str(event.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(event)


def _folder(workdir):
  if scheme_of(workdir) not in ('', 'gs'):
    raise UserError(f'{workdir}: checkpoints can be on local disks and in gs:// buckets (of which orbax knows how to '
                    'write arrays): choose such a --workdir')
  return as_path(workdir) / 'checkpoints'


def _check_complete(place: epath.Path):
  """FileNotFoundError where a part of a checkpoint is gone; its name means that it was complete."""
  for name in ('state/_METADATA', 'meta/metadata'):
    if not (place / name).exists():
      raise FileNotFoundError(f'{place / name} is missing')


def _stored_arrays(place: epath.Path):
  """The tree of a checkpoint's arrays, described by shape and type."""
  return ocp.PyTreeCheckpointHandler().metadata(place / 'state').tree


def _shapes(tree) -> dict[str, tuple[int, ...]]:
  return {jax.tree_util.keystr(path, simple=True, separator='/'): tuple(leaf.shape)
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _read_meta(place: epath.Path) -> dict:
  meta = ocp.JsonCheckpointHandler().restore(place / 'meta', args=ocp.args.JsonRestore())
  if not isinstance(meta, dict) or not fields.is_sealed(meta):
    raise DamagedError('its settings are not those that were saved')
  meta.pop(fields.CHECKSUM, None)
  return meta


def _check_sums(state, meta: dict):
  """Takes the sums of the arrays out of a checkpoint's JSON data; DamagedError where they are not those of `state`."""
  known = meta.pop(SUMS, None)  # checkpoints of earlier versions have none
  if known is not None:
    wrong = [name for name, value in bit_sums(state).items() if known.get(name) != value]
    if wrong:
      raise DamagedError(f'{len(wrong)} arrays are not those that were saved, such as {wrong[0]}')


def _read_together(read: Callable[[], Any], place: epath.Path):
  """`read()`, after all processes of the run have agreed that the checkpoint at `place` can be read.

  Raises:
    DamagedError: in every process, where one of them finds data that cannot be decoded and none fails otherwise.
    UserError: in every process, where one of them fails for any other reason.
  """
  result = error = None
  try:
    result = read()
  except Exception as caught:  # every layer below raises its own kinds
    error = caught
  verdict = GOOD if error is None else BROKEN if is_damage(error) else UNREADABLE
  if jax.process_count() > 1:
    verdict = int(multihost_utils.process_allgather(np.int32(verdict)).max())
  if verdict == GOOD:
    return result
  if isinstance(error, UserError):
    raise error
  reason = 'another process cannot read it and says why' if error is None else _first_line(error)
  if verdict == BROKEN:
    raise DamagedError(reason) from error
  raise UserError(f'{place}: cannot be read ({reason}): nothing was changed; when memory, storage, network and '
                  'permissions allow it, the same command continues') from error


DAMAGE = DamagedError, UnicodeDecodeError, json.JSONDecodeError, FileNotFoundError


def is_damage(error: BaseException | None) -> bool:
  """Whether reading failed because data are missing or cannot be decoded; memory, storage and network are no damage."""
  while error is not None:  # orbax wraps what TensorStore raises
    if isinstance(error, DAMAGE) or UNDECODABLE.search(str(error)):
      return True
    error = error.__cause__
  return False


def _first_line(error: BaseException) -> str:
  cause = error.__cause__ or error
  return (str(cause).strip() or type(cause).__name__).splitlines()[0][:300]


def abstract(shapes, shardings):
  """A tree of shapes and one of shardings -> shapes with shardings, as `restore` takes them."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def report_changes(before: dict, now: dict):
  """Prints which settings a run was begun with differ from those that it continues with; both are JSON data, or tuples."""
  before, now = json.loads(json.dumps([before, now]))
  for key in sorted(set(before) | set(now)):
    if before.get(key) != now.get(key) and jax.process_index() == 0:
      print(f'note: config.{key} was {before.get(key)} and is now {now.get(key)}', file=sys.stderr)


def read_parameters(workdir) -> tuple[int, dict, dict]:
  """The newest usable checkpoint's step, those of its arrays that make up the model (see MODEL) and JSON data.

  The optimizer stays unread, and nothing in the workdir is touched: a run may be going on there. A checkpoint that is
  damaged is reported, and the one before is taken, in all processes.

  Raises:
    UserError: there is no complete checkpoint, all are damaged, or one cannot be read for another reason than damage.
  """
  folder = _folder(workdir)
  with quiet('absl'):  # orbax tells what read-only means, each time
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
      steps = sorted(manager.all_steps(), reverse=True)
    for step in steps:
      place = folder / str(step)
      try:
        return step, *_read_together(functools.partial(_read_parameters, place), place)
      except DamagedError as error:
        print(f'note: {place} is damaged ({error})', file=sys.stderr)
  if not steps:
    raise UserError(f'{folder}: holds no complete checkpoint; let the run reach its first save')
  raise UserError(f'{folder}: none of its {len(steps)} checkpoints can be read; use another run, or start this one again')


def _read_parameters(place: epath.Path) -> tuple[dict, dict]:
  _check_complete(place)
  arrays = _stored_arrays(place)
  wanted = {key: arrays[key] for key in MODEL if arrays.get(key)}
  as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
  state = ocp.PyTreeCheckpointHandler().restore(place / 'state', args=ocp.args.PyTreeRestore(
      wanted, restore_args=as_numpy, partial_restore=True))
  meta = _read_meta(place)
  _check_sums(state, meta)
  return {key: state[key] for key in wanted}, meta
