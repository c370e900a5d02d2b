"""`m2d-clap plot`: pictures of runs and of models."""
import itertools
import os
import sys

from m2d_clap_jax.errors import UserError


def add_arguments(p):
  p.description = """\
Runs -> curves.png: one run's losses, norms, scores and schedules; of several
runs a panel for each quantity and a line for each run. With --audio also, for
the first RUN, which may then be any model, what its blocks attend to in each
file. Figures of evaluations are in their --workdir already."""
  p.epilog = """\
examples:
  m2d-clap plot runs/clips
  m2d-clap plot runs/a runs/b -o figures
  m2d-clap plot exported --audio dogs/17.mp3 -o figures"""
  p.add_argument('runs', nargs='+', metavar='RUN', help="a run's --workdir")
  p.add_argument('--audio', nargs='+', default=[], metavar='FILE', help='sounds to look at')
  p.add_argument('-o', '--out', default='.', metavar='FOLDER', help='where the figures go (default: here)')


def run(args):
  from m2d_clap_jax import paths
  folder = paths.as_path(args.out)
  written = _attention(args.runs[0], args.audio, folder) if args.audio else []
  if not args.audio or _history(args.runs[0]):
    written.append(_curves(args.runs, folder))
  print('\n'.join(map(os.fspath, written)))


def _history(workdir) -> dict:
  from m2d_clap_jax.train.runlog import read_history
  return read_history(workdir)


def _curves(runs, folder):
  from m2d_clap_jax import plots
  histories = {name: _history(name) for name in runs}
  for name, history in histories.items():
    if not history:
      raise UserError(f'{name}: holds no metrics.jsonl with rows: name the --workdir of a run')
  path = folder / 'curves.png'
  if len(runs) == 1:
    plots.loss_curves(histories[runs[0]], path)
  else:
    plots.compared_curves(histories, path)
  return path


def _attention(model, files, folder) -> list:
  from m2d_clap_jax import api, attention, plots
  pipeline = api.load(model)
  depth, written = pipeline.network.depth, []
  for file in files:
    try:
      logmel, weights = attention.cls_attention(pipeline, file)
    except UserError as error:
      print(f'{file}: {error}', file=sys.stderr)
      continue
    blocks = sorted({0, depth // 2, depth - 1})
    maps = {f'block {i + 1} of {depth}, mean of {weights.shape[1]} heads': weights[i].mean(axis=0) for i in blocks}
    written.append(_unused(folder, os.path.splitext(os.path.basename(file))[0], written))
    plots.attention_maps(logmel, maps, written[-1], title=os.path.basename(file))
  if not written:
    raise UserError('none of the files could be read, for the reasons above')
  return written


def _unused(folder, stem: str, written: list):
  """Files of one name in several folders, or of several kinds, get figures of their own."""
  names = itertools.chain([''], (f'-{i}' for i in itertools.count(2)))
  return next(path for name in names if (path := folder / f'{stem}{name}_attention.png') not in written)
