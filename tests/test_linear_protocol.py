"""The vectorised linear evaluation is the protocol's plain loop."""
import jax
import numpy as np
from sklearn.neural_network import MLPClassifier

from m2d_clap_jax.configs.linear import get_config
from m2d_clap_jax.eval import linear_protocol as protocol
from m2d_clap_jax.eval.linear_protocol import Problem, Protocol


def easy(n=240, classes=4, width=12, noise=1.0, seed=0):
  rng = np.random.default_rng(seed)
  centres = 2 * rng.standard_normal((classes, width))
  labels = np.arange(n) % classes
  x = centres[labels] + noise * rng.standard_normal((n, width))
  return (3 + 5 * x).astype(np.float32), np.eye(classes, dtype=np.float32)[labels]


def parts(n, seed=0, train=0.6, valid=0.2, run=0):
  order = np.random.default_rng(seed).permutation(n)
  a, b = int(train * n), int((train + valid) * n)
  return Problem(order[:a], order[a:b], order[b:], run=run)


def plain(features, targets, problem, *, seed, learning_rate, batch_size, max_epochs, patience, weight_decay=1e-8):
  """One problem in numpy, gradient by hand, Adam by hand; draws are the same as the real one's."""
  scaled_by = [*problem.train, *problem.valid] if problem.drawn else problem.train
  mean, deviation = features[scaled_by].mean(0), features[scaled_by].std(0)
  x = (features - mean) / deviation
  key = jax.random.key(seed)
  params = {k: np.asarray(v, np.float64) for k, v in protocol.initial(key, x.shape[1], targets.shape[1]).items()}
  m = dict.fromkeys(params, 0)
  v = dict.fromkeys(params, 0)
  t, best, best_params = 0, (-1, 0), None
  for epoch in range(1, max_epochs + 1):
    noise = np.asarray(jax.random.uniform(jax.random.fold_in(key, epoch), (len(problem.train),)))
    order = problem.train[np.argsort(noise)]
    for start in range(0, len(order), batch_size):
      rows = order[start:start + batch_size]
      logits = x[rows] @ params['kernel'].T + params['bias']
      p = np.exp(logits - logits.max(1, keepdims=True))
      p /= p.sum(1, keepdims=True)
      g = (p - targets[rows]) / (len(rows) * targets.shape[1])
      grads = {'kernel': g.T @ x[rows], 'bias': g.sum(0)}
      t += 1
      for k in params:
        grad = grads[k] + weight_decay * params[k]
        m[k] = 0.9 * m[k] + 0.1 * grad
        v[k] = 0.999 * v[k] + 0.001 * grad ** 2
        params[k] = params[k] - learning_rate * (m[k] / (1 - 0.9 ** t)) / (np.sqrt(v[k] / (1 - 0.999 ** t)) + 1e-8)
    logits = x[problem.valid] @ params['kernel'].T + params['bias']
    score = np.mean(logits.argmax(1) == targets[problem.valid].argmax(1))
    if score >= best[0]:
      best, best_params = (score, epoch), dict(params)
    elif epoch - best[1] >= patience:
      break
  return x[problem.test] @ best_params['kernel'].T + best_params['bias'], epoch, best[1]


OPTIONS = dict(learning_rate=3e-3, batch_size=32, max_epochs=40, patience=4)


def test_a_fold_equals_the_plain_loop():
  features, targets = easy(noise=4.0)
  problem = parts(len(features))
  outcome, = protocol.run(features, targets, [problem], seed=5, protocol=Protocol(**OPTIONS))
  scores, epochs, best = plain(features, targets, problem, seed=5, **OPTIONS)
  assert (outcome.epochs, outcome.best_epoch) == (epochs, best) and epochs < 40
  np.testing.assert_allclose(outcome.scores, scores, atol=2e-3)


def test_problems_side_by_side_equal_problems_alone():
  features, targets = easy(noise=4.0)
  problems = [parts(len(features), 0), parts(len(features), 1, train=0.3, run=1), parts(len(features), 2, run=2)]
  together = protocol.run(features, targets, problems, seed=7, protocol=Protocol(**OPTIONS))
  for i, problem in enumerate(problems):
    scores, epochs, best = plain(features, targets, problem, seed=7 + i, **OPTIONS)
    if len(problem.train) == len(problems[0].train):  # shuffles are drawn for the longest problem
      np.testing.assert_allclose(together[i].scores, scores, atol=2e-3)
    assert together[i].test_score > 0.4 and together[i].scores.shape == (len(problem.test), 4)


def test_the_score_is_that_of_logistic_regression_where_both_have_converged():
  from sklearn.linear_model import LogisticRegression
  from sklearn.preprocessing import StandardScaler
  features, targets = easy(n=3000, classes=6, noise=3.0)
  problem = parts(len(features))
  outcome, = protocol.run(features, targets, [problem], protocol=Protocol(learning_rate=1e-2, max_epochs=60, patience=60))
  labels = targets.argmax(1)
  scale = StandardScaler().fit(features[problem.train])
  model = LogisticRegression(C=1e4, max_iter=2000).fit(scale.transform(features[problem.train]), labels[problem.train])
  expected = model.score(scale.transform(features[problem.test]), labels[problem.test])
  assert abs(outcome.test_score - expected) <= 0.01


def test_a_tie_takes_the_later_epoch_and_patience_ends_the_run():
  features, targets = easy(noise=0.01)
  outcome, = protocol.run(features, targets, [parts(len(features))],
                          protocol=Protocol(learning_rate=1e-2, max_epochs=12, patience=3))
  assert outcome.test_score == 1 and outcome.best_epoch == outcome.epochs == 12


def test_several_labels_a_clip_are_scored_by_average_precision():
  features, targets = easy(n=400)
  targets = np.maximum(targets, np.roll(targets, 1, axis=1) * (np.arange(400) % 2)[:, None])
  outcome, = protocol.run(features, targets, [parts(400)], multi_label=True,
                          protocol=Protocol(learning_rate=1e-2, max_epochs=40))
  assert 0.85 < outcome.test_score <= 1


class Draws:
  """Counts the permutations that are asked for."""

  def __init__(self, seed=0):
    self.rng, self.count = np.random.default_rng(seed), 0

  def permutation(self, n):
    self.count += 1
    return self.rng.permutation(n)


def test_a_tenth_is_redrawn_until_it_has_every_class():
  _, targets = easy(n=400, classes=20)
  draws = Draws()
  train, valid = protocol.split_off_valid(targets, draws)
  assert 1 < draws.count < 100 and len(valid) == 40 and sorted([*train, *valid]) == list(range(400))
  assert targets[valid].any(0).all()


def test_a_single_clip_of_a_class_goes_to_the_tenth_as_it_is_that_which_must_have_every_class():
  targets = np.eye(2, dtype=np.float32)[[1] + [0] * 99]
  train, valid = protocol.split_off_valid(targets, np.random.default_rng(1))
  assert 0 in valid and 0 not in train


def test_a_hundred_draws_in_vain_are_the_last():
  draws = Draws()
  train, valid = protocol.split_off_valid(np.eye(30, dtype=np.float32)[np.arange(60) % 30], draws)
  assert draws.count == 100 and len(valid) == 6 and len(train) == 54


def test_features_are_standardised_by_the_training_clips_before_the_tenth_is_taken_out():
  features, targets = easy()
  rows = {'train': np.arange(160), 'valid': np.arange(160, 200), 'test': np.arange(200, 240)}
  settings = Protocol(runs=2, max_epochs=1)
  given = protocol.run(features, targets, protocol.problems_of(targets, [rows], 2, 42), protocol=settings)
  drawn = protocol.problems_of(targets, [rows | {'train': np.arange(200), 'valid': np.arange(0)}], 2, 42)
  assert [len(problem.valid) for problem in drawn] == [20, 20] and set(drawn[0].valid) != set(drawn[1].valid)
  for outcomes, scaled_by in ((given, 160), (protocol.run(features, targets, drawn, protocol=settings), 200)):
    for outcome in outcomes:
      np.testing.assert_allclose(outcome.mean, features[:scaled_by].mean(0), rtol=1e-5)
      np.testing.assert_allclose(outcome.deviation, features[:scaled_by].std(0), rtol=1e-5)


def test_three_runs_have_the_seeds_42_43_and_44_in_every_fold():
  features, targets = easy(noise=4.0)
  rows = {'train': np.arange(160), 'valid': np.arange(0), 'test': np.arange(160, 240)}
  problems = protocol.problems_of(targets, [rows, rows], Protocol().runs, protocol.SEED)
  both = protocol.run(features, targets, problems, protocol=Protocol(max_epochs=3))
  assert [problem.run for problem in problems] == [0, 1, 2, 0, 1, 2]
  for i, seed in enumerate((42, 43, 44)):
    np.testing.assert_array_equal(both[i].scores, both[3 + i].scores)
    problem, = protocol.problems_of(targets, [rows], 1, seed)
    alone, = protocol.run(features, targets, [problem], seed=seed, protocol=Protocol(max_epochs=3))
    np.testing.assert_allclose(both[i].scores, alone.scores, atol=1e-5)
    np.testing.assert_array_equal(problem.valid, problems[i].valid)


def test_the_defaults_everywhere_are_the_papers():
  expected = dict(runs=3, learning_rate=3e-5, weight_decay=1e-8, batch_size=200, max_epochs=200, patience=20)
  config = get_config()
  assert config.protocol.to_dict() == Protocol()._asdict() == expected and config.seed == 42


def test_cross_entropy_is_divided_by_the_number_of_classes():
  params = {'kernel': np.zeros((50, 3), np.float32), 'bias': np.zeros(50, np.float32)}
  found = protocol.loss(params, np.ones((4, 3)), np.eye(50)[:4], np.ones(4), multi_label=False)
  np.testing.assert_allclose(found, np.log(50) / 50, rtol=1e-6)


def test_constant_features_and_intervals():
  mean, deviation = protocol.scaler(np.array([[1, 2], [1, 4]], np.float32))
  np.testing.assert_array_equal(mean, [1, 3])
  np.testing.assert_array_equal(deviation, [1, 1])
  centre, width = protocol.mean_and_interval([0.5, 0.6, 0.7])
  np.testing.assert_allclose([centre, width], [0.6, 4.302653 * 0.1 / 3 ** 0.5], rtol=1e-6)
  assert np.isnan(protocol.mean_and_interval([0.5])[1])


def test_scores_are_those_of_scikit_learn_within_a_point():
  """scikit-learn's perceptron without a hidden layer, from the same start, stopped by the same rule, shuffles its own
  way."""
  features, targets = easy(n=2400, classes=12, width=24, noise=6.0)
  problems = protocol.problems_of(targets, [{'train': np.arange(1200), 'valid': np.arange(0), 'test': np.arange(
      1200, 2400)}], runs=3, seed=0)
  ours = protocol.run(features, targets, problems, seed=0, protocol=Protocol(learning_rate=3e-3, max_epochs=60, patience=10))
  labels = targets.argmax(axis=1)
  theirs = [by_scikit_learn(features, labels, problem, seed, learning_rate=3e-3, max_epochs=60, patience=10)
            for seed, problem in enumerate(problems)]
  assert 0.2 < np.mean(theirs) < 0.8  # neither chance, a twelfth, nor so easy that anything would do
  assert abs(np.mean(theirs) - np.mean([outcome.test_score for outcome in ours])) < 0.01


def by_scikit_learn(features, labels, problem, seed, *, learning_rate, max_epochs, patience) -> float:
  mean, deviation = protocol.scaler(features[problem.scaled_by])
  x, classes = (features - mean) / deviation, np.unique(labels)
  model = MLPClassifier(hidden_layer_sizes=(), alpha=1e-8, learning_rate_init=learning_rate, batch_size=200,
                        random_state=seed)
  model.partial_fit(x[:200], labels[:200], classes=classes)  # makes the arrays; then everything starts anew
  start = protocol.initial(jax.random.key(seed), x.shape[1], len(classes))
  model.coefs_[0][:], model.intercepts_[0][:] = np.asarray(start['kernel']).T, start['bias']
  model._optimizer.t = 0
  for moment in (*model._optimizer.ms, *model._optimizer.vs):
    moment[:] = 0
  best, since = (-1, None), 0
  while since < patience and model.t_ < max_epochs * len(problem.train):
    model.partial_fit(x[problem.train], labels[problem.train])
    score = model.score(x[problem.valid], labels[problem.valid])
    since = 0 if score >= best[0] else since + 1
    if not since:
      best = score, (x[problem.test] @ model.coefs_[0] + model.intercepts_[0]).argmax(axis=1)
  return np.mean(best[1] == labels[problem.test])
