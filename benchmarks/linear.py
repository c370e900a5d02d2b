"""Linear evaluation of all folds and runs in parallel, beside the same problems one after the other.

  python -m benchmarks.linear --clips 2000 --folds 5 --runs 3

Features are random numbers around one centre per class, as wide as Base's; every problem is trained for the
maximum number of epochs, so that early stopping favours neither.
"""
import argparse
import functools

import numpy as np

from benchmarks.report import Row, finish, in_turns
from m2d_clap_jax.eval import linear_protocol


def data(clips: int, classes: int, width: int):
  """-> features [n, D], multi-hot targets [n, C]."""
  rng = np.random.default_rng(0)
  labels = np.arange(clips) % classes
  features = rng.standard_normal((clips, width)) + 0.3 * rng.standard_normal((classes, width))[labels]
  return features.astype(np.float32), np.eye(classes, dtype=np.float32)[labels]


def problems(targets: np.ndarray, folds: int, runs: int):
  """The problems of the evaluation: one fold is the test set, a tenth of the others the validation set."""
  fold = np.random.default_rng(1).permutation(len(targets)) % folds
  none = np.array([], int)
  splits = [{'train': np.flatnonzero(fold != k), 'valid': none, 'test': np.flatnonzero(fold == k)} for k in range(folds)]
  return linear_protocol.problems_of(targets, splits, runs, seed=0)


def one_by_one(features, targets, every, protocol):
  for problem in every:
    linear_protocol.run(features, targets, [problem], protocol=protocol)


def main(argv=None):
  parser = argparse.ArgumentParser(prog='python -m benchmarks.linear', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--clips', type=int, default=2000)
  parser.add_argument('--classes', type=int, default=50)
  parser.add_argument('--width', type=int, default=3840)
  parser.add_argument('--folds', type=int, default=5)
  parser.add_argument('--runs', type=int, default=3)
  parser.add_argument('--epochs', type=int, default=200)
  parser.add_argument('--rounds', type=int, default=1)
  parser.add_argument('--out', help='JSON file to write')
  args = parser.parse_args(argv)
  features, targets = data(args.clips, args.classes, args.width)
  every = problems(targets, args.folds, args.runs)
  protocol = linear_protocol.Protocol(max_epochs=args.epochs, patience=args.epochs)
  timings = in_turns({
      'side by side': functools.partial(linear_protocol.run, features, targets, every, protocol=protocol),
      'one by one': functools.partial(one_by_one, features, targets, every, protocol)}, args.rounds, warm_up=0)
  rows = [Row(name, timing.best, 's') for name, timing in timings.items()]
  rows += [Row('gain', timings['one by one'].best / timings['side by side'].best, 'times'),
           Row('peak growth of memory', timings['side by side'].grew_mb, 'MB'),
           Row('the same one by one', timings['one by one'].grew_mb, 'MB')]
  finish('linear', {key: value for key, value in vars(args).items() if key not in ('out', 'rounds')}, rows, timings,
         args.out)


if __name__ == '__main__':
  main()
