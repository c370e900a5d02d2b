"""The command line as such: help, exit codes, nothing on the screen that nobody asked for."""
import os
import pathlib
import shlex
import subprocess
import sys

import pytest

from m2d_clap_jax.cli import classify, main
from tests.command_helpers import run

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize('command', main.COMMANDS)
def test_help_shows_an_example_of_the_command(command, capsys):
  with pytest.raises(SystemExit) as stopped:
    run(command, '--help')
  assert stopped.value.code == 0
  examples = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f'  m2d-clap {command} ')]
  assert examples
  for example in examples:
    main.parse(shlex.split(example)[1:])  # it is one that the parser takes


def test_help_does_not_wait_for_jax_or_tensorflow():
  code = '''
import sys
from m2d_clap_jax.cli import main
for command in main.COMMANDS:
  try:
    main.main([command, '--help'])
  except SystemExit:
    pass
print([name for name in ('jax', 'flax', 'tensorflow', 'transformers', 'torch', 'soundfile') if name in sys.modules])
'''
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  assert done.stdout.splitlines()[-1] == '[]', done.stderr


def test_an_interrupted_command_says_so_and_a_closed_pipe_is_no_error(tmp_path, monkeypatch, capsys):
  def interrupt(*_, **__):
    raise KeyboardInterrupt
  monkeypatch.setattr(classify, 'read_labels', interrupt)
  assert run('classify', tmp_path, '--model', tmp_path, '--labels', 'a') == 130
  assert capsys.readouterr().err == 'm2d-clap: interrupted\n'
  reader, writer = os.pipe()
  os.close(reader)
  done = subprocess.run([sys.executable, '-c', '''
import argparse, sys
from m2d_clap_jax.cli import main
main.parse = lambda argv: argparse.Namespace(command='info', run=lambda args: print('x' * 100))
sys.exit(main.main([]))'''], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
  os.close(writer)
  assert done.returncode == 1 and done.stderr == ''


def test_an_unknown_command_is_named(capsys):
  with pytest.raises(SystemExit):
    run('embedd', 'x')
  assert "'embedd'" in capsys.readouterr().err
