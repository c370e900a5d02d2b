"""Machines that go away, checkpoints and shards that break, and inputs that stall."""
import pathlib
import re
import shutil
import signal
import threading
import time

import jax
import orbax.checkpoint as ocp
import pytest

from m2d_clap_jax.data.prepare import prepare
from m2d_clap_jax.data.read import Folder
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.train import faults, prepared_data, pretrain
from m2d_clap_jax.train.checkpoint import DAMAGED, Checkpoints, read_parameters
from tests import launched
from tests.prepare_helpers import FakeEncoder, corpus
from tests.test_pretrain import ENVIRONMENT, flags, losses, one_device, tiny_config, wait_for  # noqa: F401


@pytest.fixture(scope='module')
def finished(data, tmp_path_factory):  # noqa: F811
  """A finished run of 6 steps, with checkpoints of the steps 4 and 6 -> (its configuration, its workdir, to be copied)."""
  config = tiny_config(data, steps=6, log_every=1, save_every=2, statistics_every=6, evals_every=6)
  workdir = tmp_path_factory.mktemp('finished')
  with pytest.MonkeyPatch.context() as patch:
    one_device.__wrapped__(patch)
    pretrain.run(config, workdir)
  return config, workdir


@pytest.fixture
def run(finished, tmp_path):
  return shutil.copytree(finished[1], tmp_path / 'run')


def test_sigterm_saves_leaves_with_its_own_code_and_the_same_command_goes_on(data, tmp_path):  # noqa: F811
  config = tiny_config(data, steps=30, log_every=3, save_every=30, statistics_every=30, evals_every=30)
  launched.run(*flags(config), f'--workdir={tmp_path / "whole"}', env=ENVIRONMENT)
  broken = tmp_path / 'broken'
  codes = []
  while not codes or codes[-1]:
    process = launched.Main(*flags(config), f'--workdir={broken}', env=ENVIRONMENT)
    if not codes:
      wait_for(process, lambda: '"step": 6,' in ((broken / 'metrics.jsonl').read_text()
                                                 if (broken / 'metrics.jsonl').exists() else ''))
      process.send_signal(signal.SIGTERM)
    error = process.communicate()[1].decode()
    codes.append(process.returncode)
    assert len(codes) < 4, error
    if codes == [faults.EXIT_PREEMPTED]:
      assert 'which is saved; the same command continues' in error
      assert 6 <= Checkpoints(broken).latest() < 30
  assert codes == [faults.EXIT_PREEMPTED, 0]
  assert losses(broken) == losses(tmp_path / 'whole')


def truncate(folder):
  for path in folder.rglob('*'):
    if path.is_file() and 'ocdbt.process' not in str(path) and path.parent.name == 'd':
      path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def empty(folder):
  for path in (folder / 'state').rglob('*'):
    if path.is_file():
      path.write_bytes(b'')


def overwrite(folder):
  """Zeros in the middle of the largest file, which holds compressed arrays."""
  path = max((path for path in (folder / 'state').rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)
  stored = bytearray(path.read_bytes())
  stored[len(stored) // 2:len(stored) // 2 + 8192] = bytes(8192)
  path.write_bytes(stored)


def without_meta(folder):
  for path in (folder / 'meta').iterdir():
    path.unlink()


@pytest.mark.parametrize('damage', [truncate, empty, overwrite, without_meta])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(damage, finished, run, capsys):
  expected = losses(run)
  damage(run / 'checkpoints' / '6')
  pretrain.run(finished[0], run)
  assert 'the checkpoint of step 6 is damaged' in capsys.readouterr().err
  assert [path.name[:2] for path in (run / DAMAGED).iterdir()] == ['6-']
  assert losses(run) == expected and Checkpoints(run).latest() == 6


def test_when_all_checkpoints_are_damaged_the_run_says_so(finished, run):
  for folder in (run / 'checkpoints').iterdir():
    empty(folder)
  with pytest.raises(UserError, match='every checkpoint is damaged'):
    pretrain.run(finished[0], run)


def test_reading_a_run_takes_the_newest_readable_checkpoint_and_moves_nothing(finished, tmp_path, capsys):
  for damage in (truncate, empty, without_meta):
    run = shutil.copytree(finished[1], tmp_path / damage.__name__)
    older, newest = (run / 'checkpoints' / step for step in '46')
    damage(newest)
    assert read_parameters(run)[0] == 4
    assert f'{newest} is damaged' in capsys.readouterr().err
    damage(older)
    with pytest.raises(UserError, match=f'{older.parent}: none of its 2 checkpoints can be read'):
      read_parameters(run)
    assert older.exists() and newest.exists() and not (run / DAMAGED).exists()


PASSING = [MemoryError(), OSError(5, 'Input/output error'), PermissionError(13, 'Permission denied'),
           jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 1073741824 bytes.'),
           ValueError('UNAVAILABLE: Error reading "params.a/0": the store is away')]


def test_a_passing_error_at_restore_ends_the_run_with_its_reason_and_touches_nothing(finished, run, monkeypatch):
  for error in PASSING:
    def fail(*args, error=error, **kwargs):
      raise error
    refused = f'checkpoints/6: cannot be read .{re.escape(str(error) or type(error).__name__)}.: nothing was changed'
    with monkeypatch.context() as patch:
      patch.setattr(ocp.StandardCheckpointHandler, 'restore', fail)
      with pytest.raises(UserError, match=refused):
        pretrain.run(finished[0], run)
      patch.setattr(ocp.PyTreeCheckpointHandler, 'restore', fail)
      with pytest.raises(UserError, match=refused):
        read_parameters(run)
  assert not (run / DAMAGED).exists() and Checkpoints(run).latest() == read_parameters(run)[0] == 6


@pytest.fixture
def damaged(tmp_path):
  """Two shards of 20 clips, the first cut in half."""
  manifest = corpus(tmp_path / 'audio', 40, seconds=0.5)
  prepare(manifest, tmp_path / 'audio', tmp_path / 'records', text_encoder=FakeEncoder(), workers=2, num_shards=2)
  shard = pathlib.Path(Folder(tmp_path / 'records').split('train').files[0])
  shard.write_bytes(shard.read_bytes()[:shard.stat().st_size // 2])
  return tmp_path / 'records'


def test_a_truncated_shard_is_fatal_by_default_and_skipped_by_choice(damaged, tmp_path, capsys):
  config = tiny_config(damaged, steps=4)
  with pytest.raises(UserError, match='shard has .* bytes where .* were written'):
    pretrain.run(config, tmp_path / 'run')
  config.data.damaged = 'skip'
  pretrain.run(config, tmp_path / 'run')
  text = capsys.readouterr().err
  assert 'clip left out, 1 so far' in text and 'train-00000-of' in text
  assert losses(tmp_path / 'run')[4]['loss'] > 0
  config.data.damaged = 'ignore'
  with pytest.raises(UserError, match="config.data.damaged='ignore': unknown"):
    pretrain.run(config, tmp_path / 'other')


def test_sigterm_is_noticed_inside_the_guards_only_and_the_old_handler_comes_back_after_an_error():
  received = []
  before = signal.signal(signal.SIGTERM, lambda *_: received.append('old'))
  try:
    with pytest.raises(UserError), faults.guards(60) as guards:
      assert not guards.preemption.reached()
      signal.raise_signal(signal.SIGTERM)  # while a checkpoint is restored, or something is being compiled
      assert guards.preemption.reached() and not received
      raise UserError('no such data')
    signal.raise_signal(signal.SIGTERM)
    assert received == ['old']
    with faults.guards(60) as guards:
      assert not guards.preemption.reached()
  finally:
    signal.signal(signal.SIGTERM, before)


def test_data_of_which_nothing_can_be_read_is_an_error(damaged, tmp_path):
  for path in damaged.glob('*.tfrecord'):
    path.write_bytes(b'')
  config = tiny_config(damaged, steps=4)
  config.data.damaged = 'skip'
  with pytest.raises(UserError, match='not one clip'):
    pretrain.run(config, tmp_path / 'run')


def test_the_watchdog_ends_what_does_not_move_and_leaves_the_rest_alone(capsys):
  codes = []
  with faults.Watchdog(0.2, codes.append) as watchdog:
    watchdog.beat('step 7')
    time.sleep(0.8)
  assert codes == [faults.EXIT_STALLED]
  assert 'nothing has moved for 0 s (config.stall_seconds) since step 7' in capsys.readouterr().err
  with faults.Watchdog(0.4, codes.append) as watchdog:
    watchdog.rest()  # scores are being computed
    time.sleep(0.8)
    watchdog.beat('an evaluation')
  with faults.Watchdog(0, codes.append):
    time.sleep(0.2)
  assert len(codes) == 1
  with pytest.raises(UserError, match='config.stall_seconds=-1: must be 0 .never. or more'):
    faults.Watchdog(-1)


def test_no_watchdog_outlives_an_error_and_opening_the_data_is_watched(data, tmp_path, monkeypatch):  # noqa: F811
  watched = []

  def refuse(*args, **kwargs):
    watched.extend(thread.name for thread in threading.enumerate())
    raise UserError('no such data')
  monkeypatch.setattr(prepared_data, 'Folder', refuse)
  with pytest.raises(UserError, match='no such data'):
    pretrain.run(tiny_config(data), tmp_path)
  assert 'watchdog' in watched
  assert 'watchdog' not in [thread.name for thread in threading.enumerate()]
