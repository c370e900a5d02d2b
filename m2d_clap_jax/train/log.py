"""Logs the means of a run's metrics to TensorBoard files, metrics.jsonl, Weights & Biases and a line on the terminal."""
import contextlib
import json
import math
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from m2d_clap_jax import paths
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.train.events import Events

HISTORY = 'metrics.jsonl'
LOSSES = 'loss', 'loss_m2d', 'loss_clap'
UPLOAD_SECONDS = 60  # between uploads to a remote workdir, where nothing can be appended to a file


def read_history(workdir) -> dict[str, tuple[list[int], list[float]]]:
  """metrics.jsonl as name -> (steps, values); a line truncated by a kill is left out."""
  history = {}
  for row in _rows(paths.as_path(workdir) / HISTORY):
    step = row.pop('step')
    for name, value in row.items():
      steps, values = history.setdefault(name, ([], []))
      steps.append(step)
      values.append(value)
  return history


def _rows(path):
  rows = []
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return rows


class RunLog:
  """Writes scalars by step. Only one process of a run should be `active`; in the others, calls do nothing.

  For a remote workdir, files grow in a local folder and `sync` uploads them as a whole.

  Args:
    workdir: folder of metrics.jsonl and the TensorBoard files.
    step: the step that the run continues from; later rows, written before a kill, are dropped because those steps are
      repeated. None at the start of a run: all rows are dropped.
    wandb: project of Weights & Biases to log to, too.
    settings: of the run, shown there.
  """

  def __init__(self, workdir, step: int | None, active: bool = True, *, wandb: str | None = None, settings: dict | None = None):
    self.workdir, self.active = paths.as_path(workdir), active
    if not active:
      return
    path = self.workdir / HISTORY
    rows = [row for row in _rows(path) if step is not None and row['step'] <= step]
    paths.write_text(path, ''.join(json.dumps(row) + '\n' for row in rows))
    self._local = self.workdir
    self._uploaded, self._last = {}, time.monotonic()
    if paths.is_remote(self.workdir):
      self._local = pathlib.Path(tempfile.mkdtemp(prefix='m2d_clap_log_'))
      (self._local / HISTORY).write_bytes(path.read_bytes())
    self._file = open(self._local / HISTORY, 'a')  # pylint: disable=consider-using-with
    self._writers = [Events(self._local)]
    if wandb:
      from m2d_clap_jax.train.wandb_writer import WandbWriter
      self._writers.append(WandbWriter(wandb, self.workdir, new=step is None, settings=settings or {}))
      self.note(f'wandb: {self._writers[-1].place}')

  def write(self, step: int, scalars: dict[str, float]):
    if self.active:
      self._file.write(json.dumps({'step': step, **scalars}) + '\n')
      self._file.flush()
      for writer in self._writers:
        writer.write_scalars(step, scalars)
      if time.monotonic() - self._last > UPLOAD_SECONDS:
        self.sync()

  def sync(self):
    """Uploads new rows to a remote workdir. Call it before saving a checkpoint, whose rows would otherwise be missing
    if the run were killed afterwards. UserError if the store refuses; errors of TensorBoard's thread as they are."""
    if not self.active or not paths.is_remote(self.workdir):
      return
    try:
      self._writers[0].flush()
    finally:
      self._upload()

  def _upload(self):
    self._last = time.monotonic()
    for path in sorted(self._local.iterdir()):
      size = path.stat().st_size
      if self._uploaded.get(path.name) == size:
        continue
      try:
        paths.write_bytes(self.workdir / path.name, path.read_bytes())
      except OSError as error:
        raise UserError(f'{self.workdir / path.name}: cannot be written ({error}): the same command continues from the '
                        'newest checkpoint') from error
      self._uploaded[path.name] = size

  def history(self) -> dict[str, tuple[list[int], list[float]]]:
    """`read_history` of all rows, uploaded or not."""
    return read_history(self._local)

  def note(self, text: str):
    if self.active:
      if sys.stderr.isatty():
        sys.stderr.write('\r\x1b[K')
      print(text, file=sys.stderr, flush=True)

  def __enter__(self):
    return self

  def __exit__(self, kind, error, traceback):
    if not self.active:
      return
    remote = paths.is_remote(self.workdir)
    events, *others = self._writers
    with contextlib.suppress(Exception) if error else contextlib.nullcontext():  # the first error is the one to report
      with contextlib.ExitStack() as stack:  # does this from the last line to the first, whatever fails
        if remote:
          stack.callback(shutil.rmtree, self._local)
        for each in others:
          stack.callback(each.close)  # may wait for a network
        if remote:
          stack.callback(self._upload)
        stack.callback(events.close)
        stack.callback(self._file.close)


class RunningMetrics:
  """Metrics of the updates since the last log row, fetched late so that the device never waits for the host.

  A metric is a scalar, whose mean is logged, or a pair [2], a sum and the number of its terms, of which the mean over all
  terms is logged; nothing if there were none.

  Args:
    batch_size: samples per update, for the rate.
    rows: metrics of updates before the checkpoint that the run continues from; the attribute is saved in checkpoints.
    last_good: returns the step of the newest checkpoint, for the message about a non-finite loss.
  """

  def __init__(self, batch_size: int, rows: Sequence[dict[str, float]], last_good: Callable[[], int | None]):
    self.rows = list(rows)
    self._batch_size, self._last_good = batch_size, last_good
    self._pending = []
    self._start()

  def _start(self):
    self._steps, self._waited, self._since = 0, 0.0, time.monotonic()

  @contextlib.contextmanager
  def waiting(self):
    """Counts the time inside the block as waiting for data."""
    start = time.monotonic()
    yield
    self._waited += time.monotonic() - start

  @contextlib.contextmanager
  def uncounted(self):
    """Excludes the time inside the block, such as evaluations, from the rates, but not work already dispatched."""
    start = time.monotonic()
    yield
    self._since += time.monotonic() - start

  def add(self, metrics: dict[str, jax.Array]):
    self._pending.append(metrics)
    self._steps += 1

  def check(self):
    """Fetches pending metrics; UserError if a loss or gradient is not finite, so that no such state is saved."""
    for row in jax.device_get(self._pending):
      row = {name: np.asarray(value, np.float64).tolist() for name, value in row.items()}
      bad = [name for name in ('loss', 'grad_norm') if not math.isfinite(row[name])]
      if bad:
        values = ', '.join(f'{name} {value:.4g}' for name, value in row.items() if name in LOSSES)
        raise UserError(
            f'{bad[0]} became {row[bad[0]]} ({values}); the newest checkpoint, of step {self._last_good()}, is good. '
            'Lower the learning rate in config.schedule, or look for clips that are not finite in the data')
      self.rows.append(row)
    self._pending = []

  def flush(self) -> dict[str, float]:
    """Returns the means, with the rate and the share of time spent waiting for data, and resets."""
    self.check()
    means = {name: _mean([row[name] for row in self.rows if name in row])  # a checkpoint's rows may be an older version's
             for name in self.rows[-1]}
    means = {name: mean for name, mean in means.items() if mean is not None}
    elapsed = max(time.monotonic() - self._since, 1e-9)
    means |= {'samples_per_second': self._steps * self._batch_size / elapsed, 'data_wait': self._waited / elapsed}
    self.rows = []
    self._start()
    return means


def _mean(values: list[float] | list[list[float]]) -> float | None:
  """Of a metric of some updates, see `RunningMetrics`."""
  if np.ndim(values) == 1:
    return float(np.mean(values))
  total, count = np.sum(values, axis=0)
  return float(total / count) if count else None


class StepProgress:
  """A line with the progress and remaining time of a run: rewritten on a terminal, otherwise printed once a minute."""

  def __init__(self, start: int, total: int, log: RunLog):
    self._start, self._total, self._log = start, total, log
    self._began = time.monotonic()
    self._printed = -math.inf

  def show_first(self, step: int, scalars: dict[str, float], seconds: float):
    """The first update's own row, at once; `seconds`: what it took, with its compilation."""
    self._log.note(f'{self._row(step, scalars)}  compiled and computed in {clock(seconds)}')
    self._start, self._began = step, time.monotonic()  # the time left is that of compiled updates

  def _row(self, step: int, scalars: dict[str, float]) -> str:
    numbers = '  '.join(f'{name} {scalars[name]:.4g}' for name in LOSSES if name in scalars)
    return f'step {step}/{self._total}  {numbers}'

  def show(self, step: int, scalars: dict[str, float]):
    now = time.monotonic()
    left = (now - self._began) / max(step - self._start, 1) * (self._total - step)
    line = f'{self._row(step, scalars)}  {scalars["samples_per_second"]:.1f} samples/s  left {clock(left)}'
    if sys.stderr.isatty():
      if self._log.active:
        sys.stderr.write(f'\r\x1b[K{line}')
        sys.stderr.flush()
    elif now - self._printed >= 60 or step == self._total:
      self._printed = now
      self._log.note(line)


def clock(seconds: float) -> str:
  """3725 -> '1:02:05'."""
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02d}:{seconds:02d}' if hours else f'{minutes}:{seconds:02d}'
