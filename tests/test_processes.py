"""Several processes, as on a pod: the same run as one process, whichever of them dies, however many come back."""
import json
import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

from m2d_clap_jax.train import faults
from tests import launched, test_clap, test_finetune
from tests.test_clap import place  # noqa: F401
from tests.test_pretrain import ENVIRONMENT, TINY, flags, losses, tiny_config, wait_for  # noqa: F401

# Each process has one device, and computes its part of every batch. Between CPUs, collectives must come in the same
# order everywhere (see conftest.py): gloo would otherwise add up what does not belong together.
ENV = ENVIRONMENT | {
    'JAX_CPU_COLLECTIVES_IMPLEMENTATION': 'gloo', 'OMP_NUM_THREADS': '1',
    'XLA_FLAGS': f'{ENVIRONMENT["XLA_FLAGS"]} --xla_cpu_enable_concurrency_optimized_scheduler=false'}


def free_port():
  with socket.socket() as s:
    s.bind(('localhost', 0))
    return s.getsockname()[1]


def start(config, workdir, count, *more):
  """The run as `count` processes that find each other by hand (one: without that)."""
  address = f'--coordinator=localhost:{free_port()}'
  joined = [[address, f'--process={i}/{count}'] if count > 1 else [] for i in range(count)]
  file = pathlib.Path(f'{workdir}_config.py')
  file.write_text(f'import json\nfrom ml_collections import ConfigDict\n'
                  f'def get_config():\n  return ConfigDict(json.loads({config.to_json_best_effort()!r}))\n')
  return [launched.Main(f'--config={file}', f'--workdir={workdir}', *options, *more, env=ENV) for options in joined]


def run_together(code, *arguments):
  """Runs Python code in two processes of two devices each, joined by JAX -> the lines that each prints."""
  address = f'localhost:{free_port()}'
  env = ENV | {'XLA_FLAGS': ENV['XLA_FLAGS'] + ' --xla_force_host_platform_device_count=2'}
  # Gloo writes to the standard output too, from several threads at once: its lines go to the standard error.
  join = f'''
import os, sys
sys.stdout = os.fdopen(os.dup(1), 'w')
os.dup2(2, 1)
import jax
jax.distributed.initialize({address!r}, 2, int(sys.argv[1]))
'''
  processes = [subprocess.Popen([sys.executable, '-c', join + code, str(i), *map(str, arguments)], cwd=launched.ROOT, env=env,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for i in range(2)]
  try:
    printed = [process.communicate(timeout=300) for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [0, 0], printed
  return [out.splitlines() for out, _ in printed]


def finish(processes, expected=0):
  errors = [process.communicate(timeout=300)[1].decode() for process in processes]
  assert [process.returncode for process in processes] == [expected] * len(processes), errors
  return errors


def written(workdir, step):
  path = workdir / 'metrics.jsonl'
  return lambda: path.exists() and f'"step": {step},' in path.read_text()


def close(actual, expected):
  assert sorted(actual) == sorted(expected)
  for step, row in expected.items():
    for name, value in row.items():
      np.testing.assert_allclose(actual[step][name], value, rtol=1e-4, atol=1e-6, err_msg=f'{name}, step {step}')


@pytest.fixture(scope='module')
def config(data):
  config = tiny_config(data, steps=16, log_every=2, save_every=4, statistics_every=16, evals_every=16)
  config.evals = ConfigDict({'found': {'kind': 'retrieval', 'split': 'train'},
                             'probe': {'kind': 'logistic', 'train_split': 'train', 'split': 'train'}})
  return config


@pytest.fixture(scope='module')
def alone(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('alone')
  finish(start(config, workdir, 1))
  return losses(workdir)


def test_two_processes_give_the_losses_of_one_and_only_the_first_writes(config, alone, tmp_path):
  errors = finish(start(config, tmp_path, 2))
  scores = {'found/text_to_audio/R@1', 'probe/accuracy'}
  assert scores <= set(alone[0]) and 'features/effective_rank' not in alone[0]
  assert scores | {'features/effective_rank'} <= set(alone[16])
  close(losses(tmp_path), alone)
  assert sum('done: 16 steps' in error for error in errors) == 1
  assert (tmp_path / 'probe_confusion.png').exists()
  assert len(list(tmp_path.glob('events.out.tfevents.*'))) == 1


def newest(workdir):
  return max((int(path.name) for path in workdir.glob('checkpoints/*') if path.name.isdigit()), default=0)


def test_killed_again_and_again_as_many_fewer_or_more_processes_continue(config, alone, tmp_path):
  for count in 2, 2, 1:
    before, processes = newest(tmp_path), start(config, tmp_path, count)
    wait_for(processes[0], lambda before=before: newest(tmp_path) > before)
    for process in reversed(processes):
      process.kill()
      process.communicate()
  errors = finish(start(config, tmp_path, 4))
  close(losses(tmp_path), alone)
  assert sum('done: 16 steps' in error for error in errors) == 1


def test_sigterm_to_one_of_two_saves_and_ends_both(config, alone, tmp_path):
  processes = start(config, tmp_path, 2)
  wait_for(processes[0], written(tmp_path, 2))
  processes[1].send_signal(signal.SIGTERM)
  errors = finish(processes, faults.EXIT_PREEMPTED)
  assert all('which is saved; the same command continues' in error for error in errors)
  finish(start(config, tmp_path, 2))
  close(losses(tmp_path), alone)


@pytest.mark.parametrize('killed, kind', [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_when_one_of_two_is_gone_or_stopped_the_other_ends_within_the_timeout_and_says_so(killed, kind, config, tmp_path):
  bare = ConfigDict(config.to_dict() | {'evals': {}})
  processes = start(bare, tmp_path, 2, '--config.steps=100000', '--peer_timeout=5')
  wait_for(processes[0], written(tmp_path, 8))
  processes[killed].send_signal(kind)
  other = processes[1 - killed]
  try:
    error = other.communicate(timeout=60)[1].decode()
  finally:
    for process in processes:
      process.kill()
    processes[killed].communicate()
  if other.returncode == faults.EXIT_STALLED:  # a collective that both take part in noticed it first
    assert 'error: another of the 2 processes is gone' in error and 'Traceback' not in error
  else:
    assert other.returncode == -signal.SIGABRT and 'another task died' in error, error


def test_fine_tuning_in_two_processes_gives_the_scores_of_one_and_continues_after_sigterm(tmp_path):
  root = test_finetune.tones(tmp_path / 'tones', test_finetune.ROWS)
  config = test_finetune.tiny_config(root, epochs=4, **{'data.cache': str(tmp_path / 'cache')})
  finish(start(config, tmp_path / 'one', 1))
  processes = start(config, tmp_path / 'two', 2)
  wait_for(processes[0], written(tmp_path / 'two' / 'run0', 4))
  processes[1].send_signal(signal.SIGTERM)
  finish(processes, faults.EXIT_PREEMPTED)
  finish(start(config, tmp_path / 'two', 2))
  close(losses(tmp_path / 'two' / 'run0'), losses(tmp_path / 'one' / 'run0'))
  one, two = (json.loads((tmp_path / name / 'run0' / 'result.json').read_text()) for name in ('one', 'two'))
  assert one == two
  for name in ('one', 'two'):
    assert sorted(path.name for path in (tmp_path / name / 'run0').glob('best*')) == ['best']


def test_stage_2_divided_over_two_processes_gives_the_losses_and_scores_of_one(place, tmp_path):  # noqa: F811
  """Batch and state are divided. Dropout included: captions are padded to one length in both, 16 tokens."""
  changes = {'text.max_length': 16, 'model.frames': 96, 'evals_every': 4}
  config = test_clap.get_config(test_clap.options(place, **changes))
  config.evals = ConfigDict({'found': {'kind': 'retrieval', 'split': 'train'},
                             'sound': {'kind': 'zeroshot', 'split': 'train', 'template': '{} kind'}})
  for count, name in ((1, 'one'), (2, 'two')):
    config.mesh = ConfigDict({'fsdp': count})
    finish(start(config, tmp_path / name, count))
  one, two = (losses(tmp_path / name) for name in ('one', 'two'))
  assert {'loss_clap/a', 'found/text_to_audio/R@1', 'sound/accuracy'} <= set(one[4])
  close(two, one)


# A mesh that alternates between the processes: rows of a batch are not grouped by process.
ENCODE = '''
import ast, functools, json, numpy as np
from m2d_clap_jax import sharding
from m2d_clap_jax.data.read import Folder
from m2d_clap_jax.eval.encode import SplitEncoder
from m2d_clap_jax.models import M2DCLAP
from m2d_clap_jax.train.optim import make_optimizer
from m2d_clap_jax.train.step import create_state

model = M2DCLAP(**ast.literal_eval(sys.argv[3]))
a, b, c, d = jax.devices()
assert a.process_index == b.process_index != c.process_index
mesh = sharding.make_mesh([a, c, b, d])
create = functools.partial(create_state, 0, model=model, tx=make_optimizer(lambda step: 0.0))
params = jax.jit(create, out_shardings=sharding.replicated(mesh))().params
split = Folder(sys.argv[2]).split('train')
read, count = split.read, []
split.read = lambda numbers: (count.extend(numbers), read(numbers))[1]
features, audio, clips = SplitEncoder(model, mesh, lambda word: None)({'params': params}, split)
jax.config.update('jax_default_device', jax.local_devices()[0])
params = jax.device_get(params)
split = Folder(sys.argv[2]).split('train')
logmels = np.stack([clip.logmel[:, :32] for clip in split.clips(range(40))])
expected, _ = jax.jit(functools.partial(model.apply, method='clip_features'))({'params': params}, logmels)
print(json.dumps({'read': sorted(count), 'keys': [clip.key for clip in clips],
                  'all': [clip.key for clip in split.clips(range(40))],
                  'error': float(np.abs(features - expected).max())}))
'''


def test_evaluations_read_each_clip_once_in_all_processes_and_keep_their_order_for_any_order_of_devices(data):
  found = [json.loads(lines[-1]) for lines in run_together(ENCODE, data, TINY)]
  for each in found:
    assert each['keys'] == each['all'] and each['error'] < 1e-5
  assert sorted(found[0]['read'] + found[1]['read']) == list(range(40))
  assert len(found[0]['read']) == len(found[1]['read'])


RESTORE = '''
import pathlib
import jax.numpy as jnp
import orbax.checkpoint as ocp
from m2d_clap_jax import sharding
from m2d_clap_jax.train.checkpoint import Checkpoints, abstract, read_parameters
from m2d_clap_jax.train.step import TrainState

place = sharding.replicated(sharding.make_mesh())
def state(step):
  return jax.jit(lambda: TrainState(jnp.int32(step), {'a': jnp.full(8, float(step))}, {}, {}, jnp.zeros(2, jnp.uint32)),
                 out_shardings=place)()
saved = Checkpoints(sys.argv[2])
for step in (1, 2):
  saved.save(state(step), {'settings': {}})
  saved.wait()
shapes = jax.eval_shape(lambda: state(0))
wanted = abstract(shapes, jax.tree.map(lambda _: place, shapes))
real = ocp.StandardCheckpointHandler.restore

def fail_once(error):
  def restore(self, *args, **kwargs):
    ocp.StandardCheckpointHandler.restore = real
    raise error
  if jax.process_index() == 1:
    ocp.StandardCheckpointHandler.restore = restore

def attempt():
  try:
    print('restored', int(saved.restore(wanted)[0].step))
  except Exception as error:
    print(type(error).__name__, error)

fail_once(OSError(5, 'Input/output error'))
attempt()
fail_once(ValueError('DATA_LOSS: Error decoding b-tree node'))
attempt()
print('kept', *sorted(path.name for path in pathlib.Path(sys.argv[2], 'checkpoints').iterdir()))
'''


def test_processes_decide_together_whether_a_checkpoint_is_damaged(tmp_path):
  first, second = run_together(RESTORE, tmp_path)
  assert 'UserError' in first[0] and 'another process cannot read it' in first[0]
  assert 'UserError' in second[0] and 'Input/output error' in second[0]
  assert first[1:] == second[1:] == ['restored 1', 'kept 1']


@pytest.mark.parametrize('options, words', [
    (['--process=0/2'], 'need both'), (['--coordinator=localhost:1', '--process=2/2'], 'need both'),
    (['--distributed'], 'no pod or cluster was detected')])
def test_mistakes_in_joining_are_one_line(options, words, config, tmp_path):
  env = {key: value for key, value in ENV.items() if not key.startswith(('SLURM', 'OMPI', 'JOB_'))}
  result = launched.run(*flags(config), f'--workdir={tmp_path}', *options, env=env, check=False)
  assert result.returncode == 2 and words in result.stderr and 'Traceback' not in result.stderr
