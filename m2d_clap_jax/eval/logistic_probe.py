"""A linear probe without tuning: logistic regression on frozen features."""

import numpy as np

from m2d_clap_jax.eval import metrics


def logistic_probe(train_x, train_y, test_x, test_y, C: float = 0.01, max_iter: int = 5000) -> dict:
  """Logistic regression (L2, inverse strength C) on features standardised by the training set's mean and deviation.

  The problem is convex and solved to convergence, so the result doesn't depend on a seed.

  Args:
    train_x, test_x: [n, D] features.
    train_y, test_y: [n] classes, int or str.

  Returns:
    accuracy and train_accuracy in 0..1, predictions [n test], converged (False: raise max_iter).
  """
  from sklearn.linear_model import LogisticRegression
  from sklearn.preprocessing import StandardScaler

  # A constant feature becomes zeros, not NaN: the scaler divides by 1 where the deviation is 0.
  scaler = StandardScaler().fit(np.asarray(train_x, np.float64))
  model = LogisticRegression(C=C, max_iter=max_iter)
  train_x = scaler.transform(np.asarray(train_x, np.float64))
  model.fit(train_x, np.asarray(train_y))
  predictions = model.predict(scaler.transform(np.asarray(test_x, np.float64)))
  return {
    'accuracy': metrics.accuracy(predictions, np.asarray(test_y)),
    'train_accuracy': metrics.accuracy(model.predict(train_x), np.asarray(train_y)),
    'predictions': predictions,
    'converged': bool(np.max(model.n_iter_) < max_iter),
  }
