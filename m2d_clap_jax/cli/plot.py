"""`m2d-clap plot`: figures of runs and of models."""
import itertools
import os
import re
import sys

import numpy as np

from m2d_clap_jax.audio.names import printable
from m2d_clap_jax.errors import UserError


def add_arguments(p):
  """Declares runs, sounds and the folder of the figures."""
  p.description = """\
One run -> RUN_curves.png: its losses, norms, scores and schedules; several runs
-> A+B_curves.png: one panel per quantity and one line per run. --audio draws
what the blocks of the first RUN, which may then be any model, attend to in each
file: RUN_FILE_attention.png. --classes takes a folder with the sounds of each
class in a sub-folder named after it (sounds/dog/*, sounds/rain/*), and draws
RUN_embeddings.png for the first RUN, and if it has a CLAP head
RUN_similarity.png, RUN_confusion.png and RUN_classes.png of zero-shot
classification. Evaluations write figures to their own --workdir."""
  p.epilog = """\
examples:
  m2d-clap plot runs/clips
  m2d-clap plot runs/a runs/b -o figures
  m2d-clap plot exported --audio dogs/17.mp3 -o figures
  m2d-clap plot exported --classes sounds -o figures"""
  p.add_argument('runs', nargs='+', metavar='RUN', help="a run's --workdir")
  p.add_argument('--audio', nargs='+', default=[], metavar='FILE', help='sounds to draw the attention on')
  p.add_argument('--classes', metavar='FOLDER', help='sounds in one sub-folder per class')
  p.add_argument('-o', '--out', metavar='FOLDER', help="where the figures go (default: the first RUN's folder, or here)")


def run(args):
  """Draws the figures and prints their paths; UserError if there is nothing to draw."""
  from m2d_clap_jax import paths
  names = _called(args.runs)
  folder = paths.as_path(args.out or _own_folder(args.runs[0]))
  written = []
  if args.audio or args.classes:
    from m2d_clap_jax import api
    pipeline = api.load(args.runs[0])
    written += _attention(pipeline, args.audio, folder, names[0]) if args.audio else []
    written += _classes(pipeline, args.classes, folder, names[0]) if args.classes else []
  if not written or _history(args.runs[0]):
    written.append(_curves(args.runs, names, folder))
  print('\n'.join(map(os.fspath, written)))


def _own_folder(run: str) -> str:
  from m2d_clap_jax import paths
  from m2d_clap_jax.weights import hub
  return run if not hub.is_address(run) and paths.as_path(run).is_dir() else '.'


def _called(runs: list[str]) -> list[str]:
  """What figures call the runs or models: the last part of their paths, or the whole where these are alike."""
  short = [re.sub(r'\.(pth|safetensors)$', '', os.path.basename(run if '://' in run else os.path.abspath(run)))
           for run in (run.rstrip('/') for run in runs)]
  return short if len(set(short)) == len(set(runs)) else [re.sub(r'[^\w.-]+', '_', run).strip('_.') for run in runs]


def _history(workdir) -> dict:
  from m2d_clap_jax.train.log import read_history
  return read_history(workdir)


def _curves(runs, names, folder):
  from m2d_clap_jax.eval import plots
  histories = {}
  for run, name in zip(runs, names):
    histories[name] = _history(run)
    if not histories[name]:
      raise UserError(f'{run}: contains no metrics.jsonl with rows: name the --workdir of a run')
  path = folder / f'{"+".join(names)[:100]}_curves.png'
  if len(runs) == 1:
    plots.loss_curves(histories[names[0]], path, title=names[0])
  else:
    plots.compared_curves(histories, path)
  return path


def _attention(pipeline, files, folder, name: str) -> list:
  from m2d_clap_jax.eval import attention, plots
  depth, written = pipeline.network.depth, []
  for file in files:
    try:
      logmel, weights = attention.cls_attention(pipeline, file)
    except UserError as error:
      print(f'{file}: {error}', file=sys.stderr)
      continue
    blocks = sorted({0, depth // 2, depth - 1})
    maps = {f'block {i + 1} of {depth}, mean of {weights.shape[1]} heads': weights[i].mean(axis=0) for i in blocks}
    written.append(_unused(folder, f'{name}_{os.path.splitext(os.path.basename(file))[0]}', written))
    plots.attention_maps(logmel, maps, written[-1], spec=pipeline.logmel, title=os.path.basename(file))
  if not written:
    raise UserError('none of the files could be read, for the reasons above')
  return written


def _classes(pipeline, sounds, folder, name: str) -> list:
  """Draws the sounds of `sounds`/CLASS/ as a model represents them."""
  from m2d_clap_jax.api import TEMPLATE
  from m2d_clap_jax.eval import class_plots
  from m2d_clap_jax.eval.metrics import zeroshot
  features, audio, owners = _features(pipeline, sounds)
  classes = sorted(set(owners))
  labels = np.array([classes.index(owner) for owner in owners])
  title = f'{name}, {os.path.basename(os.path.normpath(sounds))}'
  embeddings = folder / f'{name}_embeddings.png'
  written = [embeddings] if len(features) >= class_plots.FEWEST_EMBEDDINGS else []
  class_plots.embedding_map(features, labels, classes, embeddings, title=f'{title}: clip embeddings (t-SNE)')
  if audio is not None:
    text = pipeline.encode_labels(classes)
    found = zeroshot(audio, text, labels)
    title = f'{title}, zero-shot'
    class_plots.draw_classes(folder, classes, np.eye(len(classes))[labels], found['similarity'], multi_label=False,
                             title=title, prefix=f'{name}_')
    class_plots.similarity_map(found['class_similarity'], classes, [TEMPLATE.replace('{}', each) for each in classes],
                               folder / f'{name}_similarity.png',
                               title=f'{name}: {class_plots.MEAN_COSINES}')
    written += [folder / f'{name}_{kind}.png' for kind in ('similarity', 'confusion', 'classes')]
  if not written:
    raise UserError(f'{sounds}: {len(features)} usable sounds are too few for a map of embeddings, which needs '
                    f'{class_plots.FEWEST_EMBEDDINGS}, and the model has no CLAP head for the other figures')
  return written


def _features(pipeline, sounds):
  """-> clip embeddings [n, 5 * D], CLAP embeddings [n, E] or None, and the class of each of the usable sounds."""
  from m2d_clap_jax.audio import files
  if not os.path.isdir(sounds):
    raise UserError(f'{sounds}: no such folder: name one with sounds in one sub-folder per class')
  owner = {}
  for name in files.find([sounds]):
    part, _, rest = os.path.relpath(name, sounds).partition(os.sep)
    if rest:
      owner[name] = part
    else:
      print(f'left out: {printable(name)}: not in a sub-folder', file=sys.stderr)
  if not owner:
    raise UserError(f'{sounds}: has no sub-folders with sounds: put the sounds of each class into a sub-folder named after it')

  def both(clips):
    means, audio = pipeline.features(clips)
    return list(zip(means, [None] * len(means) if audio is None else audio))
  usable = [(*result, owner[name]) for name, result, reason, _ in files.results(list(owner), both) if not reason]
  if not usable:
    raise UserError(f'{sounds}: none of the sounds can be used, for the reasons above')
  means, audio, owners = zip(*usable)
  return np.stack(means), None if audio[0] is None else np.stack(audio), owners


def _unused(folder, stem: str, written: list):
  """Distinct figure names, also for files with the same name in several folders or with several endings."""
  names = itertools.chain([''], (f'-{i}' for i in itertools.count(2)))
  return next(path for name in names if (path := folder / f'{stem}{name}_attention.png') not in written)
