"""`m2d-clap fetch`: writes data sets of TensorFlow Datasets' catalogue as evaluation tasks."""


def add_arguments(p):
  """Declares the data set and its folders."""
  from m2d_clap_jax.tasks.table import CATALOGUE
  p.description = """\
A data set of TensorFlow Datasets' catalogue -> FLAC files and the metadata CSV
that evaluations read. The same command resumes an interrupted one."""
  p.epilog = """\
examples:
  m2d-clap fetch cremad --out=data/cremad
  m2d-clap fetch vc1 --out=data/vc1 --manual_dir=downloads"""
  p.add_argument('task', choices=sorted(CATALOGUE), metavar='TASK', help=', '.join(sorted(CATALOGUE)))
  p.add_argument('--out', required=True, help='folder to write')
  p.add_argument('--data_dir', help="where the catalogue keeps its data (default: the catalogue's own)")
  p.add_argument('--manual_dir', help='folder of archives that must be downloaded by hand')


def run(args):
  """Writes the data set and prints the counts."""
  from m2d_clap_jax.tasks.fetch import fetch
  print(fetch(args.task, args.out, data_dir=args.data_dir, manual_dir=args.manual_dir))
