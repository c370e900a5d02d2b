"""`m2d-clap report`: results of several evaluations as the paper's tables."""


def add_arguments(p):
  """Declares the folders of the evaluations."""
  p.description = """\
Results of evaluations (linear, fine-tuning, zero-shot, retrieval) -> the
paper's tables as Markdown, beside the paper's numbers. Folders are searched
with all sub-folders."""
  p.epilog = """\
examples:
  m2d-clap report runs/linear runs/zeroshot
  m2d-clap report runs > results.md"""
  p.add_argument('folders', nargs='+', metavar='FOLDER', help='--workdir of an evaluation, or a folder of several')


def run(args):
  """Prints the tables as Markdown."""
  from m2d_clap_jax.eval.report import merge
  print(merge(args.folders), end='')
