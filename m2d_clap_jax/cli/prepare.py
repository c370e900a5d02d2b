"""`m2d-clap prepare`: the options of `data.prepare`."""
import argparse
import os
import re

from m2d_clap_jax.errors import UserError
from m2d_clap_jax.paths import is_remote
from m2d_clap_jax.tables.layouts import LAYOUTS

MANIFEST = ('CSV (file_name, caption and/or label, optional split), JSON lines or JSON; with --like, the folder of a published '
            'data set or a table of it')
TEXT_ENCODER = 'thenlper/gte-base'


def add_arguments(p):
  """Declares what is read, how it is embedded, and the folder to write."""
  p.description = """\
Manifest and audio files (or log-mel .npy files and caption embeddings) -> a
folder of TFRecord shards. The same command continues an interrupted
preparation."""
  p.epilog = """\
examples:
  m2d-clap prepare --manifest=clips.csv --audio_root=wavs --out=data/clips
  m2d-clap prepare --manifest=clips.csv --audio_root=wavs --out=data/clips --task=3/16
  m2d-clap prepare --manifest=t.csv --columns=file_name:path,caption:text --out=data/t
  m2d-clap prepare --manifest=clips.csv --caption_embeddings=vectors.parquet --out=data/clips
  m2d-clap prepare --manifest=ESC-50-master --like=esc50 --out=data/esc50
  m2d-clap prepare --manifest=gs://b/clips.csv --out=gs://b/data --beam='--runner=DataflowRunner --project=p'"""
  source = p.add_mutually_exclusive_group(required=True)
  source.add_argument('--manifest', help=MANIFEST)
  source.add_argument('--logmels', metavar='FOLDER', help='folder of [F, T] .npy log-mels, instead of a manifest')
  p.add_argument('--out', required=True, help='folder to write')
  add_manifest_options(p)
  p.add_argument('--caption_embeddings', action='append', default=[], metavar='FILE',
                 help='.parquet or .npz file of captions and vectors, instead of a text encoder; for --logmels a pattern of '
                 'capemb_*.npy dictionaries; may be given several times')
  p.add_argument('--text_encoder', metavar='NAME', help=f'model name, folder, minilm or none (default: {TEXT_ENCODER})')
  p.add_argument('--num_shards', type=int, help='shards of each split (default: one for 512 files)')
  p.add_argument('--workers', type=int, help='decoding processes (default: one for each core)')
  p.add_argument('--sample_rate', type=int, default=16000, help='16000 or 32000 (default: %(default)s)')
  p.add_argument('--max_seconds', type=float, default=30.0, help='longer clips are cut (default: %(default)s)')
  p.add_argument('--embedding_dtype', default='float16', choices=['float16', 'float32'], help='default: %(default)s')
  p.add_argument('--task', metavar='I/N', type=_task,
                 help='write every N-th shard from the I-th (from 0): for array jobs, all with the same other options')
  p.add_argument('--beam', metavar='OPTIONS', nargs='?', const='',
                 help="make the shards in an Apache Beam pipeline, with Beam's options in one string, such as "
                      "'--runner=DataflowRunner --project=...' (default: this machine)")


def add_manifest_options(p):
  """How to read a manifest, for the commands that do; see `located`."""
  p.add_argument('--audio_root', help="folder that file names are relative to (default: the manifest's folder)")
  p.add_argument('--columns', default='', metavar='OURS:THEIRS,...',
                 help='names of the columns of the manifest, such as file_name:path,caption:text,caption:text2')
  p.add_argument('--like', default='', choices=list(LAYOUTS), metavar='NAME',
                 help=f'the published data set that the manifest is of: {", ".join(LAYOUTS)}')
  p.add_argument('--split', help='this split only')


def located(args):
  """-> (manifest, audio root) of these options."""
  from m2d_clap_jax.tables.published import root_of
  if args.like and args.columns:
    raise UserError('--like names the columns itself: leave out --columns')
  manifest = os.path.expanduser(args.manifest)
  manifest = manifest if is_remote(manifest) else os.path.abspath(manifest)
  return manifest, args.audio_root or (root_of(manifest, args.like) if args.like else os.path.dirname(manifest))


def _task(text):
  match = re.fullmatch(r'(\d+)/(\d+)', text)
  if not match or int(match[1]) >= int(match[2]):
    raise argparse.ArgumentTypeError(f'{text!r} is not I/N with I from 0 to N - 1')
  return int(match[1]), int(match[2])


def run(args):
  """Prepares the data and prints a summary; UserError for options that exclude each other."""
  from m2d_clap_jax.data import prepare
  from m2d_clap_jax.tables.entries import parse_columns
  common = dict(split=args.split, num_shards=args.num_shards, workers=args.workers, sample_rate=args.sample_rate,
                max_seconds=args.max_seconds, embedding_dtype=args.embedding_dtype, task=args.task, beam=args.beam,
                text_encoder=args.text_encoder or TEXT_ENCODER, caption_embeddings=args.caption_embeddings)
  if args.logmels:
    for option in ('audio_root', 'columns', 'like'):
      if getattr(args, option):
        raise UserError(f'--{option} belongs to --manifest; --logmels takes none')
    meta = prepare.prepare_logmels(args.logmels, out=args.out, **common)
  else:
    if args.caption_embeddings and args.text_encoder:
      raise UserError('--caption_embeddings takes the place of --text_encoder: leave one of them out')
    manifest, root = located(args)
    meta = prepare.prepare(manifest, root, args.out, columns=parse_columns(args.columns), like=args.like, **common)
  if meta:
    print(prepare.summary(meta, args.out))
