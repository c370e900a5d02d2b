"""The scripts of launch/ and what setup.cfg and README.md say."""
import configparser
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess

import pytest
from packaging.requirements import Requirement
from setuptools import find_packages

ROOT = pathlib.Path(__file__).parent.parent
FILES = ['launch', 'requirements.txt', 'requirements-demo.txt', 'setup.cfg', 'pyproject.toml']

# Stands for every Python: makes an "environment" with itself inside, and writes down what it is asked to run.
FAKE_PYTHON = '''#!/usr/bin/env bash
case "$*" in
  -V) echo 'Python 3.11.0' ;;
  -c*) ;;
  '-m venv'*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  *) echo "$PWD $* [$JAX_COMPILATION_CACHE_DIR]" >> "$LOG"
     if [[ "$*" == *pip*"$FAIL"* ]]; then exit 1; fi ;;
esac
'''


@pytest.fixture
def launch(tmp_path):
  """Runs a script in a copy of the repository, from elsewhere -> (exit code, the commands that Python was given)."""
  repository, elsewhere = tmp_path / 'a checkout', tmp_path / 'elsewhere'
  repository.mkdir()
  elsewhere.mkdir()
  for name in FILES:
    (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, repository / name)
  fake, log = tmp_path / 'python3', tmp_path / 'log'
  fake.write_text(FAKE_PYTHON)
  fake.chmod(0o755)

  def run(script, *options, fail='nothing'):
    log.write_text('')
    environment = {'PATH': f'{tmp_path}{os.pathsep}{os.environ["PATH"]}', 'LOG': str(log), 'FAIL': fail}
    result = subprocess.run(['bash', str(repository / 'launch' / script), *options], cwd=elsewhere, env=environment,
                            stdin=subprocess.DEVNULL, capture_output=True, text=True)
    commands = log.read_text().splitlines()
    assert all(command.startswith(f'{repository} ') for command in commands)
    return result.returncode, [command.removeprefix(f'{repository} ') for command in commands]
  run.repository = repository
  return run


def test_the_demo_is_installed_once_and_run_with_the_options_given(launch):
  code, first = launch('local.sh', '--config.steps=3')
  assert code == 0 and len([c for c in first if ' install ' in c]) == 3
  assert any('--no-deps -r requirements-demo.txt' in c for c in first)
  code, second = launch('local.sh', '--config.steps=3')
  cache = f'[{launch.repository}/.venv/cache/jax]'
  assert code == 0
  assert second == [f'main.py --config=configs/pretrain.py:demo --workdir=runs/demo --config.steps=3 {cache}']
  assert first[-1:] == second


def test_the_tests_environment_serves_the_demo_but_not_the_other_way_round(launch):
  launch('local.sh')
  _, commands = launch('test.sh', '-k', 'words')
  assert any('.[test]' in c for c in commands) and commands[-1].startswith('-m pytest -q -k words')
  assert len(launch('test.sh')[1]) == len(launch('local.sh')[1]) == 1


def test_changed_requirements_and_broken_off_installations_are_installed_again(launch):
  launch('test.sh')
  with open(launch.repository / 'requirements.txt', 'a') as file:
    file.write('one-more==1.0\n')
  code, commands = launch('test.sh', fail='-demo.txt')
  assert code != 0 and 'pytest' not in commands[-1]
  code, commands = launch('test.sh')
  assert code == 0 and len(commands) == 4


def test_pinned_versions_lie_in_the_ranges_of_setup_cfg():
  parser = configparser.ConfigParser()
  parser.read(ROOT / 'setup.cfg')
  lines = (ROOT / 'requirements.txt').read_text().splitlines()
  pins = {r.name: r for r in map(Requirement, (line for line in lines if line and not line.startswith('#')))}
  for line in filter(None, parser['options']['install_requires'].split('\n')):
    wanted = Requirement(line)
    pin = pins[wanted.name]
    assert str(pin.marker) == str(wanted.marker)
    assert wanted.specifier.contains(next(iter(pin.specifier)).version), f'{pin} is outside {wanted}'


def test_every_folder_with_code_is_a_package_that_setup_cfg_finds():
  folders = {path.parent for path in (ROOT / 'm2d_clap_jax').rglob('*.py')}
  names = {'.'.join(folder.relative_to(ROOT).parts) for folder in folders}
  assert names == set(find_packages(str(ROOT), include=['m2d_clap_jax*']))


def test_the_readme_names_every_variant_and_every_file_it_links():
  readme = (ROOT / 'README.md').read_text()
  spec = importlib.util.spec_from_file_location('pretrain_config', ROOT / 'configs' / 'pretrain.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  table = re.findall(r'^\| `:([\w.]+)`', readme, re.MULTILINE)
  assert sorted(table) == sorted(module.VARIANTS)
  for link in re.findall(r'\]\(([^)#:]+)\)', readme):
    assert (ROOT / link).exists(), link


def test_a_preempted_or_stalled_job_is_started_again_and_a_failed_one_is_not(launch, tmp_path):
  launch('gpu.sh')  # installs
  python = launch.repository / '.venv' / 'bin' / 'python'
  counter = tmp_path / 'count'
  for codes, expected in (('75 76 0', 0), ('75 2', 2)):
    counter.write_text('0')
    python.write_text(f"""#!/usr/bin/env bash
if [ "$1" != main.py ]; then exec {tmp_path}/python3 "$@"; fi
codes=({codes}); n=$(cat {counter}); echo $((n + 1)) > {counter}; exit "${{codes[$n]}}"
""")
    code, _ = launch('gpu.sh', '--config=x')
    assert code == expected and int(counter.read_text()) == len(codes.split())


@pytest.mark.parametrize('script, options, words', [
    ('gpu.sh', ['--config=a b'], 'main.py --config=a b'),
    ('slurm.sh', ['2', '8', '--config=a b', '--workdir=/w'],
     r'main.py --distributed --config=a\ b --workdir=/w'),
])
def test_a_dry_run_prints_and_does_nothing(script, options, words, launch):
  result = subprocess.run(['bash', str(launch.repository / 'launch' / script), '--dry-run', *options],
                          capture_output=True, text=True, check=True)
  assert words in result.stdout and not (launch.repository / '.venv').exists()
  if script == 'slurm.sh':
    assert '#SBATCH --nodes=2' in result.stdout and '#SBATCH --ntasks-per-node=8' in result.stdout
    subprocess.run(['bash', '-n'], input=result.stdout, text=True, check=True)


def test_slurm_wants_the_numbers_of_nodes_and_gpus(launch):
  code, commands = launch('slurm.sh', '--config=x')
  assert code == 2 and not commands
