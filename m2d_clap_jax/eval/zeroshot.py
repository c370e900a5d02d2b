"""Zero-shot classification: the class whose caption lies nearest to the clip (paper, section 3.3)."""

import numpy as np

from m2d_clap_jax.eval import metrics


def zeroshot(audio_embeddings, text_embeddings, labels) -> dict:
  """Classifies clips by cosine similarity to one embedded caption for each class.

  Args:
    audio_embeddings: [n, E]. Any scale: both sides are normalised here.
    text_embeddings: [C, E].
    labels: [n] int, the true classes.

  Returns:
    accuracy and chance (1 / C) in 0..1; per_class [C] (NaN where a class has no clips); predictions [n];
    confusion [C, C] counts, true classes in rows; similarity [n, C] cosines; class_similarity [C, C], their mean over
    the clips of each true class.

  Raises:
    ValueError: shapes that don't fit, a label outside 0..C-1, or embeddings that are not finite.
  """
  audio, text, labels = normalise(audio_embeddings), normalise(text_embeddings), np.asarray(labels)
  if labels.shape != (len(audio),) or not len(labels) or labels.min() < 0 or labels.max() >= len(text):
    raise ValueError(f'labels {labels.shape} must name one of the {len(text)} classes for each of {len(audio)} clips')
  similarity = audio @ text.T  # n C
  predictions = similarity.argmax(axis=1)
  confusion = metrics.confusion_matrix(labels, predictions, len(text))
  return {
    'accuracy': metrics.accuracy(predictions, labels),
    'chance': 1 / len(text),
    'per_class': metrics.per_class_accuracy(confusion),
    'predictions': predictions,
    'confusion': confusion,
    'similarity': similarity,
    'class_similarity': _class_means(similarity, labels, len(text)),
  }


def normalise(x) -> np.ndarray:
  """[n, E] rows to unit length; a row of zeros stays zero."""
  x = np.asarray(x, np.float64)
  if x.ndim != 2 or not np.isfinite(x).all():
    bad = np.sum(~np.isfinite(x))
    raise ValueError(f'embeddings must be a finite [n, E] array; got shape {x.shape} with {bad} bad values')
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _class_means(similarity, labels, num_classes):
  means = np.full((num_classes, similarity.shape[1]), np.nan)
  for c in np.unique(labels):
    means[c] = similarity[labels == c].mean(axis=0)
  return means
