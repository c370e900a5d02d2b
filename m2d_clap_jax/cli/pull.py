"""`m2d-clap pull`: a model from the Hugging Face Hub."""


def add_arguments(p):
  """Declares the model's name and the folder to write."""
  p.description = """\
Downloads the model NAME from the Hugging Face Hub, ORGANISATION/NAME or
ORGANISATION/NAME@REVISION with or without hf:// in front, and prints its
location: the folder DST, or the Hub's cache. Commands and m2d_clap_jax.load
also accept hf://ORGANISATION/NAME."""
  p.epilog = """\
example:
  m2d-clap pull ORGANISATION/NAME exported"""
  p.add_argument('name', metavar='NAME')
  p.add_argument('dst', metavar='DST', nargs='?', help="folder to write (default: the Hub's cache)")


def run(args):
  """Downloads the model and prints where it is."""
  from m2d_clap_jax.weights import hub
  print(hub.download(args.name, args.dst))
