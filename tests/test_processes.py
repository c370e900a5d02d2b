"""Several processes, as on a pod: the same run as one process, whichever of them dies, however many come back."""
import collections
import signal
import socket

import numpy as np
import pytest

from m2d_clap_jax.data.batches import TrainingBatches
from m2d_clap_jax.data.order import Order
from m2d_clap_jax.data.prepare import prepare
from m2d_clap_jax.data.read import Folder
from m2d_clap_jax.train import faults
from tests import launched
from tests.prepare_helpers import FakeEncoder, corpus
from tests.test_pretrain import ENVIRONMENT, flags, losses, tiny_config, wait_for  # noqa: F401

# Each process has one device, and computes its part of every batch. Between CPUs, collectives must come in the same
# order everywhere (see conftest.py): gloo would otherwise add up what does not belong together.
ENV = ENVIRONMENT | {
    'JAX_CPU_COLLECTIVES_IMPLEMENTATION': 'gloo', 'OMP_NUM_THREADS': '1',
    'XLA_FLAGS': f'{ENVIRONMENT["XLA_FLAGS"]} --xla_cpu_enable_concurrency_optimized_scheduler=false'}


def free_port():
  with socket.socket() as s:
    s.bind(('localhost', 0))
    return s.getsockname()[1]


def start(config, workdir, count):
  """The run as `count` processes that find each other by hand (one: without that)."""
  address = f'--coordinator=localhost:{free_port()}'
  joined = [[address, f'--process={i}/{count}'] if count > 1 else [] for i in range(count)]
  return [launched.Main(*flags(config), f'--workdir={workdir}', *options, env=ENV) for options in joined]


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
      if name != 'update_norm':  # of Adam's first steps: full steps of rounding noise
        np.testing.assert_allclose(actual[step][name], value, rtol=1e-4, atol=1e-6, err_msg=f'{name}, step {step}')


@pytest.fixture(scope='module')
def config(data):  # noqa: F811
  return tiny_config(data, steps=16, log_every=2, save_every=4, statistics_every=16, evals_every=16)


@pytest.fixture(scope='module')
def alone(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('alone')
  finish(start(config, workdir, 1))
  return losses(workdir)


def test_two_processes_give_the_losses_of_one_and_only_the_first_writes(config, alone, tmp_path):
  errors = finish(start(config, tmp_path, 2))
  close(losses(tmp_path), alone)
  assert sum('done: 16 steps' in error for error in errors) == 1
  assert len(list(tmp_path.glob('events.out.tfevents.*'))) == 1


@pytest.mark.parametrize('before, after', [(2, 1), (1, 4), (4, 4)])
def test_one_is_killed_and_as_many_or_another_number_of_processes_go_on(before, after, config, alone, tmp_path):
  processes = start(config, tmp_path, before)
  wait_for(processes[0], written(tmp_path, 8))
  processes[-1].send_signal(signal.SIGKILL)
  for process in processes:
    process.kill()
    process.communicate()
  errors = finish(start(config, tmp_path, after))
  close(losses(tmp_path), alone)
  assert sum('done: 16 steps' in error for error in errors) == 1


def test_sigterm_to_one_of_two_saves_and_ends_both(config, alone, tmp_path):
  processes = start(config, tmp_path, 2)
  wait_for(processes[0], written(tmp_path, 2))
  processes[1].send_signal(signal.SIGTERM)
  errors = finish(processes, faults.EXIT_PREEMPTED)
  assert all('is saved: the same command continues' in error for error in errors)
  finish(start(config, tmp_path, 2))
  close(losses(tmp_path), alone)


@pytest.mark.parametrize('options, words', [
    (['--process=0/2'], 'need both'), (['--coordinator=localhost:1', '--process=2/2'], 'need both'),
    (['--distributed'], 'tells of no pod or cluster')])
def test_mistakes_in_joining_are_one_line(options, words, config, tmp_path):
  env = {key: value for key, value in ENV.items() if not key.startswith(('SLURM', 'OMPI', 'JOB_'))}
  result = launched.run(*flags(config), f'--workdir={tmp_path}', *options, env=env, check=False)
  assert result.returncode == 2 and words in result.stderr and 'Traceback' not in result.stderr


@pytest.mark.parametrize('hosts', [1, 2, 3, 4])
@pytest.mark.parametrize('clips, batch_size', [(40, 12), (37, 12), (101, 24)])
def test_every_clip_comes_exactly_once_an_epoch_for_any_number_of_hosts(hosts, clips, batch_size):
  order = Order(clips, batch_size, seed=5)
  rows = [slice(h * batch_size // hosts, (h + 1) * batch_size // hosts) for h in range(hosts)]
  seen = np.concatenate([np.concatenate([order.clips(step)[part] for part in rows])
                         for step in range(clips)])  # batch_size whole epochs
  for epoch in range(batch_size):
    assert sorted(seen[epoch * clips:(epoch + 1) * clips]) == list(range(clips))


def test_each_host_reads_its_own_part_of_a_batch_alone(data):  # noqa: F811
  split = Folder(data).split('train')
  options = dict(frames=32, batch_size=16, seed=0, text=True)
  whole = TrainingBatches(split, **options)(3)
  read = []
  split._data, original = lambda *record: (read.append(record[:3]), original(*record))[1], split._data
  parts = [TrainingBatches(split, **options, part=(i, 4))(3) for i in range(4)]
  for name in whole:
    np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[name])
  assert len(read) == 16


@pytest.fixture(scope='module')
def odd(tmp_path_factory):
  """37 clips in 5 shards."""
  root = tmp_path_factory.mktemp('odd')
  prepare(corpus(root / 'audio', 37, seconds=0.3), root / 'audio', root / 'records', text_encoder=FakeEncoder(),
          workers=1, num_shards=5)
  return root / 'records'


@pytest.mark.parametrize('hosts', [1, 2, 3, 4])
def test_hosts_together_read_every_record_of_odd_shards_once_an_epoch(hosts, odd):
  splits = [Folder(odd).split('train') for _ in range(hosts)]
  counts = [collections.Counter() for _ in splits]
  for host, (split, count) in enumerate(zip(splits, counts)):
    split._data = lambda *record, c=count, f=split._data: (c.update([record[:3]]), f(*record))[1]
    batches = TrainingBatches(split, frames=24, batch_size=12, seed=0, text=True, part=(host, hosts))
    for step in range(37):  # 12 epochs
      batches(step)
  assert {sum(count.values()) for count in counts} == {12 * 37 // hosts}
  total = sum(counts, collections.Counter())
  assert len(total) == 37 and set(total.values()) == {12} and len({shard for shard, *_ in total}) == 5
