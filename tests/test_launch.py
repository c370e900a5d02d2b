"""The scripts of launch/ and what setup.cfg and README.md say."""
import configparser
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess

import pytest
import yaml
from packaging.requirements import Requirement
from setuptools import find_packages

from m2d_clap_jax.train.faults import EXIT_PREEMPTED, EXIT_STALLED

ROOT = pathlib.Path(__file__).parent.parent
FILES = ['launch', 'requirements.txt', 'requirements-demo.txt', 'setup.cfg', 'pyproject.toml']

# Stands for every Python: makes an "environment" with itself inside, and writes down what it is asked to run.
FAKE_PYTHON = '''#!/usr/bin/env bash
case "$*" in
  -V) echo 'Python 3.11.0' ;;
  -c*) ;;
  '-m venv'*) mkdir -p .venv/bin && cp "$0" .venv/bin/python && cp "$0" .venv/bin/shellcheck ;;
  '-m mkdocs'*) mkdir -p .venv/cache/site/api && echo encode_audio > .venv/cache/site/api/index.html ;;&
  *) echo "$PWD $* [$JAX_COMPILATION_CACHE_DIR]" >> "$LOG"
     if [[ "$*" == *"$FAIL"* ]]; then exit 1; fi ;;
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
  assert any('.[train,test]' in c for c in commands) and commands[-1].startswith('-m pytest -q -k words')
  assert len(launch('test.sh', '-x')[1]) == len(launch('local.sh')[1]) == 1


def test_all_checks_run_though_one_fails_and_the_code_says_so(launch):
  launch('test.sh', '-x')  # installs
  code, commands = launch('test.sh')
  checks = {re.search('ruff|launch/gke.sh|mypy|mkdocs|pytest', command)[0] for command in commands}
  assert code == 0 and checks == {'ruff', 'launch/gke.sh', 'mypy', 'mkdocs', 'pytest'} and len(commands) == 5
  for check in checks:
    code, others = launch('test.sh', fail=check)
    assert code == 1 and sorted(others) == sorted(commands), check


def test_changed_requirements_and_broken_off_installations_are_installed_again(launch):
  launch('test.sh', '-x')
  with open(launch.repository / 'requirements.txt', 'a') as file:
    file.write('one-more==1.0\n')
  code, commands = launch('test.sh', '-x', fail='-demo.txt')
  assert code != 0 and 'pytest' not in commands[-1]
  code, commands = launch('test.sh', '-x')
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
  names.add('m2d_clap_jax.configs')  # a link to configs/, which rglob does not follow
  assert names == set(find_packages(str(ROOT), include=['m2d_clap_jax*']))


def test_the_readme_names_every_variant_and_every_file_it_links():
  readme = (ROOT / 'README.md').read_text()
  spec = importlib.util.spec_from_file_location('pretrain_config', ROOT / 'configs' / 'pretrain.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  cells = re.findall(r'^\| (`:[^|]+)\|', readme, re.MULTILINE)
  table = [name for cell in cells for name in re.findall(r'`:([\w.]+)`', cell)]
  assert sorted(table) == sorted(module.VARIANTS)
  for link in re.findall(r'\]\(([^)#:]+)\)', readme):
    assert (ROOT / link).exists(), link


def test_a_preempted_or_stalled_job_is_started_again_and_a_failed_one_is_not(launch, tmp_path):
  launch('gpu.sh')  # installs
  python = launch.repository / '.venv' / 'bin' / 'python'
  counter = tmp_path / 'count'
  for codes, expected in (('75 76 134 0', 0), ('75 2', 2)):
    counter.write_text('0')
    python.write_text(f"""#!/usr/bin/env bash
if [ "$1" != main.py ]; then exec {tmp_path}/python3 "$@"; fi
codes=({codes}); n=$(cat {counter}); echo $((n + 1)) > {counter}; exit "${{codes[$n]}}"
""")
    code, _ = launch('gpu.sh', '--config=x')
    assert code == expected and int(counter.read_text()) == len(codes.split())


@pytest.mark.parametrize('script, options, words', [
    ('local.sh', ['--config.steps=3'], 'main.py --config=configs/pretrain.py:demo --workdir=runs/demo --config.steps=3'),
    ('gpu.sh', ['--config=a b'], 'main.py --config=a b'),
    ('tpu_vm.sh', ['--config=a b'], 'main.py --config=a b --distributed'),
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


# Cloud TPU as far as the script knows it: a request has a state, and the first TPU is taken away during the job.
FAKE_GCLOUD = '''#!/usr/bin/env bash
echo "gcloud $*" >> "$LOG"
case "$*" in
  *'queued-resources describe'*) cat "$TPU" 2>/dev/null ;;
  *'queued-resources create'*) echo WAITING_FOR_RESOURCES > "$TPU" ;;
  *'queued-resources delete'*) rm "$TPU" ;;
  *' ssh '*) if [ "$(grep -c ' ssh ' "$LOG")" -lt "$SUCCEEDS" ]; then echo "$THEN" > "$TPU"; exit 255; fi ;;
esac
'''


@pytest.fixture
def tpu(tmp_path):
  """Runs launch/tpu.sh with a stand-in of gcloud: the job succeeds at the n-th try, and leaves the TPU in state `then`
  before -> (exit code, errors, gcloud's commands)."""
  repository = tmp_path / 'a checkout'
  shutil.copytree(ROOT / 'launch', repository / 'launch')
  subprocess.run('git init -q && git add . && git -c user.name=a -c user.email=a@b commit -qm a', shell=True, check=True,
                 cwd=repository)
  tools, log = tmp_path / 'tools', tmp_path / 'log'
  tools.mkdir()
  (tools / 'gcloud').write_text(FAKE_GCLOUD)
  (tools / 'sleep').write_text('#!/usr/bin/env bash\necho ACTIVE > "$TPU"\n')  # waiting is what makes it ready
  for tool in tools.iterdir():
    tool.chmod(0o755)

  def run(*options, succeeds=1, then='SUSPENDED'):
    log.write_text('')
    environment = {'PATH': f'{tools}{os.pathsep}{os.environ["PATH"]}', 'LOG': str(log), 'TPU': str(tmp_path / 'tpu'),
                   'SUCCEEDS': str(succeeds), 'THEN': then}
    result = subprocess.run(['bash', str(repository / 'launch' / 'tpu.sh'), *options], env=environment, text=True,
                            capture_output=True)
    return result.returncode, result.stderr, [line for line in log.read_text().splitlines() if 'describe' not in line]
  return run


JOB = ['run1', 'us-west4-a', 'v5litepod-16', '--config=configs/pretrain.py', '--config.model.input_size=(80, 608)']


def test_a_tpu_is_made_used_and_deleted(tpu):
  code, errors, commands = tpu('--spot', *JOB)
  assert code == 0, errors
  create, copy, job, delete = commands
  assert '--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot' in create
  assert copy.endswith('run1:m2d_clap.tar.gz --zone=us-west4-a --worker=all')
  inside = job.split('--command=')[1]
  assert '--worker=all' in job and 'launch/tpu_vm.sh --config=configs/pretrain.py ' in inside
  # What the far shell makes of it: the option is one word again.
  words = subprocess.run(['bash', '-c', f'set -- {inside.split("tpu_vm.sh")[1]}; printf "%s\n" "$@"'],
                         capture_output=True, text=True, check=True).stdout.splitlines()
  assert words == JOB[3:] and 'delete run1' in delete


def test_a_tpu_that_is_taken_away_is_asked_for_again(tpu):
  code, errors, commands = tpu(*JOB, succeeds=3)
  assert code == 0 and errors.count('was preempted; requesting another') == 2
  assert [sum(verb in command for command in commands) for verb in (' create ', ' ssh ', ' delete ')] == [3, 3, 3]


def test_a_tpu_with_a_failed_job_is_kept_and_told_of(tpu):
  code, errors, commands = tpu(*JOB, succeeds=3, then='ACTIVE')
  assert code == 255 and 'is kept, and billed' in errors and not any(' delete ' in command for command in commands)


@pytest.mark.parametrize('script, options, word', [
    ('tpu.sh', ['run1', 'zone', 'v5litepod-8'], 'give a name, a zone and a type'),
    ('tpu.sh', ['run1', 'zone', 'h100', '--config=x'], 'unknown type; known: v5litepod-N'),
    ('gke.sh', ['run1', 'image', 'tpu-v5p-slice', '3x3', '--config=x'], 'multiple of 4 chips'),
    ('gke.sh', ['run1', 'image', 'tpu-v5p-slice', '--config=x'], 'give a name, an image')])
def test_launchers_say_what_they_need(script, options, word):
  result = subprocess.run(['bash', str(ROOT / 'launch' / script), '--dry-run', *options], capture_output=True, text=True)
  assert result.returncode == 2 and word in result.stderr


@pytest.mark.parametrize('topology, hosts', [('2x2', 1), ('16x16', 64), ('4x4x4', 16)])
def test_the_jobset_has_a_pod_for_each_machine_and_restarts_what_was_preempted(topology, hosts):
  options = ['--config=configs/pretrain.py', '--config.model.input_size=(80, 608)', r'--config.init="a\b"']
  printed = subprocess.run(['bash', str(ROOT / 'launch' / 'gke.sh'), '--dry-run', 'run1', 'reg/image', 'tpu-v5p-slice',
                            topology, *options], capture_output=True, text=True, check=True).stdout
  jobset = yaml.safe_load(printed)
  assert jobset['kind'] == 'JobSet' and jobset['apiVersion'] == 'jobset.x-k8s.io/v1alpha2'
  job = jobset['spec']['replicatedJobs'][0]['template']['spec']
  assert job['completions'] == job['parallelism'] == hosts and job['backoffLimit'] == 0
  codes = [rule['onExitCodes']['values'] for rule in job['podFailurePolicy']['rules'] if 'onExitCodes' in rule]
  assert codes == [[EXIT_PREEMPTED, EXIT_STALLED, 134]]  # 134: JAX aborts a process whose peer is gone
  pod = job['template']['spec']
  assert pod['nodeSelector']['cloud.google.com/gke-tpu-topology'] == topology
  assert pod['containers'][0]['args'] == ['--distributed', *options]
  assert pod['containers'][0]['resources']['limits'] == {'google.com/tpu': 4}
