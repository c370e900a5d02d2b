"""`m2d-clap models`: the authors' released models, which every command opens by name."""
import json


def add_arguments(p):
  """Declares the form of the list."""
  p.description = """\
Lists the authors' released models. Use such a name wherever a command takes
MODEL (and as --config.init): the model is downloaded once, into the cache
folder shown below the list ($M2D_CLAP_HOME selects another). Their licence is
the authors' own, for evaluation only."""
  p.epilog = """\
examples:
  m2d-clap models
  m2d-clap models --json
  m2d-clap info m2d_clap_vit_base-80x608p16x16-240128"""
  p.add_argument('--json', action='store_true', help='for programs: a JSON list with one object per model')


def run(args):
  """Prints the list and where models are cached."""
  from m2d_clap_jax.weights import released
  facts = [describe(name) for name in released.RELEASED]
  if args.json:
    print(json.dumps(facts, indent=2))
    return
  rows = [('NAME', 'WHAT', 'KHZ', 'SECONDS', 'TEXT ENCODER', 'SIZE', 'CACHED')] + [_row(each) for each in facts]
  widths = [max(map(len, column)) for column in zip(*rows)]
  for row in rows:
    print('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
  print(f'\ncache: {released.home()}\nlicence: {released.LICENCE}')


def describe(name: str) -> dict:
  """A released model -> JSON data; size_gb is that of the cached checkpoint, else of the download, None if unknown."""
  from m2d_clap_jax.weights import released
  about, file = released.RELEASED[name], released.cached(name)
  size = round(file.stat().st_size / 1e9, 2) if file else about.gigabytes
  return {'name': name, 'what': about.about, 'sample_rate': about.sample_rate, 'seconds': about.seconds,
          'text_encoder': about.text, 'size_gb': size, 'cached': file and str(file), 'url': released.url(name)}


def _row(facts: dict) -> tuple[str, ...]:
  size = f'{facts["size_gb"]:.1f} GB' if facts['size_gb'] else '-'
  return (facts['name'], facts['what'], str(facts['sample_rate'] // 1000), f'{facts["seconds"]:.2f}',
          facts['text_encoder'] or '-', size, 'yes' if facts['cached'] else '-')
