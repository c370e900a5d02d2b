"""Costs of a pre-training step by batch size, clip length and model size, from the compiler's analysis.

  python -m benchmarks.costs                         # a minute or two; nothing is run, only compiled
  python -m benchmarks.costs --time --plot costs.png # also runs each step, on this machine

FLOP and bytes accessed are XLA's cost analysis of the compiled step, memory is its buffer assignment, both for this
machine's kind of device. Each table varies one of `--size`, `--batch` and the configuration's clip length.
For TPUs and numbers of devices see benchmarks.tpu. Needs only jax, flax, optax and numpy (and matplotlib for --plot).
"""
import argparse
from typing import NamedTuple

import jax
import numpy as np

from benchmarks import compiled
from benchmarks.report import Row, finish, in_turns
from benchmarks.train_step import PRESETS, JaxStep, make_batch, sample_flops
from m2d_clap_jax.models import M2DCLAP

PATCH = 16


class Cost(NamedTuple):
  """Costs of one step: GFLOP by the method's arithmetic and by XLA, GB accessed, MB of state and of temporary memory, and
  ms (NaN if not timed)."""
  arithmetic: float
  flops: float
  accessed: float
  state: float
  temporary: float
  milliseconds: float


def cost(fields: dict, batch: int, timed: bool) -> Cost:
  model = M2DCLAP(**fields)
  step = JaxStep(model, make_batch(model, batch), burst=1)
  found = compiled.cost(step.compiled)
  time = 1e3 * in_turns({'step': step}, 3)['step'].best if timed else float('nan')
  return Cost(batch * sample_flops(model)['step'] / 1e9, found.flops, found.accessed, found.state, found.temporary, time)


def sweeps(args) -> dict[str, dict]:
  """{varied parameter: {its value: (fields of the model, batch)}}."""
  fields = {**PRESETS[args.size], 'dtype': args.dtype}
  columns = fields.get('input_size', (80, 608))[1] // PATCH
  return {
      'batch': {batch: (fields, batch) for batch in (args.batch, 2 * args.batch, 4 * args.batch, 8 * args.batch)},
      'seconds': {round(PATCH * columns * part / 400, 2): ({**fields, 'input_size': (80, PATCH * (columns * part // 4))},
                                                          args.batch) for part in (2, 4, 8, 16)},
      'size': {size: ({**PRESETS[size], 'dtype': args.dtype}, args.batch) for size in args.sizes}}


def draw(found: dict[str, dict], path: str):
  """Draws one panel per sweep: FLOP, bytes, temporary memory and time, each relative to its first value, on logarithmic
  axes; the dashed line is proportional to what is varied."""
  from matplotlib.ticker import FuncFormatter

  from m2d_clap_jax.eval import plots
  swept = {what: rows for what, rows in found.items() if what != 'size'}
  fig = plots.figure(4.6 * len(swept), 3.6)
  for i, (what, rows) in enumerate(swept.items()):
    ax, first = plots.axes(fig, 1, len(swept), i + 1, ''), min(rows)
    ax.plot(sorted(rows), [x / first for x in sorted(rows)], color='0.6', linestyle='--', linewidth=1, label='in proportion')
    for colour, (name, key) in zip(plots.COLOURS, {
        'FLOP': 'flops', 'bytes accessed': 'accessed', 'temporary memory': 'temporary', 'time': 'milliseconds'}.items()):
      multiples = [getattr(rows[x], key) / getattr(rows[first], key) for x in sorted(rows)]
      if np.isfinite(multiples).all():  # the time only where it was measured
        ax.plot(sorted(rows), multiples, color=colour, linewidth=1.5, marker='o', markersize=4, label=name)
    for axis, set_scale in ((ax.xaxis, ax.set_xscale), (ax.yaxis, ax.set_yscale)):
      set_scale('log', base=2)
      axis.set_major_formatter(FuncFormatter(lambda x, _: f'{x:g}'))
    ax.set_xticks(sorted(rows))
    ax.set_xlabel(what)
    ax.set_ylabel('times the first')
    ax.grid(True, color='0.9', linewidth=0.8)
  ax.legend(fontsize=8, frameon=False)
  plots.save(fig, path)


def main(argv=None):
  parser = argparse.ArgumentParser(prog='python -m benchmarks.costs', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--size', choices=PRESETS, default='small_2s')
  parser.add_argument('--sizes', nargs='+', choices=PRESETS, default=['small_2s', 'base'])
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--dtype', choices=['float32', 'bfloat16'], default='float32')
  parser.add_argument('--time', action='store_true', help='run each step, too')
  parser.add_argument('--plot', help='PNG file to draw')
  parser.add_argument('--out', help='JSON file to write')
  args = parser.parse_args(argv)
  found = {what: {value: cost(*of, args.time) for value, of in each.items()} for what, each in sweeps(args).items()}
  rows = []
  for what, each in found.items():
    first = next(iter(each.values()))
    for value, row in each.items():
      rows += [Row(f'{what} {value}: arithmetic', row.arithmetic, 'GFLOP', first.arithmetic, 'the first of these'),
               Row('  by the compiler', row.flops, 'GFLOP', first.flops, 'the first of these'),
               Row('  bytes accessed', row.accessed, 'GB', first.accessed, 'the first of these'),
               Row('  state and batch', row.state, 'MB', first.state, 'the first of these'),
               Row('  temporary memory', row.temporary, 'MB', first.temporary, 'the first of these')]
      if args.time:
        rows.append(Row('  step, best', row.milliseconds, 'ms', first.milliseconds, 'the first of these'))
  finish('costs', {'size': args.size, 'batch': args.batch, 'dtype': args.dtype, 'jax': jax.__version__,
                   'device': jax.devices()[0].device_kind}, rows, {}, args.out)
  if args.plot:
    draw(found, args.plot)


if __name__ == '__main__':
  main()
