"""Checkpoints: orbax, saved in the background, each with the settings and history position it was made with."""
import json
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from m2d_clap_jax.errors import UserError
from m2d_clap_jax.options import at_least_one
from m2d_clap_jax.paths import as_path, is_remote, make_folder, move, scheme_of
from m2d_clap_jax.quiet import quiet
from m2d_clap_jax.train.state import TrainState

DAMAGED = 'damaged_checkpoints'  # beside the good ones
TENSORSTORE_REFUSALS = ('PERMISSION_DENIED', 'UNAUTHENTICATED', 'UNAVAILABLE', 'DEADLINE_EXCEEDED', 'RESOURCE_EXHAUSTED')


class Checkpoints:
  """The checkpoints of a run in WORKDIR/checkpoints.

  A checkpoint appears under its final name only when it is complete, so a run killed during a save falls back to the
  one before.

  Args:
    keep: how many of the newest to keep.
    keep_every: also keep every checkpoint whose step is a multiple of this; None for none.
  """

  def __init__(self, workdir, *, keep: int = 2, keep_every: int | None = None):
    at_least_one('config.checkpoints', keep=keep, keep_every=1 if keep_every is None else keep_every)
    self.folder = _folder(workdir)
    # TensorStore and gcsfs have kinds of their own for what a store refuses.
    self._refusals = Exception if is_remote(self.folder) else OSError
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, keep_period=keep_every, cleanup_tmp_directories=True)
    self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=('state', 'meta'))

  def latest(self) -> int | None:
    return self._manager.latest_step()

  def save(self, state: TrainState, meta: dict):
    """Saves in the background; `meta` is JSON data. UserError when the disk refuses this or the previous save."""
    step = int(state.step)
    try:
      self._manager.save(step, args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)))
    except self._refusals as error:
      raise self._failed(step, error) from error

  def restore(self, abstract_state: TrainState) -> tuple[TrainState, dict]:
    """Restores the newest usable checkpoint onto the shardings of `abstract_state` -> (state, its JSON data).

    One that is damaged is put aside, saying so, and the one before is taken.

    Raises:
      UserError: the checkpoint's arrays are not those of the configuration, or all checkpoints are damaged.
    """
    while (step := self.latest()) is not None:
      try:
        item = self._manager.restore(step, args=ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract_state), meta=ocp.args.JsonRestore()))
        return item['state'], item['meta']
      except Exception as error:  # every layer below raises its own kinds for a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        if is_remote(self.folder) and _is_refusal(error):
          raise UserError(f'{self.folder / str(step)}: the store does not give it ({reason}): check the network and your '
                          'rights, and give the same command again') from error
        if self._differs(step, abstract_state):
          raise UserError(f'{self.folder / str(step)} does not fit this configuration ({reason}): continue with the '
                          'configuration that it was made with, or use another --workdir') from error
        self._put_aside(step, reason)
    raise UserError(f'{self.folder}: every checkpoint is damaged (they are in {self.folder.parent / DAMAGED}); start '
                    'again with another --workdir')

  def _differs(self, step: int, abstract_state: TrainState) -> bool:
    """Whether a checkpoint's arrays have other names or shapes than wanted; False where it does not even tell them."""
    try:
      with quiet('absl'), ocp.PyTreeCheckpointer() as checkpointer:
        found = checkpointer.metadata(self.folder / str(step) / 'state').item_metadata.tree
    except Exception:  # as in `restore`
      return False

    def shapes(tree):
      return {jax.tree_util.keystr(path, simple=True, separator='/'): tuple(leaf.shape)
              for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    return shapes(found) != shapes(abstract_state)

  def _put_aside(self, step: int, reason: str):
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
    except self._refusals as error:
      raise self._failed(self.latest(), error) from error

  def close(self):
    self.wait()
    self._manager.close()

  def _failed(self, step, error) -> UserError:
    reason = ' '.join(str(error).split())[:300]
    return UserError(f'{self.folder}: the checkpoint of step {step} could not be written ({reason}): free disk space '
                     'or permissions are needed; the same command then continues from the last complete checkpoint')


def _folder(workdir):
  if scheme_of(workdir) not in ('', 'gs'):
    raise UserError(f'{workdir}: checkpoints can be on local disks and in gs:// buckets (of which orbax knows how to '
                    'write arrays): choose such a --workdir')
  return as_path(workdir) / 'checkpoints'


def _is_refusal(error: Exception) -> bool:
  """Whether a store failed, rather than held something damaged."""
  return (isinstance(error, OSError) and not isinstance(error, FileNotFoundError) or type(error).__name__ == 'HttpError'
          or any(code in str(error) for code in TENSORSTORE_REFUSALS))


def abstract(shapes, shardings):
  """A tree of shapes and one of shardings -> shapes with shardings, as `restore` takes them."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def tell_changes(before: dict, now: dict):
  """Tells which settings a run was begun with differ from those that it goes on with; both are JSON data, or tuples."""
  before, now = json.loads(json.dumps([before, now]))
  for key in sorted(set(before) | set(now)):
    if before.get(key) != now.get(key) and jax.process_index() == 0:
      print(f'note: config.{key} was {before.get(key)} and is now {now.get(key)}', file=sys.stderr)


def read_parameters(workdir) -> tuple[int, dict, dict, dict]:
  """The newest usable checkpoint's step, parameters, target parameters (numpy arrays) and JSON data.

  The optimizer stays unread, and nothing in the workdir is touched: a run may be going on there. A checkpoint that is
  damaged is told, and the one before is taken.

  Raises:
    UserError: there is no complete checkpoint, or all are damaged.
  """
  folder = _folder(workdir)
  with quiet('absl'), ocp.CheckpointManager(  # orbax tells what read-only means, each time
      folder, options=ocp.CheckpointManagerOptions(read_only=True),
      item_handlers={'state': ocp.PyTreeCheckpointHandler(), 'meta': ocp.JsonCheckpointHandler()}) as manager:
    steps = sorted(manager.all_steps(), reverse=True)
    for step in steps:
      try:
        return step, *_read_step(manager, step)
      except Exception as error:  # as in `Checkpoints.restore`
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        print(f'note: {folder / str(step)} is damaged ({reason})', file=sys.stderr)
  if not steps:
    raise UserError(f'{folder}: holds no complete checkpoint; let the run reach its first save')
  raise UserError(f'{folder}: none of its {len(steps)} checkpoints can be read; use another run, or start this one again')


def _read_step(manager: ocp.CheckpointManager, step: int) -> tuple[dict, dict, dict]:
  shapes = manager.item_metadata(step)['state'].tree
  wanted = {key: shapes[key] for key in ('params', 'target_params') if shapes.get(key)}
  as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
  item = manager.restore(step, args=ocp.args.Composite(
      state=ocp.args.PyTreeRestore(wanted, restore_args=as_numpy, partial_restore=True), meta=ocp.args.JsonRestore()))
  return item['state']['params'], item['state'].get('target_params', {}), item['meta']
