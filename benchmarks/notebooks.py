"""Makes the notebooks of docs/examples, with their outputs, and the pages that show them, from the scripts of examples/.

  pip install -e '.[train,docs]'
  python -m benchmarks.notebooks          # after bash launch/local.sh, whose model and clips they use

Run it after a change of a script. tests/test_examples.py fails where scripts, notebooks and pages differ.
"""
import argparse
import base64
import io
import os
import pathlib
import shutil
import tempfile

import jupytext
import nbformat

EXAMPLES = pathlib.Path(__file__).parent.parent / 'examples'
PAGES = EXAMPLES.parent / 'docs' / 'examples'
INSTRUMENTS = ('flute', 'violin', 'trumpet', 'tuba', 'harp', 'banjo', 'xylophone', 'church_organ')  # of the linear probe


def source(script: pathlib.Path):
  """A script -> its notebook without outputs; equal scripts give equal notebooks."""
  notebook = jupytext.read(script)
  notebook.metadata = {'kernelspec': {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'},
                       'language_info': {'name': 'python'}}
  notebook.nbformat, notebook.nbformat_minor = 4, 5
  for i, cell in enumerate(notebook.cells):
    cell.id, cell.metadata = f'cell-{i}', {}
  return notebook


def execute(notebook, folder: str):
  """Runs a notebook in a folder and keeps what it prints and draws."""
  from nbclient import NotebookClient
  NotebookClient(notebook, timeout=600, record_timing=False, coalesce_streams=True,
                 resources={'metadata': {'path': folder}}).execute()
  notebook.metadata['language_info'] = {'name': 'python'}  # without the version
  for cell in notebook.cells:
    if 'outputs' in cell:  # without remarks of libraries about this machine
      cell.outputs = [output for output in cell.outputs if output.get('name') != 'stderr']
    for output in cell.get('outputs', []):
      if 'image/png' in output.get('data', {}):
        output.data['image/png'] = base64.b64encode(smaller(base64.b64decode(output.data['image/png']))).decode()


def smaller(png: bytes) -> bytes:
  """The same image in 256 colours, in a third of the bytes; none is off by more than a few hundredths."""
  from PIL import Image
  buffer = io.BytesIO()
  image = Image.open(io.BytesIO(png)).convert('RGB')
  image = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
  image.save(buffer, format='png', optimize=True)
  return buffer.getvalue()


def page(notebook, name: str) -> tuple[str, dict[str, bytes]]:
  """An executed notebook -> (its page in Markdown, {name of a figure: PNG})."""
  parts, figures = [], {}
  for cell in notebook.cells:
    parts.append(cell.source if cell.cell_type == 'markdown' else f'```python\n{cell.source}\n```')
    for output in cell.get('outputs', []):
      if output.output_type == 'stream':
        parts.append(f'```text\n{output.text.rstrip()}\n```')
      elif 'image/png' in output.data:
        kind = output.data['text/plain'].strip("'").removesuffix('.png')  # a figure is represented by its path
        figures[f'{name}_{kind}.png'] = base64.b64decode(output.data['image/png'])
        parts.append(f'![{kind}]({name}_{kind}.png)')
  parts.append(f'This page as a [notebook]({name}.ipynb), and as a script: `examples/{name}.py`.')
  return '\n\n'.join(parts) + '\n', figures


def prepare(folder: pathlib.Path, demo: pathlib.Path):
  """Puts what the notebooks use into a folder: the demo's run and data, some of its clips by class, an exported model."""
  from m2d_clap_jax import stablehlo, weights
  for name in ('runs', 'data'):
    os.symlink(demo / name, folder / name)
  for name in INSTRUMENTS:
    (folder / 'sounds' / name).mkdir(parents=True)
    for clip in sorted((demo / 'data' / 'demo' / 'audio' / 'test').glob(f'{name}-*.wav')):
      shutil.copy(clip, folder / 'sounds' / name)
  stablehlo.save(weights.read(demo / 'runs' / 'demo'), folder / 'exported' / 'stablehlo.npz')


def main(argv=None):
  parser = argparse.ArgumentParser(prog='python -m benchmarks.notebooks', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--demo', default='.', help='folder with runs/demo and data/demo (default: the current one)')
  args = parser.parse_args(argv)
  PAGES.mkdir(exist_ok=True)
  with tempfile.TemporaryDirectory() as folder:
    prepare(pathlib.Path(folder), pathlib.Path(args.demo).resolve())
    for script in sorted(EXAMPLES.glob('*.py')):
      notebook = source(script)
      execute(notebook, folder)
      nbformat.write(notebook, PAGES / f'{script.stem}.ipynb')
      text, figures = page(notebook, script.stem)
      (PAGES / f'{script.stem}.md').write_text(text)
      for name, png in figures.items():
        (PAGES / name).write_bytes(png)
      print(f'{PAGES / script.stem}.ipynb')


if __name__ == '__main__':
  main()
