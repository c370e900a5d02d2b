"""Data preparation, beside its decoding, resampling and log-mels alone on as many processes.

  python -m benchmarks.prepare --clips 600 --rounds 3

Generates recordings of 10 seconds: wav, flac and ogg, each at 44.1 kHz in stereo and at 16 kHz in mono, without
captions. Files come from the page cache.
"""
import argparse
import contextlib
import csv
import functools
import os
import shutil
import tempfile

import numpy as np
import soundfile

from benchmarks.report import CORES, Row, finish, in_turns, peak_mb
from m2d_clap_jax.audio.logmel import LogMel
from m2d_clap_jax.audio.pool import Pool

SECONDS = 10
KINDS = [(form, rate) for form in ('wav', 'flac', 'ogg') for rate in (44100, 16000)]
SHARE = 4  # files per task of the ceilings' processes


def bare(paths, logmel: LogMel):
  """Does a worker's work on each file, discarding the results; yields the process's peak memory. Runs in a worker process."""
  from m2d_clap_jax.data.worker import from_audio
  for path in paths:
    next(from_audio(path, logmel, 30.0))
  yield peak_mb()


def decode(paths):
  """Decodes files without resampling and discards the samples; yields as `bare`. Runs in a worker process."""
  for path in paths:
    soundfile.read(path, dtype='float32')
  yield peak_mb()


def render(folder: str, clips: int) -> list[str]:
  """Writes recordings of decaying harmonic notes over noise, and their manifest; returns the paths."""
  rng = np.random.default_rng(0)
  paths = []
  for i in range(clips):
    form, rate = KINDS[i % len(KINDS)]
    t = np.arange(SECONDS * rate) / rate
    envelope = np.exp(-4 * (t * rng.uniform(0.5, 4) % 1))
    pitch = 2 * np.pi * rng.uniform(80, 800)
    tone = sum(np.sin(k * pitch * t) / k for k in (1, 2, 3, 5)) * envelope
    wave = [0.2 * tone + 0.02 * rng.standard_normal(len(t)) for _ in range(2 if rate == 44100 else 1)]
    paths.append(os.path.join(folder, f'{i}.{form}'))
    with soundfile.SoundFile(paths[-1], 'w', rate, len(wave), format=form) as f:
      for block in np.array_split(np.stack(wave, 1), SECONDS):  # libvorbis overflows its stack on long ones
        f.write(block)
  with open(os.path.join(folder, 'manifest.csv'), 'w', newline='', encoding='utf-8') as f:
    csv.writer(f).writerows([('file_name', 'label'), *((os.path.basename(path), 'note') for path in paths)])
  return paths


def prepare_into(folder: str, manifest: str, root: str, workers: int):
  """Runs the real preparation into a new folder, which is then removed."""
  from m2d_clap_jax.data.prepare import prepare
  out = os.path.join(folder, 'out')
  meta = prepare(manifest, root, out, text_encoder=None, workers=workers)
  shutil.rmtree(out)
  assert not meta['splits']['train']['rejected'], meta['splits']


def over(pool: Pool, paths, *arguments) -> float:
  """Passes all paths to the processes of the pool, a few at a time; returns the largest peak memory of a process (MB)."""
  peak = 0.0
  for ok, answer in pool.map((paths[i:i + SHARE], *arguments) for i in range(0, len(paths), SHARE)):
    assert ok, answer
    peak = max(peak, answer)
  return peak


def main(argv=None):
  parser = argparse.ArgumentParser(prog='python -m benchmarks.prepare', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--clips', type=int, default=600)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--workers', type=int, default=CORES)
  parser.add_argument('--out', help='JSON file to write')
  args = parser.parse_args(argv)
  if args.clips <= args.workers:
    parser.error(f'--clips={args.clips} must be more than --workers={args.workers}, and many more for a steady figure')
  with contextlib.ExitStack() as stack:
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix='m2d_clap_benchmark_'))
    paths = render(folder, args.clips)
    manifest = os.path.join(folder, 'manifest.csv')
    few = os.path.join(folder, 'few.csv')    # one file per worker, to measure start-up and completion
    with open(manifest, encoding='utf-8') as whole, open(few, 'w', encoding='utf-8') as f:
      f.writelines(whole.readlines()[:1 + args.workers])
    transform_pool, decode_pool = (stack.enter_context(Pool(f'benchmarks.prepare:{name}', args.workers))
                                   for name in ('bare', 'decode'))
    # A first run with a few files imports TensorFlow here and starts the ceilings' processes.
    prepare_into(folder, few, folder, args.workers)
    first = paths[:SHARE * args.workers]
    over(decode_pool, first)
    worker_mb = over(transform_pool, first, LogMel())
    timings = in_turns({
        'start and finish': functools.partial(prepare_into, folder, few, folder, args.workers),
        'prepare': functools.partial(prepare_into, folder, manifest, folder, args.workers),
        'bare': functools.partial(over, transform_pool, paths, LogMel()),
        'decode': functools.partial(over, decode_pool, paths)}, args.rounds, warm_up=0)
  settings = {'clips': args.clips, 'workers': args.workers, 'rounds': args.rounds}
  finish('prepare', settings, make_rows(args, timings, worker_mb), timings, args.out)


def make_rows(args, timings, worker_mb: float) -> list[Row]:
  def rate(count, seconds):
    return count * SECONDS / 3600 / (seconds / 60)
  best = {name: timing.best for name, timing in timings.items()}
  bare_rate, decode_rate = (rate(args.clips, best[name]) for name in ('bare', 'decode'))
  # The rate of a long run: without start-up and completion, and without the files processed in them.
  going = rate(args.clips - args.workers, best['prepare'] - best['start and finish'])
  unit = 'h/min'
  return [
      Row('prepare, once it is going', going, unit, bare_rate, 'decode, resample and log-mel alone'),
      Row('prepare, once it is going', going, unit, decode_rate, 'decode alone'),
      Row('prepare, start to end', rate(args.clips, best['prepare']), unit, bare_rate,
          'decode, resample and log-mel alone'),
      Row('start and finish', best['start and finish'], 's'),
      Row('peak growth of the main process', timings['prepare'].grew_mb, 'MB'),
      Row('peak of a worker', worker_mb, 'MB')]


if __name__ == '__main__':
  main()
