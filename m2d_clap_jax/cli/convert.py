"""`m2d-clap convert`: a model from any source as a portable folder, a checkpoint for the authors' tools, or a program."""
import datetime
import os

from m2d_clap_jax.cli import model_options
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.paths import as_path, names_in


def add_arguments(p):
  """Declares source, destination and format."""
  p.description = """\
SRC -> the folder DST, a portable model (model.safetensors, config.json and a
README.md as model card); with --to pth, DST receives the folder and file that
the authors' PyTorch tools expect, as in
DST/m2d_clap_vit_base-80x608p16x16-YYMMDD/checkpoint-N.pth, where N is the
number of updates made by this package; the name also states rate and text
encoder, as in ...p16x16p16kpBpTI-YYMMDD; with --to stablehlo, DST receives
stablehlo.npz, the audio side as a program that runs with jax alone, on CPU, CUDA
and TPU (waves to embeddings and to scores of a fine-tuned head)."""
  p.epilog = """\
examples:
  m2d-clap convert runs/clips exported --encoder_only
  m2d-clap convert runs/clips checkpoints --to pth
  m2d-clap convert runs/clips exported --to stablehlo
  m2d-clap convert m2d_clap_vit_base-80x608p16x16-240128/checkpoint-300.pth exported"""
  p.add_argument('src', metavar='SRC', help=model_options.KINDS)
  p.add_argument('dst', metavar='DST', help='folder to write')
  p.add_argument('--to', default='portable', choices=['portable', 'pth', 'stablehlo'], help='default: %(default)s')
  p.add_argument('--encoder_only', action='store_true',
                 help='leave out predictor and target, which only pre-training needs: more than half of the size')
  model_options.add_overrides(p)


def run(args):
  """Writes the model in the chosen format; UserError if DST is taken."""
  from m2d_clap_jax.weights import family, read
  from m2d_clap_jax.weights.portable import save_portable
  from m2d_clap_jax.weights.public import checkpoint_folder, save_pth
  dst = as_path(args.dst)
  if dst.suffix in ('.pth', '.safetensors', '.npz'):
    raise UserError(f'{dst}: DST is a folder, in which the files are named automatically; give one without {dst.suffix}'
                    + (', and --to pth' if dst.suffix == '.pth' else ''))
  if args.to == 'portable':
    _check_is_free(dst)
    same = args.src.rstrip('/') == str(dst)  # in stores; local paths are compared below
    if same or os.path.exists(dst) and os.path.exists(args.src) and os.path.samefile(args.src, dst):
      raise UserError(f'{dst}: DST and SRC are the same; give another folder')
  weights = read(args.src, **model_options.overrides(args))
  if args.encoder_only:
    weights = weights.encoder_only()
  if args.to == 'portable':
    out = save_portable(weights, dst)
  elif args.to == 'stablehlo':
    from m2d_clap_jax import stablehlo
    out = stablehlo.save(weights, _new(dst / 'stablehlo.npz'))
    print(f'{out}: {family(weights)}; a program for {", ".join(stablehlo.PLATFORMS)}')
    return
  else:
    _new(dst / checkpoint_folder(weights, datetime.date.today()) / f'checkpoint-{weights.step}.pth')
    out = save_pth(weights, dst, weights.step)
  print(f'{out}: {family(weights)}; pre-training can{"" if weights.complete else "not"} continue from it')


def _new(place):
  """The path of a file to write; UserError if it exists."""
  if place.exists():
    raise UserError(f'{place}: already exists; remove it or give another folder')
  return place


def _check_is_free(folder):
  """Raises UserError if DST has other contents; a portable model may be replaced."""
  from m2d_clap_jax.weights.portable import CARD, CONFIG, TENSORS
  if folder.is_file():
    raise UserError(f'{folder}: is a file; give a folder')
  found = names_in(folder) if folder.is_dir() else []
  other = [name for name in found if name not in (CONFIG, TENSORS, CARD)]
  if found and (other or TENSORS not in found):
    raise UserError(f'{folder}: has other contents ({", ".join((other or found)[:3])}); give a new or empty folder')
