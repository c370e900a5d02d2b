"""Captions from labels, for clips that nobody has described."""


def label_caption(labels):
  """['A', 'B', 'C'] -> 'The sound of A, B, and C.'; two labels are joined by 'and' alone (paper, section 3.1)."""
  if not labels:
    raise ValueError('a caption needs at least one label')
  if len(labels) < 3:
    return f'The sound of {" and ".join(labels)}.'
  return f'The sound of {", ".join(labels[:-1])}, and {labels[-1]}.'
