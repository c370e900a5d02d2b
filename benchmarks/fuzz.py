"""Damaged files of every kind that is read: how many are refused in one line, and whether any does worse.

  python -m benchmarks.fuzz --count 300 --seed 0 --audio 1200

Each file of a kind in turn gets one to three random changes, is read, and is put back. A kind fails with a traceback
(any error but a UserError of one line), a wrong value (what was read is not what was written, though the format could
tell), or slowness. Changes that no checksum guards are of kinds without the column.
"""
import argparse
import dataclasses
import io
import json
import os
import pathlib
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from typing import Any

import jax
import numpy as np
import optax
import soundfile
from etils import epath

from benchmarks import loader
from benchmarks.mutations import mutated, mutated_json
from benchmarks.recordings import encode
from benchmarks.report import peak_mb, start_peak
from m2d_clap_jax import weights
from m2d_clap_jax.audio.decode import load
from m2d_clap_jax.data.read import Folder
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.models import M2DCLAP
from m2d_clap_jax.train import same_data
from m2d_clap_jax.train.checkpoint import Checkpoints
from m2d_clap_jax.train.step import create_state
from m2d_clap_jax.weights import Weights
from m2d_clap_jax.weights.portable import CONFIG, TENSORS, save_portable

TINY = dict(input_size=(80, 32), patch_size=(16, 16), width=32, depth=1, heads=2, predictor_width=16, predictor_depth=1,
            predictor_heads=2, text_width=8, norm_stats=(-7.1, 4.2))
CLIPS = 6
RATE = 16000


@dataclasses.dataclass
class Kind:
  """Files, and what reads them -> something comparable; UserError is how it refuses.

  guarded: whether what is read must be what was written. structured: files are JSON, and values are changed, too.
  """
  files: Sequence[pathlib.Path]
  read: Callable[[pathlib.Path], Any]
  guarded: bool = True
  structured: bool = False


@dataclasses.dataclass
class Outcome:
  files: int = 0
  refused: int = 0
  read: int = 0
  wrong: int = 0
  tracebacks: list[str] = dataclasses.field(default_factory=list)
  slowest: float = 0.0
  grew_mb: float = 0.0


def fuzz(kind: Kind, count: int, seed: int) -> Outcome:
  """Reads `count` damaged files of a kind, one after the other."""
  outcome = Outcome(count)
  whole = {path: path.read_bytes() for path in kind.files}
  expected = {path: kind.read(path) for path in kind.files}
  before = start_peak()
  for number in range(count):
    draw = np.random.default_rng([seed, number])
    path = kind.files[number % len(kind.files)]
    structured = kind.structured and number // len(kind.files) % 2
    data = whole[path]
    unsealed = structured and number // len(kind.files) % 4 == 1
    path.write_bytes(mutated_json(data, draw, not unsealed) if structured else mutated(data, draw))
    start = time.perf_counter()
    try:
      with redirect_stderr(io.StringIO()):
        found = kind.read(path)
    except UserError as error:
      outcome.refused += 1
      if '\n' in str(error):
        outcome.tracebacks.append(f'change {number} of {path.name}: {str(error)!r}')
    except Exception:  # what this looks for
      outcome.tracebacks.append(f'change {number} of {path.name}: {traceback.format_exc()}')
    else:
      outcome.read += 1
      outcome.wrong += bool(kind.guarded and not unsealed and found != expected[path])
    outcome.slowest = max(outcome.slowest, time.perf_counter() - start)
    path.write_bytes(data)
  outcome.grew_mb = peak_mb() - before
  return outcome


def tiny_weights() -> Weights:
  rng = np.random.default_rng(0)
  shapes = weights.expected_shapes(M2DCLAP(**TINY))
  return Weights(model=TINY, trees={tree: {path: rng.standard_normal(shape).astype(np.float32) for path, shape in leaves.items()}
                                    for tree, leaves in shapes.items()},
                 text_encoder={'name': 'random', 'pooling': 'mean', 'hash': None, 'width': 8})


def described(place) -> tuple:
  """All of a model that inference and training use."""
  found = weights.read(place)
  arrays = {f'{tree}/{path}': value.tobytes() for tree, leaves in found.trees.items() for path, value in leaves.items()}
  return found.model, arrays, found.sample_rate, found.text_encoder, found.classes, found.step


def portable(folder: pathlib.Path) -> dict[str, Kind]:
  save_portable(tiny_weights(), folder / 'portable')
  return {name: Kind([folder / 'portable' / name], lambda path: described(path.parent), structured=name == CONFIG)
          for name in (CONFIG, TENSORS)}


def data_folder(folder: pathlib.Path) -> dict[str, Kind]:
  place = folder / 'data'
  place.mkdir()
  loader.write_records(str(place), CLIPS)

  def read(_):
    opened = Folder(place)
    split = opened.split('train')
    return opened.meta['mean'], opened.meta['std'], opened.meta['splits'], split.read(range(split.num_clips))
  shard = next(place.glob('*.tfrecord'))
  return {'prepare.json': Kind([place / 'prepare.json'], read, structured=True),
          'sidecars': Kind([place / f'{shard.name}.json'], read, structured=True), 'TFRecords': Kind([shard], read)}


def record(folder: pathlib.Path) -> dict[str, Kind]:
  place = epath.Path(folder) / 'tuned'
  parts = {'file': ['a.wav', 'b.wav'], 'labels': ['dog', 'rain,wind'], 'part': ['train', 'test'], 'bytes': [7, 8],
           'modified': ['1', '2']}
  same_data.write_record(place, {'norm_stats': TINY['norm_stats'], 'classes': ['dog', 'rain', 'wind'], 'parts': parts})
  return {same_data.RECORD: Kind([pathlib.Path(place / same_data.RECORD)],
                                 lambda _: same_data.read_record(place, [same_data.RECORD]), structured=True)}


def checkpoint(folder: pathlib.Path) -> dict[str, Kind]:
  run = folder / 'run'
  network = M2DCLAP(**TINY)
  saved = Checkpoints(run)
  state = jax.jit(lambda: create_state(0, model=network, tx=optax.sgd(0.1)))()
  saved.save(state, {'settings': {'model': {**TINY, 'norm_stats': None}}, 'norm_stats': TINY['norm_stats'], 'window': [],
                     'text_encoder': {'name': 'random', 'hash': 'abc', 'width': 8}, 'logmel': {'sample_rate': RATE}})
  saved.close()
  files = sorted(path for path in (run / 'checkpoints').rglob('*') if path.is_file())
  return {'checkpoints': Kind(files, lambda _: described(run)),
          "checkpoints' JSON": Kind([path for path in files if path.name in ('metadata', '_METADATA')], lambda _: described(run),
                                    structured=True)}


def audio(folder: pathlib.Path) -> dict[str, Kind]:
  place = folder / 'audio'
  place.mkdir()
  time_ = np.arange(RATE) / RATE
  wave = (0.4 * np.sin(2 * np.pi * 440 * time_) * (1 + 0.5 * np.sin(2 * np.pi * 3 * time_))).astype(np.float32)
  for name, how in {'a.wav': {}, 'a.flac': {}, 'a.ogg': {}, 'a.opus': {'format': 'OGG', 'subtype': 'OPUS'}, 'a.mp3': {},
                    'a.aiff': {}, 'a.au': {}, 'a.caf': {}, 'a.w64': {}, 'a.voc': {}}.items():
    soundfile.write(place / name, wave, RATE, **how)
  for name, codec in {'a.m4a': 'aac', 'a.webm': 'libopus', 'a.wma': 'wmav2', 'a.mp2': 'mp2', 'a.mka': 'flac', 'b.m4a': 'alac',
                      'a.aac': 'aac'}.items():
    encode(place / name, wave, RATE, codec, to_rate=48000)
  return {'audio': Kind(sorted(place.iterdir()), lambda path: len(load(path, RATE, 30.0)[0]), guarded=False)}


def report(outcomes: dict[str, Outcome]) -> str:
  lines = [('kind', 'files', 'refused', 'read', 'wrong', 'tracebacks', 'slowest, s', 'memory, MB')]
  lines += [(name, *map(str, (o.files, o.refused, o.read, o.wrong, len(o.tracebacks))), f'{o.slowest:.2f}', f'{o.grew_mb:.0f}')
            for name, o in outcomes.items()]
  widths = [max(map(len, column)) for column in zip(*lines)]
  return '\n'.join('  '.join(cell.ljust(width) if i == 0 else cell.rjust(width)
                             for i, (cell, width) in enumerate(zip(line, widths))) for line in lines)


def main(argv=None):
  parser = argparse.ArgumentParser(prog='python -m benchmarks.fuzz', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--count', type=int, default=300, help='damaged files of each kind')
  parser.add_argument('--audio', type=int, default=1200, help='damaged recordings, over 17 formats')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--out', help='JSON file to write')
  args = parser.parse_args(argv)
  outcomes = {}
  with tempfile.TemporaryDirectory(prefix='m2d_clap_fuzz_') as folder:
    for make in (portable, data_folder, record, checkpoint, audio):
      for name, kind in make(pathlib.Path(folder)).items():
        outcomes[name] = fuzz(kind, args.audio if name == 'audio' else args.count, args.seed)
        print(f'{name}: ' + ('; '.join(outcomes[name].tracebacks[:3]) or 'no traceback'), flush=True)
  print(report(outcomes))
  if args.out:
    with open(args.out, 'w', encoding='utf-8') as file:
      json.dump({name: dataclasses.asdict(outcome) for name, outcome in outcomes.items()}, file, indent=2)
  bad = [name for name, outcome in outcomes.items() if outcome.tracebacks or outcome.wrong]
  return os.EX_SOFTWARE if bad else 0


if __name__ == '__main__':
  raise SystemExit(main())
