"""Metrics between two log rows."""
import contextlib
import math
import time
from collections.abc import Callable

import jax
import numpy as np

from m2d_clap_jax.errors import UserError


class Window:
  """Collects the metrics of a few updates; they are fetched late, so that the device never waits for the host.

  Args:
    batch_size: samples of an update, for the rate.
    rows: metrics of a window that was begun before a checkpoint; `rows` is what to save for that.
    last_good: tells the step of the newest checkpoint, for the message when a loss stops being a number.
  """

  def __init__(self, batch_size: int, rows: list[dict[str, float]], last_good: Callable[[], int | None]):
    self.rows = rows
    self._batch_size, self._last_good = batch_size, last_good
    self._pending = []
    self._start()

  def _start(self):
    self._steps, self._waited, self._since = 0, 0.0, time.monotonic()

  @contextlib.contextmanager
  def waiting(self):
    """Counts the time inside as waiting for data."""
    start = time.monotonic()
    yield
    self._waited += time.monotonic() - start

  @contextlib.contextmanager
  def uncounted(self):
    """Leaves the time inside, as of evaluations, out of the rates. The device's work that is under way is not."""
    start = time.monotonic()
    yield
    self._since += time.monotonic() - start

  def add(self, metrics: dict[str, jax.Array]):
    self._pending.append(metrics)
    self._steps += 1

  def check(self):
    """Fetches what is pending; UserError if a loss or a gradient is not finite, so that no such state is saved."""
    for row in jax.device_get(self._pending):
      row = {name: float(value) for name, value in row.items()}
      bad = [name for name in ('loss', 'grad_norm') if not math.isfinite(row[name])]
      if bad:
        values = ', '.join(f'{name} {value:.4g}' for name, value in row.items() if name.startswith('loss'))
        raise UserError(
            f'{bad[0]} became {row[bad[0]]} ({values}); the newest checkpoint, of step {self._last_good()}, is good. '
            'Lower the learning rate in config.schedule, or look for clips that are not finite in the data')
      self.rows.append(row)
    self._pending = []

  def flush(self) -> dict[str, float]:
    """The window's means, with the rate and the share of time spent waiting for data; starts the next window."""
    self.check()
    means = {name: float(np.mean([row[name] for row in self.rows])) for name in self.rows[0]}
    elapsed = max(time.monotonic() - self._since, 1e-9)
    means |= {'samples_per_second': self._steps * self._batch_size / elapsed, 'data_wait': self._waited / elapsed}
    self.rows = []
    self._start()
    return means
