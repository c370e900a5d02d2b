"""What the texts name exists. launch/test.sh runs ruff, mypy, shellcheck and the build of the documentation."""
import pathlib
import re

import pytest
import yaml

ROOT = pathlib.Path(__file__).parent.parent
TEXTS = sorted([*ROOT.glob('*.md'), *(ROOT / 'docs').glob('*.md')])


@pytest.mark.parametrize('text', TEXTS, ids=lambda path: path.name)
def test_links_and_names_of_files_lead_somewhere(text):
  content = text.read_text()
  for link in re.findall(r'\]\(([^)#:]+)(?:#[^)]*)?\)', content):
    assert (text.parent / link).exists(), link
  for module in re.findall(r'python -m (benchmarks\.\w+)', content):
    assert (ROOT / f'{module.replace(".", "/")}.py').exists(), module
  for name in re.findall(r'`((?:tests|configs|launch|docs|benchmarks|m2d_clap_jax)/[\w./]+\.\w+)`', content):
    assert (ROOT / name).exists(), name


def test_the_citation_is_of_this_version():
  citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
  assert re.search(rf'^version = {re.escape(citation["version"])}$', (ROOT / 'setup.cfg').read_text(), re.MULTILINE)
