"""The `m2d-clap` command. Each subcommand imports what it needs only when it runs."""
import argparse
import os
import sys

from m2d_clap_jax.errors import UserError


def main(argv=None):
  """Runs one subcommand; returns the exit code: 0, 2 for a user's mistake (one line on stderr), 130 for Ctrl-C."""
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # TensorFlow's start-up notices would bury ours
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')  # it only writes files here; else it announces its rounding
  parser = argparse.ArgumentParser(prog='m2d-clap', description='M2D-CLAP: tools around pre-training.')
  commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
  _add_prepare(commands)
  args = parser.parse_args(argv)
  try:
    args.run(args)
  except UserError as e:
    print(f'm2d-clap: {e}', file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print('m2d-clap: interrupted; the same command continues where it stopped', file=sys.stderr)
    return 130
  return 0


def _add_prepare(commands):
  p = commands.add_parser(
      'prepare', help='audio and captions -> TFRecord shards',
      description='Manifest and audio files (or log-mel .npy files and caption embeddings) -> a folder of TFRecord '
                  'shards. The same command continues an interrupted preparation.')
  source = p.add_mutually_exclusive_group(required=True)
  source.add_argument('--manifest', help='CSV (file_name, caption and/or label, optional split) or JSON lines')
  source.add_argument('--logmels', metavar='FOLDER', help='folder of [F, T] .npy log-mels, instead of a manifest')
  p.add_argument('--out', required=True, help='folder to write')
  p.add_argument('--audio_root', help="folder that file names are relative to (default: the manifest's folder)")
  p.add_argument('--caption_embeddings', action='append', default=[], metavar='PATTERN',
                 help='capemb_*.npy dictionaries for --logmels; may be given several times')
  p.add_argument('--text_encoder', default='thenlper/gte-base', metavar='NAME',
                 help='model name, folder, minilm or none (default: %(default)s)')
  p.add_argument('--split', help='prepare this split only')
  p.add_argument('--num_shards', type=int, help='shards of each split (default: one for 512 files)')
  p.add_argument('--workers', type=int, help='decoding processes (default: one for each core)')
  p.add_argument('--sample_rate', type=int, default=16000, help='16000 or 32000 (default: %(default)s)')
  p.add_argument('--max_seconds', type=float, default=30.0, help='longer clips are cut (default: %(default)s)')
  p.add_argument('--embedding_dtype', default='float16', choices=['float16', 'float32'], help='default: %(default)s')
  p.set_defaults(run=_prepare)


def _prepare(args):
  from m2d_clap_jax.data import prepare
  common = dict(split=args.split, num_shards=args.num_shards, workers=args.workers, sample_rate=args.sample_rate,
                max_seconds=args.max_seconds, embedding_dtype=args.embedding_dtype, text_encoder=args.text_encoder)
  if args.logmels:
    if args.audio_root:
      raise UserError('--audio_root belongs to --manifest; --logmels takes none')
    meta = prepare.prepare_logmels(args.logmels, args.caption_embeddings, args.out, **common)
  else:
    if args.caption_embeddings:
      raise UserError('--caption_embeddings belongs to --logmels; with --manifest choose a --text_encoder')
    root = args.audio_root or os.path.dirname(os.path.abspath(args.manifest))
    meta = prepare.prepare(args.manifest, root, args.out, **common)
  print(prepare.summary(meta, args.out))


if __name__ == '__main__':
  sys.exit(main())
