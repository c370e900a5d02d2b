"""`m2d-clap captions`: the captions of a manifest, to be embedded elsewhere."""
from m2d_clap_jax.cli.prepare import MANIFEST, add_manifest_options, located
from m2d_clap_jax.errors import UserError


def add_arguments(p):
  """Declares the manifest, how to read it, and the file to write."""
  p.description = """\
Writes the captions that `m2d-clap prepare` will find in a manifest, one a line
and each once, with those made from labels. Embed them by any sentence encoder
and give the vectors to `m2d-clap prepare --caption_embeddings`."""
  p.epilog = """\
examples:
  m2d-clap captions clips.csv -o captions.txt --audio_root=wavs
  m2d-clap captions clotho --like=clotho -o captions.txt"""
  p.add_argument('manifest', help=MANIFEST)
  p.add_argument('-o', '--out', required=True, metavar='OUT', help='text file to write')
  add_manifest_options(p)


def run(args):
  """Writes the captions to --out; UserError if the manifest or --out cannot be used."""
  from m2d_clap_jax import paths
  from m2d_clap_jax.data import prepare
  from m2d_clap_jax.tables.entries import parse_columns
  manifest, root = located(args)
  rows = prepare.read_rows(manifest, root, columns=parse_columns(args.columns), like=args.like, split=args.split)
  texts = prepare.all_captions(rows)
  try:
    paths.write_text(args.out, ''.join(f'{text}\n' for text in texts))
  except OSError as error:
    raise UserError(f'{args.out}: cannot be written ({error.strerror or error}): choose another --out') from error
  print(f'{args.out}: {len(texts)} captions of {sum(not row.reason for row in rows)} clips')
