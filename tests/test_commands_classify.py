"""`m2d-clap classify`: the Pipeline's scores, for people and for programs."""
import dataclasses
import json

import numpy as np
import pytest

import m2d_clap_jax
from m2d_clap_jax.weights.portable import save_portable
from tests.command_helpers import run, save_model, save_recordings
from tests.small_model import tiny_weights

LABELS = ['dog', 'rain', 'church_bells', 'a, b']


@pytest.fixture(scope='module')
def here(tmp_path_factory):
  """A folder with model/, fine_tuned/ and audio/; `here.usable`, `here.model` (Pipeline)."""
  class Here:
    root = tmp_path_factory.mktemp('classify')
    folder = save_model(root / 'model')
    usable = save_recordings(root / 'audio')
    model = m2d_clap_jax.load(folder)
  rng = np.random.default_rng(1)
  plain = tiny_weights(patch_size=(16, 16), text_width=None)
  Here.fine_tuned = dataclasses.replace(plain, text_encoder=None, trees=plain.trees | {
      'head': {'kernel': rng.standard_normal((480, 3), np.float32), 'bias': np.zeros(3, np.float32)},
      'head_stats': {'mean': np.zeros(480, np.float32), 'var': np.ones(480, np.float32)}})
  (Here.root / 'labels.txt').write_text('dog\n\n  rain \nchurch_bells\na, b\n', encoding='utf-8-sig')
  return Here


def lines_of(here, capsys, *options, model=None):
  """The objects that --json prints, one for each file."""
  assert run('classify', here.root / 'audio', '--model', model or here.folder, '--json', *options) == 0
  return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize('templates', [[], ['{}'], ['{} can be heard', 'the sound of {}']])
def test_json_has_the_pipelines_cosines_and_every_file(here, templates, capsys):
  lines = lines_of(here, capsys, '--labels', f'@{here.root}/labels.txt', *(f'--template={t}' for t in templates))
  options = {'template': templates} if templates else {}
  expected = here.model.classify(here.usable, labels=LABELS, **options)
  usable = [line for line in lines if 'scores' in line]
  assert [line['file'] for line in usable] == here.usable
  for line, row in zip(usable, expected):
    assert line['kind'] == 'cosine' and list(line['scores'].values()) == sorted(line['scores'].values(), reverse=True)
    np.testing.assert_allclose([line['scores'][label] for label in LABELS], row, atol=1e-6)
  errors = [line for line in lines if 'error' in line]
  assert ['cut off' in errors[0]['error'], 'not readable' in errors[1]['error'], len(errors)] == [True, True, 2]


def test_the_table_has_the_best_labels_of_each_file(here, capsys):
  assert run('classify', *here.usable[:2], '--model', here.folder, '--labels', 'dog,rain,bells', '--top', 2) == 0
  header, *rows = capsys.readouterr().out.splitlines()
  assert header.split() == ['file', 'label', 'cosine'] and len(rows) == 4
  scores = here.model.classify(here.usable[:2], labels=['dog', 'rain', 'bells'])
  for i, name in enumerate(here.usable[:2]):
    order = np.argsort(-scores[i])[:2]
    assert rows[2 * i].split() == [name, ['dog', 'rain', 'bells'][order[0]], f'{scores[i][order[0]]:.3f}']
    assert rows[2 * i + 1].split() == [['dog', 'rain', 'bells'][order[1]], f'{scores[i][order[1]]:.3f}']


def test_a_fine_tuned_head_scores_its_own_classes(here, capsys):
  model = save_portable(dataclasses.replace(here.fine_tuned, classes=('cat', 'cow', 'owl')), here.root / 'named')
  logits = m2d_clap_jax.load(model).logits(here.usable)
  softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  for options, kind, expected in (([], 'softmax', softmax), (['--multi_label'], 'sigmoid', 1 / (1 + np.exp(-logits)))):
    lines = [line for line in lines_of(here, capsys, *options, model=model) if 'scores' in line]
    assert {line['kind'] for line in lines} == {kind}
    np.testing.assert_allclose([[line['scores'][name] for name in ('cat', 'cow', 'owl')] for line in lines], expected,
                               rtol=1e-4)
  unnamed = save_portable(here.fine_tuned, here.root / 'unnamed')
  assert set(lines_of(here, capsys, model=unnamed)[0]['scores']) == {'0', '1', '2'}


@pytest.mark.parametrize('options,message', [
    (['--labels', ' , '], 'contains no label'),
    (['--labels', 'dog,rain,dog'], "'dog' occurs twice"),
    (['--labels', '@none.txt'], '@none.txt: cannot be read'),
    (['--labels', 'dog', '--template', 'a sound'], "template 'a sound' has no {}"),
    (['--template', '{}'], '--template requires --labels'),
    (['--labels', 'dog', '--multi_label'], "--multi_label is for the classes of a fine-tuned model's head"),
    ([], 'has no fine-tuned head; give --labels'),
    (['--labels', 'dog', '--text_encoder', 'no/such/folder'], 'no/such/folder')])
def test_options_that_cannot_work_are_one_line(here, options, message, capsys):
  assert run('classify', here.usable[0], '--model', here.folder, *options) == 2
  printed = capsys.readouterr()
  assert printed.err.startswith('m2d-clap: ') and message in printed.err and printed.err.count('\n') == 1
  assert not printed.out


def test_labels_for_a_model_without_text_and_useless_files_are_one_line(here, capsys):
  model = save_portable(here.fine_tuned, here.root / 'no_text')
  assert run('classify', here.usable[0], '--model', model, '--labels', 'dog') == 2
  assert 'has no CLAP head' in capsys.readouterr().err
  assert run('classify', here.root / 'audio' / 'notes.txt', '--model', here.folder, '--labels', 'dog') == 2
  assert capsys.readouterr().err.endswith('m2d-clap: none of the 1 files can be used, for the reasons above\n')


def test_top_must_be_a_number_from_1(here, capsys):
  with pytest.raises(SystemExit):
    run('classify', here.usable[0], '--model', here.folder, '--labels', 'dog', '--top', 0)
  assert "'0' is not a whole number of at least 1" in capsys.readouterr().err
