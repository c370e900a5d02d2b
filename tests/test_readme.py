"""Commands and code of the README and the documentation do what the text says."""
import importlib.util
import json
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from tests.command_helpers import run, save_model
from tests.test_commands_plot import write_run
from tests.test_plots import read
from tests.test_pretrain import ENVIRONMENT, ROOT, TINY, losses

README = (ROOT / 'README.md').read_text()
BLOCKS = re.findall(r'^```(\w*)\n(.*?)^```', README, re.MULTILINE | re.DOTALL)
PARTS = re.findall(r'^```(python)\n(.*?)^```', (ROOT / 'docs' / 'api.md').read_text(), re.MULTILINE | re.DOTALL)
LINES = [line.split(' # ')[0].strip() for kind, text in BLOCKS if not kind
         for line in text.replace('\\\n', ' ').splitlines() if line.strip()]
# Commands that take the network, a web page, several runs or a cluster have their own tests; so do the launchers.
HERE = ('prepare', 'embed', 'classify', 'info', 'convert')


@pytest.fixture(scope='module')
def here(tmp_path_factory):
  """A folder as the README's reader has it: recordings, the README's own list of them, and a model as runs/clips."""
  root = tmp_path_factory.mktemp('readme')
  for name in ('rain/0001.flac', 'dogs/17.mp3'):
    path = root / 'wavs' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(48000), 16000)
  text = next(text for _, text in BLOCKS if text.startswith('file_name,caption'))
  (root / 'clips.csv').write_text(text)
  save_model(root / 'runs' / 'clips')
  save_model(root / 'm2d_clap_vit_base-80x608p16x16-240128')  # a local folder takes precedence over the network
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(root)
    command, = [line for line in LINES if line.startswith('m2d-clap prepare')]
    assert run(*shlex.split(command)[1:], '--text_encoder=minilm') == 0
  return root


@pytest.mark.parametrize('line', [line for line in LINES if line.startswith(tuple(f'm2d-clap {name} ' for name in HERE[1:]))])
def test_a_command_of_the_readme_works_unchanged(here, line, monkeypatch):
  monkeypatch.chdir(here)
  assert run(*shlex.split(line)[1:]) == 0


def test_curves_of_the_readme_are_drawn(here, monkeypatch):
  for i, name in enumerate(('a', 'b')):
    write_run(here / 'runs' / name, 1.0 + i)
  monkeypatch.chdir(here)
  line, = [line for line in LINES if line.startswith('m2d-clap plot')]
  assert run(*shlex.split(line)[1:]) == 0
  read(here / 'runs' / 'a' / 'a+b_curves.png')


def start(line, here, *more):
  """Runs a line of the README that starts main.py, with `more` options, in the reader's folder."""
  words = shlex.split(line.replace('main.py', str(ROOT / 'main.py')).replace('configs/', f'{ROOT}/configs/'))
  subprocess.run([sys.executable, *words[1:], *more], cwd=here, env=ENVIRONMENT | {'PYTHONPATH': str(ROOT)}, check=True)


@pytest.fixture(scope='module')
def sounds(here):
  """20 clips of two classes in three folds as the README's esc50/16k -> their folder."""
  folder = here / 'esc50' / '16k'
  folder.mkdir(parents=True)
  rows = ['file_name,label,fold']
  for i in range(20):
    wave = 0.1 * np.random.default_rng(i).standard_normal(16000) * (1 + i % 2 * np.sin(np.arange(16000) / 20))
    soundfile.write(folder / f'{i}.wav', wave, 16000)
    rows.append(f'{i}.wav,{("rain", "engine")[i % 2]},{i // 2 % 3 + 1}')
  (folder / 'esc50.csv').write_text('\n'.join(rows) + '\n')
  return folder


def test_evaluations_of_the_readme_run_and_are_reported(here, sounds, monkeypatch, capsys):
  lines = [line for line in LINES if '--config=configs/linear.py' in line or '--config=configs/zeroshot.py' in line]
  assert len(lines) == 2
  for line in lines:
    start(line, here)
  reported, = [line for line in LINES if line.startswith('m2d-clap report')]
  monkeypatch.chdir(here)
  assert run(*shlex.split(reported)[1:]) == 0
  assert capsys.readouterr().out.count('| esc50 |') == 2


# What makes the README's trainings small enough for a test; all other settings are unchanged.
SMALL = [f'--config.{key}={value}' for key, value in {
    'steps': 1, **{f'model.{key}': value for key, value in TINY.items()}, 'model.text_width': 384}.items()]


def test_pretraining_of_the_readme_runs(here, tmp_path):
  line, = [line for line in LINES if line.startswith('python main.py --config=configs/pretrain.py --workdir')]
  start(line, here, *SMALL, '--config.batch_size=1', f'--workdir={tmp_path}')
  assert 'loss_clap' in losses(tmp_path)[1]


def test_a_run_with_evaluations_of_ones_own_gives_their_scores(here, sounds, monkeypatch):
  (here / 'mine.py').write_text(next(text for _, text in BLOCKS if 'def get_config' in text))
  (here / 'sounds.csv').write_text('file_name,label,split\n' + ''.join(
      f'{i}.wav,{("rain", "engine")[i % 2]},{("train", "test")[i // 2 % 2]}\n' for i in range(20)))
  monkeypatch.chdir(here)
  assert run('prepare', '--manifest=sounds.csv', f'--audio_root={sounds}', '--out=data/another_prepared_folder',
             '--text_encoder=minilm') == 0
  line, = [line for line in LINES if '--config=mine.py' in line]
  start(line, here, *SMALL, '--config.batch_size=4', '--config.data.folder=data/another_prepared_folder')
  assert {'sounds/mAP', 'probe/accuracy'} <= set(losses(here / 'runs' / 'mine')[1])


def test_finetuning_of_the_readme_runs(here, sounds, tmp_path):
  line, = [line for line in LINES if '--config=configs/finetune.py' in line]
  start(line, here, '--config.epochs=1', '--config.batch_size=8', '--config.runs=1', f'--workdir={tmp_path}')
  assert len(json.loads((tmp_path / 'results.json').read_text())['trials']) == 3


@pytest.mark.parametrize('text', [text for kind, text in BLOCKS + PARTS if kind == 'python' and 'import' in text],
                         ids=lambda text: text.splitlines()[0])
def test_python_of_the_readme_and_the_api_page_runs_unchanged(here, text, monkeypatch):
  monkeypatch.chdir(here)
  scope = {'waves': np.zeros((2, 44100), np.float32)}
  exec(compile(text, 'README.md', 'exec'), scope)
  if 'get_config' in scope:
    assert set(scope['get_config']().evals) == {'sounds', 'probe'}


@pytest.mark.parametrize('line', [line for line in LINES if '--config=configs/' in line])
def test_settings_of_the_readme_exist(line):
  words = [word.removeprefix('--').partition('=') for word in shlex.split(line) if word.startswith('--config')]
  path, _, variant = words[0][2].partition(':')
  spec = importlib.util.spec_from_file_location('chosen', ROOT / path)
  chosen = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(chosen)
  config = chosen.get_config(variant) if variant else chosen.get_config()
  for key, _, _ in words[1:]:
    assert key.removeprefix('config.') in {name for name, _ in flattened(config.to_dict())}, key


def flattened(tree, before=''):
  for key, value in tree.items():
    yield before + key, value
    if isinstance(value, dict):
      yield from flattened(value, f'{before}{key}.')


def test_audiosets_tables_become_a_manifest_as_the_documentation_says(tmp_path):
  text = (ROOT / 'docs' / 'corpora.md').read_text()
  (tmp_path / 'class_labels_indices.csv').write_text(
      'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/02zsn,"Female speech, woman speaking"\n')
  (tmp_path / 'unbalanced_train_segments.csv').write_text(
      '# made by hand\n# YTID, start_seconds, end_seconds, positive_labels\n'
      '---1_cCGK4M, 0.000, 10.000, "/m/09x0r,/m/02zsn"\nabcdefghijk, 0.000, 10.000, "/m/09x0r"\n')
  (tmp_path / 'balanced_train_segments.csv').write_text('# none\n-0RWZT-miFs, 420.000, 430.000, "/m/09x0r"\n')
  (tmp_path / 'captions.csv').write_text('id,caption\n---1_cCGK4M,A woman talks\n---1_cCGK4M,"A woman, talking"\n')
  audio = pathlib.Path(tmp_path / 'audioset' / 'train')
  audio.mkdir(parents=True)
  for name in ('---1_cCGK4M.flac', 'Y-0RWZT-miFs.flac'):  # of the third the video is gone
    (audio / name).touch()
  subprocess.run([sys.executable, '-c', re.search(r'```python\n(.*?)```', text, re.DOTALL)[1]], cwd=tmp_path,
                 env=ENVIRONMENT, check=True)
  assert [json.loads(line) for line in (tmp_path / 'audioset.jsonl').read_text().splitlines()] == [
      {'file_name': '---1_cCGK4M.flac', 'captions': ['A woman talks', 'A woman, talking'],
       'labels': ['Speech', 'Female speech, woman speaking'], 'split': 'train'},
      {'file_name': 'Y-0RWZT-miFs.flac', 'captions': [], 'labels': ['Speech'], 'split': 'train'}]
