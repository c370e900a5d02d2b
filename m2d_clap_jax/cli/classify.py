"""`m2d-clap classify`: scores of audio files, for labels of the user's choice or a fine-tuned model's classes."""
import json
import sys

from m2d_clap_jax.audio.names import printable
from m2d_clap_jax.cli import model_options
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.paths import open_text

SHOWN = 5  # labels per file in the table, by default


def add_arguments(p):
  """Declares files, labels and how scores are printed."""
  p.description = """\
With --labels: cosine similarities of each file and each label's caption
(zero-shot). Without: scores of the classes that a model was fine-tuned on,
with their names, or numbers if the model does not state names."""
  p.epilog = """\
examples:
  m2d-clap classify dogs/*.mp3 --model runs/clips --labels 'dog,rain,church bells'
  m2d-clap classify street.wav --model exported/ --labels @labels.txt --json
  m2d-clap classify street.wav --model fine_tuned/checkpoint-99.pth --multi_label

--template turns labels into captions. Several templates are averaged."""
  p.add_argument('paths', nargs='+', metavar='FILE|FOLDER', help='audio: wav, flac, mp3, m4a, ogg, webm and others')
  p.add_argument('--labels', metavar='A,B,C|@FILE', help='labels, or @ and a text file with one per line')
  p.add_argument('--template', action='append', metavar='TEXT',
                 help="caption of a label, which replaces {} (default: '{} can be heard'); may be repeated")
  p.add_argument('--multi_label', action='store_true',
                 help="the fine-tuned model's classes are not exclusive: sigmoid instead of softmax")
  p.add_argument('--top', type=model_options.positive, metavar='N', help=f'labels per file (default: {SHOWN}; all with --json)')
  p.add_argument('--json', action='store_true', help='for programs: one JSON object per line, {"file", "kind", "scores"}; '
                 '{"file", "error"} for one that cannot be used')
  model_options.add_pipeline(p)


def run(args):
  """Prints the scores of each file; UserError if none of the files can be used."""
  from m2d_clap_jax.audio import files
  labels = None if args.labels is None else read_labels(args.labels)
  if labels is None and args.template:
    raise UserError('--template requires --labels, which is missing')
  if labels is not None and args.multi_label:
    raise UserError("--multi_label is for the classes of a fine-tuned model's head and has no effect on --labels; leave it out")
  names = files.find(args.paths)
  model = model_options.open_pipeline(args)
  kind, labels, function = _by_labels(args, model, labels) if labels else _by_head(args, model)
  top = min(args.top or (len(labels) if args.json else SHOWN), len(labels))
  table = _Table(names, labels, kind)
  if not args.json:
    print(table.header())
  used = 0
  for name, scores, reason, progress in files.results(names, function):
    name = printable(name)
    used += not reason
    if not reason:
      order = sorted(range(len(labels)), key=lambda i: -scores[i])[:top]
      best = [(labels[i], float(scores[i])) for i in order]
      line = _json(file=name, kind=kind, scores=dict(best)) if args.json else table.rows(name, best)
      progress.write(line, sys.stdout)
    elif args.json:
      progress.write(_json(file=name, error=reason), sys.stdout)
  if not used:
    raise UserError(f'none of the {len(names)} files can be used, for the reasons above')


def read_labels(text: str) -> list[str]:
  """'a,b,c' or '@file' with one label per line -> labels; UserError if there are none or duplicates."""
  if not text.startswith('@'):
    labels = text.split(',')
  else:
    try:
      with open_text(text[1:]) as f:
        labels = f.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
      raise UserError(f'--labels {text}: cannot be read ({error}): give a UTF-8 text file with one label per line'
                      ) from None
  labels = [label.strip() for label in labels if label.strip()]
  if not labels:
    raise UserError(f'--labels {text}: contains no label; give some, as in --labels dog,rain')
  twice = next((label for label in labels if labels.count(label) > 1), None)
  if twice:
    raise UserError(f'--labels {text}: {twice!r} occurs twice; name each label once')
  return labels


def _by_labels(args, model, labels):
  """Zero-shot -> (kind of the scores, labels, clips -> scores [n, C])."""
  import numpy as np

  from m2d_clap_jax.api import TEMPLATE
  captions = model.encode_labels(labels, args.template or TEMPLATE)  # C E, of length 1

  def scores(clips):
    audio = model.encode_audio(clips)
    return audio / np.linalg.norm(audio, axis=1, keepdims=True) @ captions.T
  return 'cosine', labels, scores


def _by_head(args, model):
  """Classes of a fine-tuned model -> the same three values."""
  from scipy.special import expit, softmax
  if 'head' not in model.weights.trees:
    raise UserError(f'{model.weights.source}: has no fine-tuned head; give --labels, as in --labels dog,rain')
  count = len(model.weights.trees['head']['bias'])
  labels = list(model.classes or map(str, range(count)))
  if args.multi_label:
    return 'sigmoid', labels, lambda clips: expit(model.logits(clips))
  return 'softmax', labels, lambda clips: softmax(model.logits(clips), axis=1)


class _Table:
  """One line per label of a file, with the file's name on the first."""

  def __init__(self, names, labels, kind):
    self.kind = kind
    self.file_width = max(map(len, (*map(printable, names), 'file')))
    self.label_width = max(map(len, (*labels, 'label')))

  def header(self) -> str:
    return self._line('file', 'label', f'{self.kind:>7}')

  def rows(self, name: str, best: list[tuple[str, float]]) -> str:
    return '\n'.join(self._line('' if i else name, label, f'{score:7.3f}') for i, (label, score) in enumerate(best))

  def _line(self, file: str, label: str, score: str) -> str:
    return f'{file:{self.file_width}}  {label:{self.label_width}}  {score}'


def _json(**fields) -> str:
  return json.dumps(fields, ensure_ascii=False)
