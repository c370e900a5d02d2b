"""The training loop for every kind of training: connects batches, an update, periodic actions and checkpoints."""
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax

from m2d_clap_jax import sharding
from m2d_clap_jax.data.batches import prefetch
from m2d_clap_jax.train.checkpoint import Checkpoints, abstract, report_changes
from m2d_clap_jax.train.faults import Guards, Preempted
from m2d_clap_jax.train.log import RunLog, RunningMetrics, StepProgress

norm = jax.jit(optax.tree.norm)  # of parameters, for log rows: in every update it would be a hundredth of one on a CPU


class Every(NamedTuple):
  """An action `do(step, state, log)`, called every `steps` steps and after the last, in every process.

  at_start: whether a new run also does it before its first update.
  """
  steps: int
  do: Callable[[int, Any, RunLog], None]
  at_start: bool = False


def train(state, update: Callable, batches: Callable[[int], dict], *, workdir, saved: Checkpoints, guards: Guards,
          mesh, total: int, batch_size: int, learning_rate: Callable, log_every: int, save_every: int,
          actions: Sequence[Every] = (), metadata: Callable[[], dict] = dict, rows: Sequence[dict] = (),
          description: str = '', wandb: str | None = None, settings: dict | None = None):
  """Trains from `state.step` to step `total`, logging and saving in `workdir` -> the last state.

  The same state, batches and update give the same run, regardless of interruptions.

  Args:
    state: any state with `step` and `params`.
    update: (state, arrays, step from 0 as a Python int) -> (state, metrics as of `RunningMetrics`), `loss` among them and
      `grad_norm`.
    batches: step from 0 -> this process's part of the batch, as numpy arrays; called in threads, ahead of time.
    guards: see `faults.guards`; entered before anything that can hang.
    batch_size: samples per update over all processes, for the logged rate.
    learning_rate: function of the step from 0, for the log.
    actions: performed in this order, each before the checkpoint of its step; a new run saves step 0 if it has some at its
      start.
    metadata: returns JSON data for a checkpoint about to be saved.
    rows: metrics since the last log row, from the checkpoint of `state`, whose JSON data contain them as 'window'.
    description: of the run, printed at its start. wandb, settings: as in `RunLog`.

  Raises:
    UserError: a loss or gradient is not finite, or the disk refuses a checkpoint.
    Preempted: SIGTERM was received; the state is saved.
  """
  first, new = int(state.step), saved.latest() is None
  step = first
  with contextlib.ExitStack() as stack:
    log = stack.enter_context(RunLog(workdir, None if new else first, active=jax.process_index() == 0, wandb=wandb,
                                     settings=settings))
    feed = stack.enter_context(contextlib.closing(prefetch(batches, first, total)))
    metrics, progress = RunningMetrics(batch_size, rows, saved.latest), StepProgress(first, total, log)
    if description:
      log.note(description)

    def due(steps: int) -> bool:
      return step % steps == 0 or step == total

    def save():
      metrics.check()
      if saved.latest() != step:
        log.sync()
        saved.save(state, {**metadata(), 'window': metrics.rows})

    def act(chosen):
      for action in chosen:
        if due(action.steps):
          metrics.check()
          action.do(step, state, log)
      if due(save_every):
        save()

    at_start = [action for action in actions if action.at_start]
    if new and at_start:
      act(at_start)
    for step in range(first + 1, total + 1):
      with metrics.waiting():
        arrays = sharding.to_devices(mesh, next(feed))
      if step == first + 1:
        log.note('compiling the update ...')
        began = time.monotonic()
      state, values = update(state, arrays, step - 1)
      metrics.add(values)
      if step == first + 1:
        progress.show_first(step, jax.device_get(values), time.monotonic() - began)
      if due(log_every):
        row = {'param_norm': float(norm(state.params)), 'learning_rate': float(learning_rate(step - 1))} | metrics.flush()
        log.write(step, row)
        progress.show(step, row)
      with metrics.uncounted():
        act(actions)
      guards.watchdog.beat(f'step {step}')  # on an accelerator steps are only dispatched here, but at most a few ahead
      if guards.preemption.reached():
        save()
        saved.close()
        raise Preempted(f'{workdir}: stopped after step {step} of {total}, which is saved; the same command continues')
    saved.close()
    log.note(f'done: {total} steps, checkpoints in {saved.folder}')
  return state


def create_or_restore(saved: Checkpoints, create: Callable[[], Any], mesh, settings: dict) -> tuple[Any, dict]:
  """Creates a new state or restores the newest, divided over the mesh -> (state, the checkpoint's JSON data or {}).

  Reports which settings differ from the checkpoint's. UserError as in `Checkpoints.restore`.
  """
  shapes = jax.eval_shape(create)
  shardings = sharding.of_state(shapes, mesh)
  if saved.latest() is None:
    return jax.jit(create, out_shardings=shardings)(), {}  # never whole on one device
  state, meta = saved.restore(abstract(shapes, shardings))
  report_changes(meta['settings'], settings)
  return state, meta
