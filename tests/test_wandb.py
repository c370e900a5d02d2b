"""A run logs to Weights & Biases, too: the real package, offline."""
import json
import time

import pytest
import wandb
from wandb.proto import wandb_internal_pb2
from wandb.sdk.internal.datastore import DataStore

from m2d_clap_jax.errors import UserError
from m2d_clap_jax.train import pretrain
from m2d_clap_jax.train.log import RunLog
from m2d_clap_jax.train.wandb_writer import RUN
from tests.test_pretrain import one_device, tiny_config  # noqa: F401


def records(file):
  """Those of a finished run: its last is of the kind `exit`, which wandb's own process may yet be writing."""
  found = []
  for _ in range(100):
    store, found = DataStore(), []
    store.open_for_scan(str(file))
    while content := store.scan_data():
      found.append(wandb_internal_pb2.Record.FromString(content))
    if any(record.WhichOneof('record_type') == 'exit' for record in found):
      break
    time.sleep(0.3)
  return found


def logged(file):
  """What a file of wandb has: ({step: {name: value}}, identifier, settings)."""
  rows, name, settings = {}, '', {}
  for record in records(file):
    if record.WhichOneof('record_type') == 'history':
      items = {'/'.join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
      rows[items['_step']] = {key: value for key, value in items.items() if not key.startswith('_')}
    elif record.WhichOneof('record_type') == 'run':
      name = record.run.run_id
    elif record.WhichOneof('record_type') == 'config':
      settings |= {item.key: json.loads(item.value_json) for item in record.config.update}
  return rows, name, settings


def test_wandb_gets_what_metrics_jsonl_has_and_a_continued_run_is_the_same(data, tmp_path, monkeypatch, one_device, capsys):  # noqa: F811
  monkeypatch.setenv('WANDB_MODE', 'offline')
  for steps in (4, 6):
    pretrain.run(tiny_config(data, steps=steps, wandb='sounds'), str(tmp_path / 'mine'))
  files = sorted((tmp_path / 'mine' / 'wandb').glob('offline-run-*/run-*.wandb'))
  (first, name, settings), (second, again, _) = map(logged, files)
  rows = {}
  for line in (tmp_path / 'mine' / 'metrics.jsonl').read_text().splitlines():
    row = json.loads(line)
    rows.setdefault(row.pop('step'), {}).update(row)
  assert {step: row['loss'] for step, row in (first | second).items() if 'loss' in row} == {
      step: row['loss'] for step, row in rows.items() if 'loss' in row}
  assert name == again == (tmp_path / 'mine' / RUN).read_text().strip()
  assert settings['batch_size'] == 16 and settings['data']['folder'] == str(data)
  assert 'wandb: ' in capsys.readouterr().err


def test_an_account_that_is_missing_is_told_in_a_line(tmp_path, monkeypatch):
  wandb.teardown()  # it reads its variables once in a process
  monkeypatch.setenv('WANDB_MODE', 'online')
  monkeypatch.setenv('WANDB_API_KEY', 'no key')
  with pytest.raises(UserError, match='config.wandb=sounds: .*WANDB_MODE=offline'), RunLog(tmp_path, None, wandb='sounds'):
    pass
