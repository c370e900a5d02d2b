"""`m2d-clap push`: a portable folder to the Hugging Face Hub."""


def add_arguments(p):
  p.description = """\
The portable folder FOLDER (made by m2d-clap convert) becomes the model NAME
of the Hugging Face Hub: ORGANISATION/NAME or ORGANISATION/NAME@BRANCH, with or
without hf:// in front. Look at its README.md before (one is written where
there is none): it is the model's public face, and the licence of the data that
it was trained on is yours to state."""
  p.epilog = """\
example:
  m2d-clap push exported ORGANISATION/NAME --private"""
  p.add_argument('folder', metavar='FOLDER')
  p.add_argument('name', metavar='NAME')
  p.add_argument('--private', action='store_true', help='a new repository is seen by its owners only')


def run(args):
  from m2d_clap_jax.weights import hub
  print(hub.upload(args.folder, args.name, private=args.private))
