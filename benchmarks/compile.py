"""Start-up time of a run: compilation of the step, and the whole command up to its first update.

  python -m benchmarks.compile --sizes small_2s base
  python -m benchmarks.compile --sizes base --batch 256 --dtype bfloat16 --no-start      # jax, flax and optax alone

Compilation is timed without a cache. The command is main.py on random
records, first with an empty compilation cache and then with the filled one, timed from the start of the process to the
row of the first update in metrics.jsonl, including imports, opening of the data and initialisation.
"""
import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jax

from benchmarks.report import Row, finish
from benchmarks.train_step import PRESETS, JaxStep, make_batch
from m2d_clap_jax.models import M2DCLAP

ROOT = pathlib.Path(__file__).parent.parent
SIZES = 'base', 'large', 'small_2s'  # as configs/pretrain.py and train_step have them


def compile_seconds(size: str, batch: int, dtype: str) -> float:
  model = M2DCLAP(**PRESETS[size], dtype=dtype)
  return JaxStep(model, make_batch(model, batch), burst=1).compile_seconds


def start_seconds(size: str, batch: int, dtype: str, folder: str, width: int, cache: str, workdir: str,
                  *options: str) -> float:
  """From the command, with further `options`, to the first update of a run on the records in `folder`."""
  command = [sys.executable, str(ROOT / 'main.py'), f'--config={ROOT}/configs/pretrain.py:{size}',
             f'--config.data.folder={folder}', f'--config.batch_size={batch}', '--config.steps=1',
             '--config.schedule.warmup_steps=0' if size == 'small_2s' else '--config.schedule.warmup_epochs=0.',
             f'--config.model.dtype={dtype}', f'--config.model.text_width={width}', '--config.log_every=1',
             f'--workdir={workdir}', *options]
  start = time.perf_counter()
  process = subprocess.Popen(command, env={**os.environ, 'JAX_COMPILATION_CACHE_DIR': cache}, cwd=ROOT, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  try:
    rows = pathlib.Path(workdir) / 'metrics.jsonl'
    while not (rows.exists() and '"step": 1,' in rows.read_text()):
      if process.poll() is not None:
        raise SystemExit(f'error: the run ended before its first update:\n{process.stdout.read()}')
      time.sleep(0.05)
    return time.perf_counter() - start
  finally:
    process.kill()
    process.wait()


def children_seconds() -> float:
  """Processor time, user and system, of all processes that this one has started and waited for."""
  times = os.times()
  return times.children_user + times.children_system


def main(argv=None):
  parser = argparse.ArgumentParser(prog='python -m benchmarks.compile', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--sizes', nargs='+', choices=SIZES, default=['small_2s', 'base'])
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--dtype', choices=['float32', 'bfloat16'], default='float32')
  parser.add_argument('--no-start', action='store_true', help='compile only, which needs no TensorFlow')
  parser.add_argument('--out', help='JSON file to write')
  args = parser.parse_args(argv)
  rows = []
  with tempfile.TemporaryDirectory(prefix='m2d_clap_benchmark_') as scratch:
    if not args.no_start:
      from benchmarks.loader import WIDTH, write_records
      os.mkdir(f'{scratch}/data')
      write_records(f'{scratch}/data', 4 * args.batch)
      for size in args.sizes:
        for which in ('empty', 'warm'):
          before = children_seconds()
          what = f'{size}: command to first update, {which} cache'
          rows += [Row(what, start_seconds(size, args.batch, args.dtype, f'{scratch}/data', WIDTH, f'{scratch}/cache_{size}',
                                           f'{scratch}/{size}_{which}'), 's'),
                   Row('  its processor time', children_seconds() - before, 's')]
  jax.config.update('jax_enable_compilation_cache', False)
  rows += [Row(f'{size}: compilation of the step', compile_seconds(size, args.batch, args.dtype), 's') for size in args.sizes]
  finish('compile', {'batch': args.batch, 'dtype': args.dtype, 'device': jax.devices()[0].device_kind,
                     'jax': jax.__version__}, rows, {}, args.out)


if __name__ == '__main__':
  main()
