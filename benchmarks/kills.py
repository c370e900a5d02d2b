"""Kills a small run on three folders again and again and compares it with an uninterrupted run: is anything lost or repeated?

  python -m benchmarks.kills --kills 200

Each process is ended by SIGKILL or SIGTERM at a random moment, sometimes while a checkpoint is being written; the same
command then continues. At the end the interrupted run must have logged every step once, with the losses of the other
run bit for bit, and its last checkpoint must contain the same numbers: a skipped or repeated batch would change them. At the
end of each epoch, every clip of every folder must have come as often as there were epochs.
Needs the dependencies of training; takes half an hour on two cores.
"""
import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

from benchmarks.loader import WIDTH, write_records
from benchmarks.report import Row, finish
from m2d_clap_jax.progress import Progress
from m2d_clap_jax.train.faults import EXIT_PREEMPTED

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS, BATCH = {'a': 24, 'b': 8, 'c': 32}, 8  # clips of each
EPOCH = sum(FOLDERS.values()) // BATCH
SPEEDS = 'samples_per_second', 'data_wait'  # the only figures of a row that may differ


def command(data: str, workdir: pathlib.Path, steps: int) -> list[str]:
  """A tiny model, so that a process mostly starts, saves and ends; checkpoints every few steps."""
  return [sys.executable, str(ROOT / 'main.py'), f'--config={ROOT}/configs/pretrain.py:small_2s', f'--workdir={workdir}',
          f'--config.data.folder={data}', f'--config.model.text_width={WIDTH}', '--config.model.width=32',
          '--config.model.depth=1', '--config.model.heads=2', '--config.model.predictor_width=16',
          '--config.model.predictor_depth=1', '--config.model.predictor_heads=2', '--config.model.input_size=(80, 32)',
          f'--config.batch_size={BATCH}', f'--config.steps={steps}', '--config.schedule.warmup_steps=10',
          '--config.log_every=1', '--config.save_every=3', f'--config.statistics_every={steps}',
          f'--config.evals_every={steps}']


def saving(workdir: pathlib.Path) -> bool:
  return any((workdir / 'checkpoints').glob('*tmp*'))


def one_life(run: list[str], workdir: pathlib.Path, environment: dict, draw: np.random.Generator) -> dict:
  """Starts the run, lets it pass at least one step, and ends it -> {'signal', 'saving', 'code', 'seconds'}."""
  kind = draw.choice([signal.SIGKILL, signal.SIGTERM])
  during_save, delay = draw.random() < 0.5, draw.uniform(0, 0.3)
  log = workdir / 'metrics.jsonl'
  size = log.stat().st_size if log.exists() else 0
  start = time.monotonic()
  process = subprocess.Popen(run, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, text=True)
  # A fifth of the processes end before their first step: while they start, restore, or write the first row.
  early = start + draw.uniform(1, 8) if draw.random() < 0.2 else None
  while process.poll() is None:
    if early:
      if time.monotonic() > early:
        break
    elif log.exists() and log.stat().st_size != size and (not during_save or saving(workdir)):
      break
    time.sleep(0.001)
  if not early and not during_save:
    time.sleep(delay)
  inside = saving(workdir)
  process.send_signal(kind)
  errors = process.communicate(timeout=300)[1]
  code = process.returncode
  # Before the handler is installed, SIGTERM ends the process at once; then it has not begun anything either.
  allowed = {0, -signal.SIGKILL} if kind == signal.SIGKILL else {0, EXIT_PREEMPTED, -signal.SIGTERM}
  if code not in allowed:
    raise SystemExit(f'error: a process ended by {kind!r} with code {code}:\n{errors}')
  return {'signal': signal.Signals(kind).name, 'saving': inside, 'code': code, 'seconds': time.monotonic() - start}


def rows(workdir: pathlib.Path) -> list[dict]:
  return [{key: value for key, value in json.loads(line).items() if key not in SPEEDS}
          for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def wrong_counts(logged: list[dict], steps: int) -> list[str]:
  """Steps at which the counts of clips do not add up, in words."""
  counts = {row['step']: {name: row[f'clips/{name}'] for name in FOLDERS} for row in logged if f'clips/{min(FOLDERS)}' in row}
  wrong = [f'step {step}: {counts.get(step)} clips' for step in range(steps + 1)
           if sum(counts.get(step, {}).values()) != step * BATCH]
  return wrong + [f'step {step}: {counts[step]} clips after {step // EPOCH} epochs' for step in counts if step % EPOCH == 0
                  and counts[step] != {name: clips * step // EPOCH for name, clips in FOLDERS.items()}]


def parameters(workdir: pathlib.Path):
  import jax

  from m2d_clap_jax.train.checkpoint import read_parameters
  step, arrays, _ = read_parameters(workdir)
  return step, jax.tree.leaves(arrays)


def run_kills(kills: int, scratch: pathlib.Path, seed: int = 0) -> tuple[list[dict], list[str]]:
  """-> a record of each process, and the list of errors at the end, empty if all is well."""
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_COMPILATION_CACHE_DIR': str(scratch / 'cache')}
  for name, clips in FOLDERS.items():
    (scratch / name).mkdir()
    write_records(str(scratch / name), clips)
  data = ','.join(str(scratch / name) for name in FOLDERS)
  steps, draw = 4 * kills + 20, np.random.default_rng(seed)
  whole, broken = scratch / 'whole', scratch / 'broken'
  subprocess.run(command(data, whole, steps), cwd=ROOT, env=environment, check=True, capture_output=True)
  lives, run, progress = [], command(data, broken, steps), Progress('kills', kills)
  while len(lives) < kills:
    lives.append(one_life(run, broken, environment, draw))
    progress(len(lives), kills)
    if lives[-1]['code'] == 0:
      break
  progress.close()
  last = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)
  wrong = [f'the last process ended with {last.returncode}: {last.stderr[-500:]}'] if last.returncode else []
  found, expected = rows(broken), rows(whole)
  if [row['step'] for row in found] != [row['step'] for row in expected]:
    wrong.append('steps are missing from the log or repeated')
  wrong += [f'step {a["step"]} differs' for a, b in zip(found, expected) if a != b][:5]
  wrong += wrong_counts(found, steps)[:5]
  (step, got), (end, wanted) = parameters(broken), parameters(whole)
  if step != end or not all(np.array_equal(a, b) for a, b in zip(got, wanted, strict=True)):
    wrong.append(f'the last checkpoints differ (steps {step} and {end})')
  if (broken / 'damaged_checkpoints').exists():
    wrong.append('a checkpoint was damaged')
  return lives, wrong


def main(argv=None):
  parser = argparse.ArgumentParser(prog='python -m benchmarks.kills', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--kills', type=int, default=200)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--out', help='JSON file to write')
  args = parser.parse_args(argv)
  with tempfile.TemporaryDirectory(prefix='m2d_clap_kills_') as scratch:
    lives, wrong = run_kills(args.kills, pathlib.Path(scratch), args.seed)
  ended = [life for life in lives if life['code'] != 0]
  table = [Row('lives ended', len(ended), '')]
  table += [Row(f'  by {name}', sum(life['signal'] == name for life in ended), '') for name in ('SIGKILL', 'SIGTERM')]
  table += [Row('  of these, saved and left with 75', sum(life['code'] == EXIT_PREEMPTED for life in ended), ''),
            Row('  while a checkpoint was written', sum(life['saving'] for life in ended), ''),
            Row('a life, mean', float(np.mean([life['seconds'] for life in lives])), 's'),
            Row('things wrong at the end', len(wrong), '')]
  finish('kills', {'seed': args.seed}, table, {}, args.out)
  if wrong:
    raise SystemExit('\n'.join(f'error: {text}' for text in wrong))


if __name__ == '__main__':
  main()
