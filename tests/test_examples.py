"""The examples run as scripts, say what the model says, and open as notebooks."""
import re
import shutil
import subprocess
import sys

import nbformat
import numpy as np
import pytest

import m2d_clap_jax
from benchmarks import notebooks
from m2d_clap_jax.demo import corpus
from tests.command_helpers import save_model
from tests.test_pretrain import ENVIRONMENT, ROOT

EXAMPLES = sorted((ROOT / 'examples').glob('*.py'))


@pytest.fixture(scope='module')
def here(tmp_path_factory):
  """A folder with a model as runs/demo; `here.sounds` are clips of the demo's test part."""
  root = tmp_path_factory.mktemp('examples')
  audio = corpus.render(root / 'data' / 'demo' / 'audio', train_clips=1, test_clips=1,
                        instruments=['flute', 'violin', 'trumpet', 'church organ'])

  class Here:
    folder = save_model(root / 'runs' / 'demo')
    sounds = [audio / 'test' / f'{name}-000.wav' for name in ('flute', 'violin', 'trumpet')]
  Here.root = root
  return Here


def script(name, here, *arguments):
  """Runs examples/NAME in the folder -> what it prints."""
  done = subprocess.run([sys.executable, ROOT / 'examples' / name, *map(str, arguments)], cwd=here.root, text=True,
                        env=ENVIRONMENT | {'PYTHONPATH': str(ROOT), 'USE_TORCH': '0'}, capture_output=True)
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_zero_shot_prints_the_models_scores(here):
  first, *_, last = script('zero_shot.py', here, here.folder, *here.sounds).splitlines()
  model = m2d_clap_jax.load(here.folder)
  row = model.classify(here.sounds[0], labels=['flute', 'trumpet', 'piano', 'violin'],
                       template=['{} can be heard', 'the sound of {}'])[0]
  assert [float(x) for x in re.findall(r' (-?\d\.\d{3})', first)] == pytest.approx(sorted(row)[::-1], abs=2e-3)
  best = np.argmax(model.classify(here.sounds, labels=['a flute plays softly'], template='{}')[:, 0])
  assert last.startswith(f'a flute plays softly: {here.sounds[best]} ')


def test_the_linear_probe_tells_different_sounds_apart(here):
  for k, name in enumerate(here.sounds[:2]):
    (here.root / 'sounds' / f'class{k}').mkdir(parents=True)
    for i in range(4):
      shutil.copy(name, here.root / 'sounds' / f'class{k}' / f'{i}{name.suffix}')
  (here.root / 'sounds' / 'class0' / '.DS_Store').write_text('no sound')
  (here.root / 'sounds' / 'class1' / 'notes.txt').write_text('nor this')
  assert script('linear_probe.py', here, here.folder, here.root / 'sounds') == '100.0% of 2 test sounds, 2 classes\n'
  assert (here.root / 'embeddings.png').stat().st_size > 1000


def test_inside_draws_mask_attention_and_frames(here):
  said = script('inside.py', here, here.folder, here.sounds[0])
  captions = ['a flute plays a melody', 'a trumpet plays a long note', 'someone plays a chord on a piano']
  scores = m2d_clap_jax.load(here.folder).classify(here.sounds[0], labels=captions, template='{}')[0]
  assert said.strip().endswith(f'nearest caption: {captions[np.argmax(scores)]}')
  patches, masked = map(int, re.match(r'(\d+) patches, (\d+) masked', said).groups())
  assert masked == patches - int(patches * (1 - 0.7))
  assert all((here.root / name).stat().st_size > 1000 for name in ('mask.png', 'attention.png', 'frames.png'))


@pytest.mark.parametrize('path', EXAMPLES, ids=lambda path: path.name)
def test_an_example_says_how_it_is_used(path):
  done = subprocess.run([sys.executable, path], cwd=ROOT, env=ENVIRONMENT | {'PYTHONPATH': str(ROOT)},
                        capture_output=True, text=True)
  assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith('usage: ')


@pytest.mark.parametrize('path', EXAMPLES, ids=lambda path: path.name)
def test_notebook_and_page_of_an_example_are_made_from_its_script(path):
  """`python -m benchmarks.notebooks` makes both again."""
  place = notebooks.PAGES / f'{path.stem}.ipynb'
  made = nbformat.read(place, as_version=4)
  nbformat.validate(made)
  assert [(cell.cell_type, cell.source) for cell in made.cells] == [
      (cell.cell_type, cell.source) for cell in notebooks.source(path).cells]
  outputs = [output for cell in made.cells for output in cell.get('outputs', [])]
  assert outputs and all(output.output_type != 'error' and output.get('name') != 'stderr' for output in outputs)
  text, figures = notebooks.page(made, path.stem)
  assert (notebooks.PAGES / f'{path.stem}.md').read_text() == text
  assert figures == {name: (notebooks.PAGES / name).read_bytes() for name in figures}
  assert not re.search(r'(^|[\s"\'(=])/\w+/', re.sub(r'"image/png": ".*?"', '', place.read_text())), 'a path of one machine'
  assert place.stat().st_size < 300_000
