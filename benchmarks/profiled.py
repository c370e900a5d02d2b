"""Where the time of a function on arrays goes, by the instructions of its compiled program, from jax.profiler's trace."""
import collections
import glob
import re
import tempfile
from collections.abc import Callable

import jax

from benchmarks.report import Row

CALLS = 3


def by_kind(function: Callable, number: int) -> list[Row]:
  """The kinds of instruction that take longest in a call of `function`: a row each, of all threads together.

  XLA names an instruction by the operations in it and a number; a kind is that without the number.
  """
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(CALLS):
        function()
    path, = glob.glob(f'{folder}/**/*.xplane.pb', recursive=True)
    data = jax.profiler.ProfileData.from_file(path)
  nanoseconds: collections.Counter = collections.Counter()
  for event in (event for plane in data.planes for line in plane.lines for event in line.events):
    name = dict(event.stats).get('hlo_op')
    if name:
      nanoseconds[re.sub(r'(\.\d+)+$', '', str(name))] += event.duration_ns
  whole = 1e-6 * sum(nanoseconds.values()) / CALLS
  return [Row(f'in {kind}', 1e-6 * time / CALLS, 'ms', whole, 'all instructions, all threads')
          for kind, time in nanoseconds.most_common(number)]
