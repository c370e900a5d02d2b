"""What the page takes, from people and from programs."""
from m2d_clap_jax.errors import UserError

MOST_SECONDS, MOST_UPLOAD = 600, 100 << 20  # of a sound; bytes of its file
MOST_LABELS, MOST_LETTERS = 200, 300
LABELS, CAPTIONS = 'labels', 'captions'  # what lines may be


def read_lines(text: str, empty: str = 'Write at least one label or caption, one on each line.') -> list[str]:
  """The lines that are not blank, each once; UserError where there are none, or more than the page takes."""
  lines = list(dict.fromkeys(' '.join(line.split()) for line in (text or '').splitlines() if line.strip()))
  if not lines:
    raise UserError(empty)
  if len(lines) > MOST_LABELS:
    raise UserError(f'These are {len(lines)} lines; this page takes {MOST_LABELS}.')
  longest = max(map(len, lines))
  if longest > MOST_LETTERS:
    raise UserError(f'A line has {longest} letters; this page takes {MOST_LETTERS}.')
  return lines
