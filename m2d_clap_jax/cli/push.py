"""`m2d-clap push`: a portable folder to the Hugging Face Hub."""


def add_arguments(p):
  """Declares the folder and the model's name."""
  p.description = """\
Uploads the portable folder FOLDER (made by m2d-clap convert) as the model NAME
to the Hugging Face Hub: ORGANISATION/NAME or ORGANISATION/NAME@BRANCH, with or
without hf:// in front. Review its README.md first (a missing one is written):
it is the model card, and it is up to you to state the licence of the data that
the model was trained on."""
  p.epilog = """\
example:
  m2d-clap push exported ORGANISATION/NAME --private"""
  p.add_argument('folder', metavar='FOLDER')
  p.add_argument('name', metavar='NAME')
  p.add_argument('--private', action='store_true', help='make a new repository private to its owners')


def run(args):
  """Uploads the folder and prints the address of the model."""
  from m2d_clap_jax.weights import hub
  print(hub.upload(args.folder, args.name, private=args.private))
