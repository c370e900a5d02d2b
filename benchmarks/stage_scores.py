"""What each stage of training is worth on a collection of short clips: scores of its runs, mean and range over seeds.

  python -m benchmarks.stage_scores --corpus=sounds --tasks instrument.csv drums.csv --captions=data/mine \\
      --stages 'frozen=runs/*/1' 'trained=runs/*/2' 'trained, no mask=runs/*/21'

Each task is a table of the corpus (file_name, label, split) and is prepared in a temporary folder; --captions is a prepared
folder, whose test clips are retrieved by the texts of their captions. Clips are cut at the model's length, from their start,
or padded with silence, and nothing is masked. Zero-shot captions are '{} can be heard'; the linear score is that of a
logistic regression (C 0.01) on standardised clip embeddings. The runs of a seed S are made by

  m2d-clap prepare --manifest=sounds/captions.csv --out=data/mine --text_encoder=minilm
  python main.py --config=configs/pretrain.py:small_2s --config.seed=S --config.data.folder=data/mine --workdir=runs/S/1
  python main.py --config=configs/clap.py:small_2s --config.seed=S --config.data.folder=data/mine --workdir=runs/S/2 \\
      --config.init=runs/S/1
  python main.py --config=configs/clap.py:small_2s --config.seed=S --config.data.folder=data/mine --workdir=runs/S/21 \\
      --config.init=runs/S/2 --config.projector=init --config.mask_ratio=0 --config.text.encoder=
"""
import argparse
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable

import jax
import numpy as np

from m2d_clap_jax import api, paths, sharding
from m2d_clap_jax.data.prepare import prepare
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.eval.during_training import LogisticProbe, Retrieval, ZeroShot
from m2d_clap_jax.eval.encode import SplitEncoder


def evaluators(corpus: str, tasks: list[str], captions: str, scratch: str) -> dict[str, Callable]:
  """{'zero-shot drums': evaluator}; tasks are tables of the corpus, which are prepared in `scratch`."""
  found: dict[str, Callable] = {}
  for table in tasks:
    task = os.path.splitext(os.path.basename(table))[0]
    folder = os.path.join(scratch, task)
    prepare(os.path.join(corpus, table), corpus, folder, text_encoder='none')
    found |= {f'zero-shot {task}': ZeroShot(folder), f'linear {task}': LogisticProbe(folder)}
  return found | {'retrieval': Retrieval(captions)}


def scores_of(run: str, found: dict[str, Callable]) -> dict[str, float]:
  """Scores of a run, in 0..1, by name."""
  pipeline = api.load(run)
  one = sharding.make_mesh(jax.local_devices()[:1])
  encode = functools.partial(SplitEncoder(pipeline.network, one, lambda _: None), pipeline.variables)
  scores = {}
  for name, evaluator in found.items():
    scalars = evaluator(encode, None, pipeline.encode_text).scalars
    for key in ('accuracy', 'text_to_audio/R@1', 'text_to_audio/R@10', 'audio_to_text/R@1', 'audio_to_text/R@10'):
      if key in scalars:
        scores[f'{name} {key}'.removesuffix(' accuracy').replace('_', ' ')] = scalars[key]
  return scores


def table(scores: dict[str, list[dict[str, float]]]) -> str:
  """{stage: scores of each run} -> a table in percent: mean (lowest to highest)."""
  def cell(values):
    values = 100 * np.asarray(values)
    return f'{values.mean():.1f} ({values.min():.1f} to {values.max():.1f})'
  names = list(next(iter(scores.values()))[0])
  lines = [['%', *(f'{stage}, {len(runs)} runs' for stage, runs in scores.items())], ['---'] * (1 + len(scores))]
  lines += [[name, *(cell([run[name] for run in runs]) for runs in scores.values())] for name in names]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def main(argv=None):
  parser = argparse.ArgumentParser(prog='python -m benchmarks.stage_scores', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--corpus', required=True, help='folder of the recordings and the tables of the tasks')
  parser.add_argument('--tasks', nargs='+', required=True, metavar='TABLE.csv')
  parser.add_argument('--captions', required=True, help='prepared folder with a test split')
  parser.add_argument('--stages', nargs='+', required=True, metavar='NAME=RUNS', help='RUNS is a pattern of workdirs')
  parser.add_argument('--out', help='JSON file to write: the scores of every run')
  args = parser.parse_args(argv)
  runs = {}
  for stage in args.stages:
    name, _, pattern = stage.partition('=')
    runs[name] = paths.glob(pattern)
    if not runs[name]:
      parser.error(f'--stages {stage}: no such folder')
  scores: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
  try:
    with tempfile.TemporaryDirectory(prefix='m2d_clap_stages_') as scratch:
      found = evaluators(args.corpus, args.tasks, args.captions, scratch)
      for name, run in [(name, run) for name, own in runs.items() for run in own]:
        scores[name].append(scores_of(run, found))
        print(f'{name}, {run}: ' + ', '.join(f'{key} {100 * value:.1f}' for key, value in scores[name][-1].items()),
              file=sys.stderr, flush=True)
  except UserError as error:
    parser.error(str(error))
  print(table(scores))
  if args.out:
    paths.write_text(args.out, json.dumps({'runs': runs, 'scores': scores}, indent=2) + '\n')


if __name__ == '__main__':
  main()
