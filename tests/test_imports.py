"""Who may import what: the core runs where only jax, flax, optax and numpy are installed."""
import ast
import configparser
import graphlib
import pathlib
import re
import subprocess
import sys

import pytest

from m2d_clap_jax import errors

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / 'm2d_clap_jax'
CORE = ['losses.py', 'train/step.py', 'train/clap_step.py', 'train/augment.py', 'train/optim.py',
        'processor.py', 'sharding.py', *sorted(path.relative_to(PACKAGE).as_posix() for path in (PACKAGE / 'models').glob('*.py'))]
ABSENT = ['tensorflow', 'tensorflow_datasets', 'transformers', 'torch', 'orbax', 'orbax.checkpoint', 'librosa',
          'soundfile', 'soxr', 'clu', 'ml_collections', 'sklearn', 'matplotlib']

# Heavy module -> the only files of the package that may import it, and whether, or which of them, may do so at their top.
ROOMS = {
    'tensorflow': (r'data/schema\.py', False),
    'tensorflow_datasets': (r'data/\w+\.py|tasks/fetch\.py', False),
    'clu': (r'train/events\.py', False),  # pulls TensorFlow
    'tinysoundfont': (r'demo/corpus\.py', False),
    'wandb': (r'train/wandb_writer\.py', True),
    'transformers': (r'text/\w+\.py', False),
    'huggingface_hub': (r'text/\w+\.py|weights/hub\.py|huggingface\.py', False),
    'apache_beam': (r'data/beam\.py', True),
    'pooch': (r'weights/(released|download)\.py', False),
    'requests': (r'weights/download\.py', False),
    'torch': (r'weights/(public|files)\.py|xares\.py', r'xares\.py'),
    'mteb': (r'maeb\.py', True),
    'datasets': (r'maeb\.py', True),
    'gradio': (r'demo/page\.py', False),
    'starlette': (r'demo/service\.py', False),
    'orbax': (r'train/checkpoint\.py', True),
    'av': (r'audio/readers\.py', True),
    'soundfile': (r'audio/(decode|readers)\.py', True),
    'soxr': (r'audio/decode\.py', True),
    'sklearn': (r'eval/(logistic_probe|class_plots|metrics)\.py', False),
    'matplotlib': (r'eval/plots\.py', True),
    'pyarrow': (r'(cli/embedding_files|data/vectors)\.py', False),
    'ml_collections': (r'train/main\.py', True),  # below the drivers nobody knows what a config is: the command and configs/ only
}
# The floors of the house, from the ground up: a module imports from its own floor and those below, never from above.
FLOORS = (
    r'errors',
    r'options|paths|progress|locks|workdir|fields|startup|processor|huggingface',
    r'audio(\..*)?|models(\..*)?|losses|sharding|tables(\..*)?|train\.(checkpoint|sums)',
    r'text(\..*)?|weights(\..*)?',
    r'api',
    r'data(\..*)?|tasks(\..*)?|hear|maeb|xares|stablehlo',
    r'eval(\..*)?|demo(\..*)?',
    r'train(\..*)?|planning(\..*)?',
    r'cli(\..*)?',
)
# Distribution -> what is imported of it, where the names differ.
MODULES = {'absl-py': 'absl', 'scikit-learn': 'sklearn', 'tensorflow-cpu': 'tensorflow', 'orbax-checkpoint': 'orbax',
           'protobuf': 'google'}
NOT_IMPORTED = {'importlib_resources', 'tensorboard'}  # of others, which do not declare them
DEMO = {'tinysoundfont'}  # requirements-demo.txt


def imports(path):
  """[(module, whether at the top of the file, line)] of a source file."""
  tree = ast.parse(path.read_text())
  at_top = {id(node) for node in tree.body}
  found = []
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{path}:{node.lineno}: imports are absolute here'
      names = [node.module]
    else:
      continue
    found += [(name, id(node) in at_top, node.lineno) for name in names]
  return found


def test_one_real_update_without_tensorflow_transformers_torch_and_orbax():
  code = f'''
import sys
for name in {ABSENT}:
  sys.modules[name] = None
import functools
import jax
import numpy as np
import m2d_clap_jax.losses
from m2d_clap_jax.models import M2DCLAP
from m2d_clap_jax import sharding
from m2d_clap_jax.train.optim import make_optimizer
from m2d_clap_jax.train.optim import linear_ramp, warmup_cosine
from m2d_clap_jax.train.step import create_state
from m2d_clap_jax.train.step import pretrain_step
model = M2DCLAP(input_size=(80, 32), width=32, depth=1, heads=2, predictor_width=16, predictor_depth=1,
                predictor_heads=2, text_width=8)
tx = make_optimizer(warmup_cosine(1e-3, 0, 10))
mesh = sharding.make_mesh()
state = jax.jit(functools.partial(create_state, 0, model=model, tx=tx), out_shardings=sharding.replicated(mesh))()
before = jax.device_get(state.params)
batch = sharding.to_devices(mesh, {{'logmel': np.ones((8, 80, 32), np.float16), 'text': np.ones((8, 8), np.float16)}})
update = jax.jit(functools.partial(pretrain_step, model=model, tx=tx, ema_schedule=linear_ramp(0.9, 0.99, 10)))
state, metrics = update(state, batch)
moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, jax.device_get(state.params))
print(int(state.step), np.isfinite(float(metrics['loss'])), max(jax.tree.leaves(moved)) > 0)
'''
  result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  assert result.stdout.split() == ['1', 'True', 'True'], result.stderr


@pytest.mark.parametrize('name', CORE)
def test_the_core_imports_jax_flax_optax_and_numpy_alone(name):
  for module, _, line in imports(PACKAGE / name):
    root = module.partition('.')[0]
    assert root in {'jax', 'flax', 'optax', 'numpy'} | sys.stdlib_module_names or root == 'm2d_clap_jax', (
        f'{name}:{line} imports {module}')
    if root == 'm2d_clap_jax':
      own = module.removeprefix('m2d_clap_jax').strip('.').replace('.', '/')
      assert own in ('', 'errors', 'models') or f'{own}.py' in CORE, f'{name}:{line} imports {module}, above the core'


def name_of(path):
  """'m2d_clap_jax/eval/__init__.py' -> 'eval'."""
  parts = path.relative_to(PACKAGE).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def floor_of(name):
  return next(i for i, floor in enumerate(FLOORS) if re.fullmatch(floor, name))


def own_imports(path, names):
  """The modules of this package that a source file imports."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and (node.module + '.').startswith('m2d_clap_jax.'):
      base = node.module.removeprefix('m2d_clap_jax').strip('.')
      for alias in node.names:
        inner = f'{base}.{alias.name}'.strip('.')
        yield inner if inner in names else base


def test_imports_run_downwards_only_and_in_no_circle():
  names = {name_of(path): path for path in sorted(PACKAGE.rglob('*.py'))}
  del names['']  # the public face imports from api, on demand
  graph = {name: set(own_imports(path, names)) - {''} for name, path in names.items()}
  absent = [f'{name} imports {below}' for name, imported in graph.items() for below in imported - names.keys()]
  upward = [f'{name} imports {below}' for name, imported in graph.items() for below in imported
            if floor_of(below) > floor_of(name)]
  assert not absent and not upward
  graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_heavy_modules_are_imported_in_their_rooms_only():
  wrong = []
  for path in sorted(PACKAGE.rglob('*.py')):
    name = path.relative_to(PACKAGE).as_posix()
    for module, at_top, line in imports(path):
      room, top_allowed = ROOMS.get(module.partition('.')[0], ('.*', True))
      top_allowed = re.fullmatch(top_allowed, name) if isinstance(top_allowed, str) else top_allowed
      if not re.fullmatch(room, name) or at_top and not top_allowed:
        wrong.append(f'{name}:{line} imports {module}' + ' at its top' * at_top)
  assert not wrong


def declared(lines):
  """Lines of requirements -> what is imported of them."""
  names = {re.match(r'[\w.-]+', line)[0] for line in lines.split('\n') if line.strip()} - NOT_IMPORTED
  return {MODULES.get(name, name.replace('-', '_')) for name in names}


def test_setup_cfg_names_every_module_that_is_imported_and_no_other():
  parser = configparser.ConfigParser()
  parser.read(ROOT / 'setup.cfg')
  extras = {name: declared(lines) for name, lines in parser['options.extras_require'].items()}
  always = declared(parser['options']['install_requires'])
  sources = [*PACKAGE.rglob('*.py'), *(ROOT / 'configs').glob('*.py'), ROOT / 'main.py']
  used = {module.partition('.')[0] for path in sources for module, _, _ in imports(path)}
  used -= sys.stdlib_module_names | {'m2d_clap_jax', *DEMO}
  named = {module for module, extra in errors.EXTRAS.items() if module in extras[extra]}
  assert used - named == always and named - used <= {'gcsfs', 's3fs'}, 'those two serve fsspec'
  assert named == errors.EXTRAS.keys() - {'tensorboard'}
