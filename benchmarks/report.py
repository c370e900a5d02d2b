"""Shared by the benchmarks: alternating timing, peak memory, the table and its JSON."""
import dataclasses
import json
import os
import platform
import statistics
import time

from m2d_clap_jax.startup import cores

CORES = cores()
LOAD = os.getloadavg()[0]  # before the benchmark adds its own; figures of a busy machine are unreliable


@dataclasses.dataclass
class Timing:
  """Seconds of each timed call, the processor's seconds (user and system, all threads) of each, and the largest growth of
  the process in MB during any of them."""
  seconds: list[float]
  processor: list[float]
  grew_mb: float

  @property
  def best(self) -> float:
    return min(self.seconds)

  @property
  def median(self) -> float:
    return statistics.median(self.seconds)

  @property
  def work(self) -> float:
    """Median of the processor's seconds, which other programs on the machine affect least."""
    return statistics.median(self.processor)


@dataclasses.dataclass
class Row:
  """One line of the table; with a ceiling, it includes their ratio."""
  figure: str
  value: float
  unit: str
  ceiling: float | None = None
  ceiling_is: str = ''

  @property
  def ratio(self) -> float | None:
    return self.value / self.ceiling if self.ceiling else None


def in_turns(functions: dict, rounds: int, warm_up: int = 1, pause: float = 0.0) -> dict[str, Timing]:
  """Times functions in alternation, A B C A B C ..., so that a drifting machine affects all alike.

  Args:
    functions: {name: function without arguments}, which must return only when its work is done.
    warm_up: calls of each before its first timed one.
    pause: seconds of rest before each timed call, so that other thread pools stop spinning.
  """
  seconds, processor = {name: [] for name in functions}, {name: [] for name in functions}
  grew = dict.fromkeys(functions, 0.0)
  for round_ in range(-warm_up, rounds):
    for name, function in functions.items():
      time.sleep(pause)
      before = start_peak()
      start, start_work = time.perf_counter(), time.process_time()
      function()
      elapsed, work = time.perf_counter() - start, time.process_time() - start_work
      grew[name] = max(grew[name], peak_mb() - before)
      if round_ >= 0:
        seconds[name].append(elapsed)
        processor[name].append(work)
  return {name: Timing(seconds[name], processor[name], grew[name]) for name in functions}


def start_peak() -> float:
  """Starts a new measurement of the peak; returns the current memory (MB) of the process."""
  try:
    with open('/proc/self/clear_refs', 'w', encoding='ascii') as f:
      f.write('5')
  except OSError:
    pass  # not Linux, or not allowed: the peak then covers the whole process
  return _status_mb('VmRSS')


def peak_mb() -> float:
  """Peak resident memory (MB) since `start_peak`; 0 if the system does not report it."""
  return _status_mb('VmHWM')


def _status_mb(field: str) -> float:
  try:
    with open('/proc/self/status', encoding='ascii') as f:
      return next(int(line.split()[1]) / 1024 for line in f if line.startswith(field))
  except (OSError, StopIteration):
    return 0.0


def finish(name: str, settings: dict, rows: list[Row], timings: dict[str, Timing], out: str | None = None):
  """Prints the table and, if `out` is given, writes everything as JSON there."""
  machine = {'machine': platform.machine(), 'cores': CORES, 'load before': round(LOAD, 2)}
  print(f'\n{name}: ' + ', '.join(f'{key} {value}' for key, value in {**settings, **machine}.items()))
  print(table(rows))
  if LOAD > 0.3 * CORES:
    print(f'note: the machine was busy before this started (load {LOAD:.1f} on {CORES} cores): do not quote these')
  if out:
    data = {'benchmark': name, 'settings': settings, 'machine': machine, 'time': time.strftime('%Y-%m-%dT%H:%M:%S%z'),
            'rows': [{**dataclasses.asdict(row), 'ratio': row.ratio} for row in rows],
            'timings': {key: dataclasses.asdict(timing) for key, timing in timings.items()}}
    with open(out, 'w', encoding='utf-8') as f:
      json.dump(data, f, indent=2, default=str)
      f.write('\n')


def table(rows: list[Row]) -> str:
  lines = [('figure', 'value', 'unit', 'ceiling', 'ratio', '')]
  for row in rows:
    with_ceiling = (_number(row.ceiling), f'{row.ratio:.2f}', row.ceiling_is) if row.ceiling else ('', '', '')
    lines.append((row.figure, _number(row.value), row.unit, *with_ceiling))
  widths = [max(map(len, column)) for column in zip(*lines)]
  right = (1, 3, 4)
  return '\n'.join('  '.join(cell.rjust(width) if i in right else cell.ljust(width)
                             for i, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in lines)


def _number(x: float) -> str:
  return f'{x:,.0f}' if abs(x) >= 1000 else f'{x:.4g}'
