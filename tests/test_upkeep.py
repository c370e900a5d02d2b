"""The code and the texts about it are in order."""
import os
import pathlib
import re
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).parent.parent
TEXTS = sorted([*ROOT.glob('*.md'), *(ROOT / 'docs').glob('*.md')])


def test_ruff_finds_nothing():
  subprocess.run([sys.executable, '-m', 'ruff', 'check', '--no-cache', '.'], cwd=ROOT, check=True)


def test_the_types_of_the_public_face_hold(tmp_path):
  result = subprocess.run([sys.executable, '-m', 'mypy', '--cache-dir', tmp_path], cwd=ROOT,
                          capture_output=True, text=True)
  assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize('text', TEXTS, ids=lambda path: path.name)
def test_links_and_names_of_files_lead_somewhere(text):
  content = text.read_text()
  for link in re.findall(r'\]\(([^)#:]+)(?:#[^)]*)?\)', content):
    assert (text.parent / link).exists(), link
  for module in re.findall(r'python -m (benchmarks\.\w+)', content):
    assert (ROOT / f'{module.replace(".", "/")}.py').exists(), module
  for name in re.findall(r'`((?:tests|configs|launch|docs|benchmarks|m2d_clap_jax)/[\w./]+\.\w+)`', content):
    assert (ROOT / name).exists(), name


def test_the_documentation_is_built_without_a_broken_link(tmp_path):
  result = subprocess.run([sys.executable, '-m', 'mkdocs', 'build', '--strict', '-d', tmp_path / 'site'], cwd=ROOT,
                          env=os.environ | {'NO_MKDOCS_2_WARNING': '1'}, capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  assert 'encode_audio' in (tmp_path / 'site' / 'api' / 'index.html').read_text()


def test_the_citation_is_of_this_version():
  citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
  assert re.search(rf'^version = {re.escape(citation["version"])}$', (ROOT / 'setup.cfg').read_text(), re.MULTILINE)
