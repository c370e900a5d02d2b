"""Captions from labels, for clips that nobody has described."""


def label_caption(labels):
  """['A', 'B', 'C'] -> 'The sound of A, B, and C.'; two labels have the comma, too (the authors' data preparation).

  '_' in names of classes becomes a space, as in the captions of zero-shot classification.
  """
  if not labels:
    raise ValueError('a caption needs at least one label')
  *first, last = (label.replace('_', ' ') for label in labels)
  return f'The sound of {", ".join(first)}, and {last}.' if first else f'The sound of {last}.'
