"""Statistics of an encoder's features that tell a healthy representation from a collapsed one, without labels."""

import numpy as np


def effective_rank(features, eps: float = 1e-7) -> float:
  """RankMe (Garrido et al., 2023, equation 1): exp of the entropy of the normalised singular values.

  Between 1 (all features on one line) and min(n, D) (all directions alike). As there, the features are not centred.

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
  unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
  # The sum over all pairs is |sum of unit rows|^2, of which the rows with themselves are the squared norms.
  return float((np.sum(unit.sum(axis=0) ** 2) - np.sum(unit ** 2)) / (len(x) * (len(x) - 1)))


def statistics(features) -> dict:
  """[n, D] -> {'effective_rank', 'std', 'cosine'}; a single clip has no pairs, so no cosine."""
  found = {'effective_rank': effective_rank(features), 'std': std(features)}
  return found | ({'cosine': mean_cosine(features)} if len(features) > 1 else {})


def _checked(features):
  x = np.asarray(features, np.float64)
  if x.ndim != 2 or not x.size or not np.isfinite(x).all():
    raise ValueError(f'features must be a finite, non-empty [n, D] array; got shape {x.shape}')
  return x
