"""What a run writes down: TensorBoard files, metrics.jsonl and one line on the terminal."""
import json
import math
import sys
import time

from etils import epath

HISTORY = 'metrics.jsonl'


def read_history(workdir) -> dict[str, tuple[list[int], list[float]]]:
  """metrics.jsonl as name -> (steps, values); a line cut off by a kill is left out."""
  history = {}
  for row in _rows(epath.Path(workdir) / HISTORY):
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
  """Writes scalars by step. Only one process of a run should be `active`; the others' calls do nothing.

  Args:
    workdir: where metrics.jsonl and the TensorBoard files go.
    step: the step that the run continues from; later rows, written before a kill, are dropped: they come again. None
      at the start of a run: all rows are dropped.
  """

  def __init__(self, workdir, step: int | None, active: bool = True):
    self.workdir, self.active = epath.Path(workdir), active
    if not active:
      return
    from clu import metric_writers  # pulls TensorFlow
    path = self.workdir / HISTORY
    rows = [row for row in _rows(path) if step is not None and row['step'] <= step]
    partial = self.workdir / f'.{HISTORY}.tmp'
    partial.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    partial.replace(path)
    self._file = open(path, 'a')  # pylint: disable=consider-using-with
    self._tensorboard = metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(self.workdir)))

  def write(self, step: int, scalars: dict[str, float]):
    if self.active:
      self._file.write(json.dumps({'step': step, **scalars}) + '\n')
      self._file.flush()
      self._tensorboard.write_scalars(step, scalars)

  def note(self, text: str):
    if self.active:
      if sys.stderr.isatty():
        sys.stderr.write('\r\x1b[K')
      print(text, file=sys.stderr, flush=True)

  def close(self):
    if self.active:
      self._tensorboard.close()
      self._file.close()


class Progress:
  """One line that says how far a run is and when it will end: rewritten on a terminal, else one a minute."""

  def __init__(self, start: int, total: int, log: RunLog):
    self._start, self._total, self._log = start, total, log
    self._began = time.monotonic()
    self._printed = -math.inf

  def show(self, step: int, scalars: dict[str, float]):
    now = time.monotonic()
    left = (now - self._began) / max(step - self._start, 1) * (self._total - step)
    numbers = '  '.join(f'{name} {scalars[name]:.4g}' for name in ('loss', 'loss_m2d', 'loss_clap') if name in scalars)
    line = (f'step {step}/{self._total}  {numbers}  {scalars["samples_per_second"]:.1f} samples/s  '
            f'left {clock(left)}')
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
