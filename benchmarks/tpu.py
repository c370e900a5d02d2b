"""The pre-training update compiled for TPUs, without one: memory, arithmetic, traffic and communication of a device.

  python -m benchmarks.tpu --topology v5e-8 --size base --batch 512             # four to ten minutes of a core
  python -m benchmarks.tpu --topology v5e-8 --size base --batch 2048 --model remat=cheap
  python -m benchmarks.tpu --topology v5e-256 --size large --fsdp 2 --batch 2048

The real update with the driver's shardings is compiled by the TPU's compiler (libtpu; `pip install -e '.[tpu-compile]'`).
The model is compiled in its whole depth: figures of shallow ones, continued, miss a tenth of the traffic, because those have more
of their arrays in the core's fast memory. Flags of the compiler are read from LIBTPU_INIT_ARGS, as on a TPU.

FLOP are those of the program's matrix products. Traffic is counted instruction by instruction in the program: operands
and results in the main memory (layouts without S(1)), each once with the padding of its tiles; of slices and updates in
place only the part; copies and slices that run asynchronously once; what is in a loop as often as it runs. A custom call
(a Pallas kernel) counts with its operands and results, and with the FLOP of its own cost estimate. Rates of the machines
are those of Google's documentation. The bound is max(FLOP / peak, traffic / bandwidth), then the communication beside
which nothing runs: a real update takes longer.
"""
import argparse
import collections
import re
import sys

import jax

from benchmarks.report import Row, finish
from benchmarks.train_step import add_model_options, model_of
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.planning import machines
from m2d_clap_jax.planning.arithmetic import sample_flops
from m2d_clap_jax.planning.program import Program
from m2d_clap_jax.planning.update import Needs, compile_update, read
from m2d_clap_jax.train.fitting import OutOfMemory

GB, MB = 2 ** 30, 2 ** 20
SAMPLES = 300 * 2_000_000  # of 300 epochs of AudioSet
TABLE = (
    '--topology v5e-8 --size base --batch 512',
    '--topology v5e-8 --size base --batch 512 --model remat=cheap',
    '--topology v5e-8 --size base --batch 2048 --model remat=cheap',
    '--topology v5e-256 --size base --batch 2048 --model remat=cheap',
    '--topology v5p-8 --size base --batch 2048 --model remat=cheap',
    '--topology v5p-128 --size base --batch 2048 --model remat=cheap',
    '--topology v6e-8 --size base --batch 2048 --model remat=cheap',
    '--topology v5e-256 --size large --batch 2048 --fsdp 2 --model remat=cheap',
    '--topology v5p-128 --size large --batch 2048 --model remat=cheap',
    '--topology v6e-8 --size large --batch 2048 --model remat=cheap')


def rows_of(found: Needs, model, machine: machines.Machine, batch: int) -> list[Row]:
  own, chip = batch / machine.devices, machine.chip
  seconds = found.seconds(chip)
  return [
      Row('samples of a device', own, ''),
      Row('state and batch', found.arguments / GB, 'GB'),
      Row('temporary memory', found.temporary / GB, 'GB'),
      Row('  of a sample', found.temporary / MB / own, 'MB'),
      Row('memory: fits' if found.memory <= chip.memory else 'memory: DOES NOT FIT', found.memory / GB, 'GB',
          chip.memory / GB, 'of the device'),
      Row('arithmetic of a sample', found.flops / 1e9 / own, 'GFLOP', sample_flops(model)['step'] / 1e9, "the method's own"),
      Row('traffic of a sample', found.traffic / 1e9 / own, 'GB'),
      Row('arithmetic at the peak rate', 1e3 * found.flops / chip.teraflops / 1e12, 'ms'),
      Row('traffic at the full rate', 1e3 * found.traffic / chip.bandwidth / 1e9, 'ms'),
      Row('collectives: results', found.sent / MB, 'MB'),
      Row('  of those beside other work', found.hidden / MB, 'MB', found.sent / MB, 'all'),
      Row('  waited for at the full rate', 1e3 * found.waiting, 'ms'),
      Row('an update, at least', 1e3 * seconds, 'ms'),
      Row('samples of all devices, at most', batch / seconds, '1/s'),
      Row('utilisation of the peak, at most', 100 * found.utilisation(model, own, chip), '%')]


def largest(program: Program, number: int) -> list[Row]:
  """The sources in the model that cause most traffic, blocks taken together."""
  sizes = collections.Counter()
  for where, each, times in program.steps():
    source = re.sub(r'^jit\(\w+\)/|_\d+', '', each.of.partition(';')[0]) or f'(moved by the compiler: {each.operation})'
    sizes[source] += times * program.traffic(where, each)
  return [Row(source, size / MB, 'MB') for source, size in sizes.most_common(number)]


def communication(program: Program) -> list[Row]:
  """The collectives with at least 1 MB of results, like ones together, in the program's order."""
  found: collections.Counter = collections.Counter()
  for each in program.collectives():
    if each.times * each.bytes >= MB:
      beside = sum(program.flops(*other) for other in each.during or ())
      what = 'waited for' if each.during is None else f'beside {beside / 1e9:.0f} GFLOP'
      found[each.operation, len(each.results), what, each.bytes] += each.times
  return [Row(f'{operation} of {arrays} arrays, {what}' + (f', {times} times' if times > 1 else ''), times * size / MB, 'MB')
          for (operation, arrays, what, size), times in found.items()]


def measured(args, model, machine: machines.Machine) -> tuple[Needs, Program]:
  """What the update needs, and its program. Raises OutOfMemory."""
  compiled, _, _ = compile_update(model, machines.devices(machine), args.batch, args.fsdp, accumulate=args.accumulate)
  if args.hlo:
    with open(args.hlo, 'w', encoding='utf-8') as f:
      f.write(compiled.as_text())
  return read(compiled, machine.chip)


def table_row(options: str) -> str:
  """A row of docs/scale.md."""
  args, model, machine = parse(options.split())
  cells = [f'`{options}`']
  try:
    found, _ = measured(args, model, machine)
    own, seconds = args.batch / machine.devices, found.seconds(machine.chip)
    cells += [f'{own:g}', f'{found.memory / GB:.1f} of {machine.chip.memory / GB:.2f}', f'{found.temporary / MB / own:.0f}',
              f'{found.traffic / 1e9 / own:.2f}', f'{1e3 * seconds:.1f}',
              f'{100 * found.utilisation(model, own, machine.chip):.0f}%', f'{SAMPLES / args.batch * seconds / 3600:.1f}']
  except OutOfMemory as error:
    cells += [f'{args.batch / machine.devices:g}', f'{error.bytes / GB:.1f}: too much', *[''] * 5]
  return f'| {" | ".join(cells)} |'


def parse(argv):
  """-> (arguments, model, machine)."""
  parser = argparse.ArgumentParser(prog='python -m benchmarks.tpu', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--topology', default='v5e-8', help='v5e-N, v5p-N or v6e-N, as Cloud TPU counts')
  add_model_options(parser, dtype='bfloat16')
  parser.add_argument('--batch', type=int, default=512, help='of all devices together')
  parser.add_argument('--fsdp', type=int, default=1)
  parser.add_argument('--accumulate', type=int, default=1)
  parser.add_argument('--table', action='store_true', help="print docs/scale.md's table, row by row, instead")
  parser.add_argument('--largest', type=int, default=0, metavar='N', help='also the N largest causes of traffic')
  parser.add_argument('--hlo', help='file to write the compiled program to')
  parser.add_argument('--out', help='JSON file to write')
  args = parser.parse_args(argv)
  try:
    return args, model_of(args, parser), machines.find(args.topology)
  except UserError as error:
    parser.error(str(error))


def main(argv=None):
  args, model, machine = parse(argv)
  jax.config.update('jax_platforms', 'cpu')
  if args.table:
    for options in TABLE:
      print(table_row(options), flush=True)
    return
  settings = {key: value for key, value in vars(args).items() if key not in ('out', 'hlo', 'largest', 'variant') and value}
  try:
    found, program = measured(args, model, machine)
    rows = rows_of(found, model, machine, args.batch) + communication(program) + largest(program, args.largest)
  except OutOfMemory as error:
    rows = [Row('memory: DOES NOT FIT, needs at least', error.bytes / GB, 'GB', machine.chip.memory / GB, 'of the device')]
  except UserError as error:
    sys.exit(f'python -m benchmarks.tpu: {error}')
  finish('tpu', settings, rows, {}, args.out)


if __name__ == '__main__':
  main()
