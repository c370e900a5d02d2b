"""Damaged files of every kind: refused in one line, read right, or fast to fail; never a traceback, never a wrong value."""
import pytest

from benchmarks import fuzz

COUNT = {'checkpoints': 60, "checkpoints' JSON": 60, 'audio': 240}


@pytest.mark.parametrize('make', [fuzz.portable, fuzz.data_folder, fuzz.record, fuzz.checkpoint, fuzz.audio])
def test_damaged_files_are_refused_in_one_line_or_read_right(make, tmp_path):
  for name, kind in make(tmp_path).items():
    outcome = fuzz.fuzz(kind, COUNT.get(name, 300), seed=1)
    assert not outcome.tracebacks, f'{name}: {outcome.tracebacks[0]}'
    assert not outcome.wrong, f'{name}: {outcome.wrong} were read as something else'
    assert outcome.refused > outcome.files / 10, f'{name}: changes that do not matter test nothing'
    assert outcome.slowest < 60 and outcome.grew_mb < 500, name


def test_the_benchmark_prints_a_row_of_each_kind(capsys):
  assert fuzz.main(['--count', '8', '--audio', '16', '--seed', '3']) == 0
  rows = [line.split('  ')[0] for line in capsys.readouterr().out.splitlines()]
  assert rows[-10:] == ['kind', 'config.json', 'model.safetensors', 'prepare.json', 'sidecars', 'TFRecords', 'data.json',
                       'checkpoints', "checkpoints' JSON", 'audio']
