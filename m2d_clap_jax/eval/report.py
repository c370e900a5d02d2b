"""Results of evaluations: a JSON file, and Markdown tables beside the paper's numbers."""
import importlib.metadata
import json
import math
import os

from m2d_clap_jax.errors import UserError
from m2d_clap_jax.paths import as_path, files_under, write_text
from m2d_clap_jax.tasks.table import PAPER, TASKS

RESULTS, TABLE = 'results.json', 'results.md'
PACKAGES = ('jax', 'flax', 'optax', 'numpy')
TITLES = {'linear': 'Linear evaluation', 'finetune': 'Fine-tuning', 'zeroshot': 'Zero-shot classification',
          'retrieval': 'Retrieval'}


def write(folder, result: dict):
  """Writes results.json and results.md; `result` has job, task, metric, score in 0..1 and any further values.

  A non-finite score is written as null.
  """
  folder = as_path(folder)
  versions = {name: importlib.metadata.version(name) for name in PACKAGES}
  paper = PAPER.get(result['job'], {}).get(result['task'])
  full = result | {'paper': paper and paper / 100, 'versions': versions}
  write_text(folder / RESULTS, json.dumps(_finite(full), indent=2, default=list) + '\n')
  write_text(folder / TABLE, tables([_finite(full)]))


def refuse_other(folder, fingerprint: str):
  """Raises UserError instead of overwriting the results of another model; those of the same model are replaced."""
  path = as_path(folder) / RESULTS
  try:
    before = json.loads(path.read_text())['model']
    other, source = before['fingerprint'] != fingerprint, before['source']
  except (OSError, ValueError, KeyError, TypeError):
    return  # no results, or unusable ones
  if other:
    raise UserError(f'{path}: contains the results of another model, {source}: choose another --workdir, or delete the '
                    'file')


def merge(folders) -> str:
  """Collects the results in several folders and their sub-folders into the paper's tables -> Markdown.

  Raises:
    UserError: a folder without results, or results that cannot be read.
  """
  results = []
  for folder in map(as_path, folders):
    found = [folder / name for name in files_under(folder) if os.path.basename(name) == RESULTS]
    if not found:
      raise UserError(f'{folder}: contains no {RESULTS}; name the --workdir of a finished evaluation')
    for path in found:
      try:
        content = json.loads(path.read_text())
        results.append({**content, 'score': float(content['score']), 'job': content['job'], 'task': content['task']})
      except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path}: is not a result of an evaluation ({error}); run the evaluation again') from None
  return tables(results)


def tables(results: list[dict]) -> str:
  """One table for each kind of evaluation, in the paper's order of tasks, and the mean over its tasks."""
  parts = []
  for job, title in TITLES.items():
    selected = sorted((result for result in results if result['job'] == job), key=_order)
    if not selected:
      continue
    parts.append(f'## {title}\n\n{retrieval_table(selected) if job == "retrieval" else score_table(selected)}')
  return '\n\n'.join(parts) + '\n'


def score_table(results: list[dict]) -> str:
  """A Markdown table of scores, a row each, of the paper's tasks beside its score; with several of them also their mean."""
  known = [result for result in results if result.get('paper') is not None]
  rows = [['task', 'model', 'metric', 'this run, %', '95% CI', 'chance, %', 'paper, %', 'difference'], ['---'] * 8]
  for result in results:
    paper = result.get('paper')
    rows.append([result['task'], _model(result), result['metric'], _percent(result['score']),
                 f'± {_percent(result["interval"])}' if result.get('interval') is not None else '',
                 _percent(result.get('chance')), _percent(paper),
                 f'{100 * (result["score"] - paper):+.1f}' if paper is not None else ''])
  if len(known) > 1:
    ours, theirs = (sum(result[key] for result in known) / len(known) for key in ('score', 'paper'))
    rows.append([f'mean of these {len(known)}', '', '', _percent(ours), '', '', _percent(theirs), f'{100 * (ours - theirs):+.1f}'])
  return '\n'.join(f'| {" | ".join(row if known else row[:-2])} |' for row in rows)


def retrieval_table(results: list[dict]) -> str:
  """A Markdown table of retrieval scores, a row for each direction."""
  names = ('R@1', 'R@5', 'R@10', 'mAP@10', 'median_rank')
  lines = ['| task | model | direction | ' + ' | '.join(name.replace('_', ' ') for name in names) + ' | R@1 by chance |',
           '|---' * (4 + len(names)) + '|']
  for result in results:
    for direction in ('text_to_audio', 'audio_to_text'):
      values = [f'{result[direction][name]:.1f}' if name == 'median_rank' else _percent(result[direction][name])
                for name in names]
      lines.append(f'| {result["task"]} | {_model(result)} | {direction.replace("_", " ")} | '
                   + ' | '.join(values) + f' | {_percent(result[direction].get("chance"))} |')
  return '\n'.join(lines)


def _order(result):
  names = list(TASKS)
  return names.index(result['task']) if result['task'] in names else len(names), result['task']


def _model(result: dict) -> str:
  """The model's path or name, as the cell of a table."""
  return str(result['model']['source']).replace('|', r'\|')


def _percent(value) -> str:
  return '' if value is None else f'{100 * value:.1f}'


def _finite(value):
  if isinstance(value, dict):
    return {str(key): _finite(each) for key, each in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(each) for each in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
