"""Metrics: accuracy, average precision, retrieval, zero-shot classification, health of features."""

import numpy as np


def accuracy(predictions, labels) -> float:
  """Share of equal entries of two [n] arrays of class numbers, in 0..1."""
  predictions, labels = np.asarray(predictions), np.asarray(labels)
  if predictions.shape != labels.shape or not len(labels):
    raise ValueError(f'predictions {predictions.shape} and labels {labels.shape} must be equal in shape, and not empty')
  return float(np.mean(predictions == labels))


def confusion_matrix(labels, predictions, num_classes: int) -> np.ndarray:
  """[C, C] counts: rows are the true classes, columns the predicted ones."""
  from sklearn.metrics import confusion_matrix as counted
  return counted(labels, predictions, labels=np.arange(num_classes))


def per_class_accuracy(matrix) -> np.ndarray:
  """Recall of each class from a confusion matrix -> [C]; NaN for a class without clips."""
  matrix = np.asarray(matrix, np.float64)
  totals = matrix.sum(axis=1)
  return np.divide(np.diag(matrix), totals, out=np.full(len(matrix), np.nan), where=totals > 0)


def average_precision(targets, scores) -> np.ndarray:
  """Average precision of each class -> [C], by scikit-learn. A class without positives gets 0.

  Args:
    targets: [n, C], 1 or True where the clip has the label.
    scores: [n, C], higher is more likely.
  """
  from sklearn.metrics import average_precision_score
  targets, scores = np.asarray(targets, bool), np.asarray(scores, np.float64)
  if targets.shape != scores.shape or targets.ndim != 2 or not len(targets):
    raise ValueError(f'targets {targets.shape} and scores {scores.shape} must both be [clips, classes], and not empty')
  if not np.isfinite(scores).all():
    raise ValueError('scores contain NaN or infinity and cannot be ranked')
  return np.array([average_precision_score(t, s) if t.any() else 0.0 for t, s in zip(targets.T, scores.T)])


def mean_average_precision(targets, scores) -> float:
  """Macro mean of `average_precision` over the classes ('mAP' of the audio tagging tasks)."""
  return float(np.mean(average_precision(targets, scores)))


def chance(targets) -> float:
  """What guessing scores: 1 / C in accuracy, or, where clips have several labels, the mean share of clips with a label,
  which is the mAP of a random ranking.

  Args:
    targets: [n, C], 1 where the clip has the label.
  """
  return float(np.mean(targets, dtype=np.float64))


def retrieval_ranks(similarity, relevant) -> list[np.ndarray]:
  """Ranks, from 1, of the relevant items of each query, ascending -> one array a query.

  Among equally similar items the relevant ones are ranked last, so that constant similarities score nothing.

  Args:
    similarity: [queries, items].
    relevant: [queries, items], True where the item answers the query; at least one in each row.
  """
  similarity, relevant = np.asarray(similarity), np.asarray(relevant, bool)
  if similarity.shape != relevant.shape or not relevant.any(axis=1).all():
    raise ValueError(f'similarity {similarity.shape} and relevant {relevant.shape} must be equal in shape, '
                     'with something relevant in every row')
  order = np.lexsort((relevant, -similarity), axis=1)  # by decreasing similarity, then irrelevant before relevant
  return [np.flatnonzero(row) + 1 for row in np.take_along_axis(relevant, order, axis=1)]


def retrieval(similarity, relevant, ks=(1, 5, 10)) -> dict:
  """-> {'R@1', 'R@5', 'R@10', 'mAP@10', 'median_rank', 'chance'} of one direction; arguments as in `retrieval_ranks`.

  R@k: share of queries with a relevant item among the first k. mAP@10: mean over queries of the sum of the precisions
  at the relevant items among the first ten, over min(10, relevant items). median_rank: of the best relevant item.
  chance: the R@1 of a random order.
  """
  ranks = retrieval_ranks(similarity, relevant)
  best = np.array([r[0] for r in ranks])
  precisions = [np.sum(np.arange(1, np.sum(r <= 10) + 1) / r[r <= 10]) / min(10, len(r)) for r in ranks]
  return {f'R@{k}': float(np.mean(best <= k)) for k in ks} | {
    'mAP@10': float(np.mean(precisions)), 'median_rank': float(np.median(best)), 'chance': float(np.mean(relevant))}


def audio_text_retrieval(similarity, clip_of_text) -> dict:
  """Both directions for clips with several captions -> {'audio_to_text': {...}, 'text_to_audio': {...}}.

  Args:
    similarity: [clips, texts].
    clip_of_text: [texts] int, the clip that each text describes.
  """
  similarity, clip_of_text = np.asarray(similarity), np.asarray(clip_of_text)
  relevant = clip_of_text[None, :] == np.arange(len(similarity))[:, None]
  return {'audio_to_text': retrieval(similarity, relevant), 'text_to_audio': retrieval(similarity.T, relevant.T)}


def zeroshot(audio_embeddings, text_embeddings, labels) -> dict:
  """Classifies clips by cosine similarity to one embedded caption for each class.

  Args:
    audio_embeddings: [n, E]. Any scale: both sides are normalised here.
    text_embeddings: [C, E].
    labels: [n] int, the true classes.

  Returns:
    accuracy and chance (1 / C) in 0..1; per_class [C] (NaN for a class without clips); predictions [n];
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
  confusion = confusion_matrix(labels, predictions, len(text))
  return {
    'accuracy': accuracy(predictions, labels),
    'chance': 1 / len(text),
    'per_class': per_class_accuracy(confusion),
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


def effective_rank(features, eps: float = 1e-7) -> float:
  """RankMe (Garrido et al., 2023, equation 1): exp of the entropy of the normalised singular values.

  Between 1 (all features on one line) and min(n, D) (isotropic). As in the paper, features are not centred.

  Args:
    features: [n, D]; a few thousand rows, and more rows than D, give a stable figure.
  """
  values = np.linalg.svd(_checked(features), compute_uv=False)
  p = values / max(values.sum(), np.finfo(np.float64).tiny) + eps
  return float(np.exp(-np.sum(p * np.log(p))))


def std(features) -> float:
  """Standard deviation of each dimension over the clips, averaged over the dimensions: 0 when collapsed."""
  return float(_checked(features).std(axis=0).mean())


def mean_cosine(features) -> float:
  """Mean cosine similarity of all pairs of different rows: 1 when collapsed."""
  x = _checked(features)
  if len(x) < 2:
    raise ValueError('the cosine of pairs needs at least two rows')
  unit = normalise(x)
  # The sum over all pairs is |sum of unit rows|^2, including each row with itself, which gives its squared norm.
  return float((np.sum(unit.sum(axis=0) ** 2) - np.sum(unit ** 2)) / (len(x) * (len(x) - 1)))


def statistics(features) -> dict:
  """[n, D] -> {'effective_rank', 'std', 'cosine'}; no cosine for a single clip, which has no pairs."""
  found = {'effective_rank': effective_rank(features), 'std': std(features)}
  return found | ({'cosine': mean_cosine(features)} if len(features) > 1 else {})


def _checked(features):
  x = np.asarray(features, np.float64)
  if x.ndim != 2 or not x.size or not np.isfinite(x).all():
    raise ValueError(f'features must be a finite, non-empty [n, D] array; got shape {x.shape}')
  return x
