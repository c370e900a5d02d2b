"""The paper's linear evaluation: one linear layer on frozen features, all folds and runs at once (EVAR's protocol).

Alphabet: R problems (folds x runs) side by side, n clips, D features, C classes.

Features are standardised by the training clips' mean and deviation, including those then drawn for validation.
Adam (0.9, 0.999) with L2 in the gradient and a constant learning rate; early stopping by the validation score, where the
later epoch wins a tie. Cross-entropy is averaged over batch x classes, as in EVAR; binary cross-entropy for clips with
several labels.
"""
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from m2d_clap_jax.eval import metrics
from m2d_clap_jax.options import at_least_one, bind

SEED = 42  # of the first run; the following runs use 43, 44, ...
VALID_SHARE = 0.1  # of the training clips, where a task has no validation split
MOST_DRAWS = 100


class Protocol(NamedTuple):
  """The paper's settings by default. learning_rate: constant; weight_decay: added to the gradient, as in torch's
  Adam; batch_size: maximum, fewer clips make a single batch; patience: epochs without a score as good as the best
  after which a run stops."""
  runs: int = 3
  learning_rate: float = 3e-5
  weight_decay: float = 1e-8
  batch_size: int = 200
  max_epochs: int = 200
  patience: int = 20

  @classmethod
  def of(cls, options: Mapping, where: str) -> 'Protocol':
    """Makes one from a configuration; UserError for unknown keys and numbers below 1. where: as in `bind`."""
    protocol = bind(cls, options, where)()
    at_least_one(where, runs=protocol.runs, batch_size=protocol.batch_size, max_epochs=protocol.max_epochs,
                 patience=protocol.patience)
    return protocol


class Problem(NamedTuple):
  """Numbers of the clips of one fold and run: ints [n] into the features that all problems share.

  drawn: whether the validation clips were drawn from the training clips, so that they count in the standardisation;
  run: from 0.
  """
  train: np.ndarray
  valid: np.ndarray
  test: np.ndarray
  drawn: bool = False
  run: int = 0

  @property
  def scaled_by(self) -> np.ndarray:
    """The clips whose mean and deviation standardise all features."""
    return np.concatenate([self.train, self.valid]) if self.drawn else self.train


class ProblemData(NamedTuple):
  """The data of one problem: training clips [n], of which the first `count` are real, and their scaler [D]."""
  train: jax.Array
  count: jax.Array
  mean: jax.Array
  deviation: jax.Array


class Outcome(NamedTuple):
  """Result of one problem. scores: logits of the test clips [n, C]; epochs: number run; best_epoch: the one evaluated;
  kernel [D, C] and bias [C]: of the layer, on features minus `mean`, divided by `deviation`, both [D]."""
  test_score: float
  valid_score: float
  scores: np.ndarray
  epochs: int
  best_epoch: int
  kernel: np.ndarray
  bias: np.ndarray
  mean: np.ndarray
  deviation: np.ndarray


def scaler(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean and deviation [D] of training features [n, D], float32; 1 for the deviation of a constant feature."""
  mean, deviation = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
  deviation[deviation == 0] = 1
  return mean.astype(np.float32), deviation.astype(np.float32)


def split_off_valid(y: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
  """Numbers of (training, validation) clips: a tenth for validation, redrawn until that tenth has every class.

  After MOST_DRAWS failed draws, as with more classes than the tenth has clips, the last one is used.
  """
  size = max(1, round(VALID_SHARE * len(y)))
  present = y.any(axis=0)
  for _ in range(MOST_DRAWS):
    order = rng.permutation(len(y))
    train, valid = order[size:], order[:size]
    if (y[valid].any(axis=0) == present).all():
      break
  return np.sort(train), np.sort(valid)


def problems_of(targets: np.ndarray, splits: list[dict[str, np.ndarray]], runs: int, seed: int) -> list[Problem]:
  """`runs` problems of each split or fold in turn, {'train', 'valid', 'test'}: rows of `targets`.

  Without validation rows, each run draws its own from the training rows, with the seed it is trained with.
  """
  out = []
  for rows in splits:
    for number in range(runs):
      train, valid, drawn = rows['train'], rows['valid'], not len(rows['valid'])
      if drawn:
        train, valid = (train[part] for part in split_off_valid(targets[train], np.random.default_rng(seed + number)))
      out.append(Problem(train, valid, rows['test'], drawn, number))
  return out


def loss(params, x, y, weights, *, multi_label: bool):
  """Mean over clips (weights [n], 0 for padding) and classes."""
  logits = x @ params['kernel'].T + params['bias']
  if multi_label:
    each = optax.sigmoid_binary_cross_entropy(logits, y).mean(axis=1)
  else:
    each = -(y * jax.nn.log_softmax(logits)).sum(axis=1) / y.shape[1]
  return jnp.sum(each * weights) / jnp.maximum(weights.sum(), 1)


def initial(key, features: int, classes: int):
  """Uniform in +-1 / sqrt(D), as torch.nn.Linear. The kernel is [C, D], which makes its gradient twice as fast on CPU."""
  bound = features ** -0.5
  kernel, bias = jax.random.split(key)
  return {'kernel': jax.random.uniform(kernel, (classes, features), minval=-bound, maxval=bound),
          'bias': jax.random.uniform(bias, (classes,), minval=-bound, maxval=bound)}


def one_epoch(state, keys, data: ProblemData, x, y, *, tx, batch: int, ragged: bool, together: int, multi_label: bool):
  """Runs all batches of a shuffled epoch over each problem's training clips; the last batch may be smaller.

  Args:
    state: (parameters, optimizer state), R of each.
    ragged: some problems have fewer batches than others.
    together: how many problems' gradients are computed at a time: all on an accelerator, one on a CPU, where a batch of
      features should stay in the cache.
  """
  most = data.train.shape[1]
  steps = -(-most // batch)
  order = jax.vmap(functools.partial(shuffled, padding=steps * batch - most))(keys, data.train, data.count)

  def gradient(args):
    i, rows, params, problem = args
    weights = (i * batch + jnp.arange(batch) < problem.count).astype(jnp.float32)
    return jax.grad(loss)(params, (x[rows] - problem.mean) / problem.deviation, y[rows], weights, multi_label=multi_label)

  def step(state, i):
    params, opt_state = state
    rows = jax.lax.dynamic_slice_in_dim(order, i * batch, batch, axis=1)
    args = jnp.full(len(order), i), rows, params, data
    grads = jax.lax.map(gradient, args, batch_size=together)
    updates, after = jax.vmap(tx.update)(grads, opt_state, params)
    moved = optax.apply_updates(params, updates), after
    # A batch beyond a problem's clips is empty: nothing changes, not even Adam's moments.
    return select(i * batch < data.count, moved, state) if ragged else moved, None
  return jax.lax.scan(step, state, jnp.arange(steps))[0]


def shuffled(key, rows, count, *, padding: int):
  """The first `count` of `rows` [n] in a random order, then the others, then zeros."""
  noise = jnp.where(jnp.arange(len(rows)) < count, jax.random.uniform(key, rows.shape), 2.0)
  return jnp.pad(rows[jnp.argsort(noise)], (0, padding))


def select(mask, new, old):
  """Rows of the stacked tree `new` where `mask` [R] is true, else of `old`."""
  return jax.tree.map(lambda a, b: jnp.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old)


def logits_of(params, data: ProblemData, rows, x):
  """Logits [R, n, C] of clips `rows` [R, n], one problem at a time, since the features of all would not fit in memory."""
  def one(args):
    params, problem, rows = args
    return (x[rows] - problem.mean) / problem.deviation @ params['kernel'].T + params['bias']
  return jax.lax.map(one, (params, data, rows))


def run(features: np.ndarray, targets: np.ndarray, problems: list[Problem], *, seed: int = SEED, multi_label: bool = False,
        protocol: Protocol = Protocol(), progress=None) -> list[Outcome]:
  """Trains a linear layer on each problem, in parallel -> one Outcome each.

  Each result equals that of training the problem alone, up to rounding. Problems may have different numbers of clips.

  Args:
    features, targets: [N, D] and multi-hot [N, C] of all clips.
    seed: of run 0; run 1 has seed + 1, and so on, in every fold.
    progress: called with (epochs done, max_epochs).
  """
  tx = optax.chain(optax.add_decayed_weights(protocol.weight_decay), optax.adam(protocol.learning_rate))
  scalers = [scaler(features[p.scaled_by]) for p in problems]
  data = ProblemData(_stacked([p.train for p in problems]), np.array([len(p.train) for p in problems]),
             np.stack([mean for mean, _ in scalers]), np.stack([deviation for _, deviation in scalers]))
  batch = min(protocol.batch_size, int(data.count.max()))
  x, y = jnp.asarray(features, jnp.float32), jnp.asarray(targets, jnp.float32)
  keys = jax.vmap(jax.random.key)(seed + np.array([p.run for p in problems]))
  params = jax.vmap(lambda key: initial(key, x.shape[1], y.shape[1]))(keys)
  state = params, jax.vmap(tx.init)(params)
  epoch_of = jax.jit(functools.partial(
      one_epoch, tx=tx, batch=batch, ragged=len(set(-(-data.count // batch))) > 1, multi_label=multi_label,
      together=1 if jax.default_backend() == 'cpu' else len(problems)))
  logits = jax.jit(logits_of)

  def scored(params, name):
    rows = [getattr(problem, name) for problem in problems]
    scores = np.asarray(logits(params, data, _stacked(rows), x))
    return [values[:len(kept)] for values, kept in zip(scores, rows)]

  best, best_params = [(-1.0, 0)] * len(problems), params
  running, ended = np.ones(len(problems), bool), np.zeros(len(problems), int)
  for epoch in range(1, protocol.max_epochs + 1):
    state = epoch_of(state, jax.vmap(jax.random.fold_in, (0, None))(keys, epoch), data, x, y)
    better = np.zeros(len(problems), bool)
    for i, values in enumerate(scored(state[0], 'valid')):
      if not running[i]:
        continue
      score, ended[i] = score_of(values, targets[problems[i].valid], multi_label), epoch
      if score >= best[i][0]:
        best[i], better[i] = (score, epoch), True
      running[i] = epoch - best[i][1] < protocol.patience
    best_params = select(better, state[0], best_params)
    if progress:
      progress(epoch, protocol.max_epochs)
    if not running.any():
      break
  layers = zip(np.asarray(best_params['kernel']).swapaxes(1, 2), np.asarray(best_params['bias']), *zip(*scalers))
  return [
      Outcome(score_of(values, targets[problem.test], multi_label), score, values, int(end), best_epoch, *layer)
      for problem, values, (score, best_epoch), end, layer in zip(problems, scored(best_params, 'test'), best, ended,
                                                                  layers)]


def score_of(logits: np.ndarray, targets: np.ndarray, multi_label: bool) -> float:
  """Accuracy, or mean average precision with several labels a clip."""
  if multi_label:
    return metrics.mean_average_precision(targets, logits)
  return metrics.accuracy(logits.argmax(axis=1), targets.argmax(axis=1))


def mean_and_interval(values) -> tuple[float, float]:
  """Mean and half width of its 95% confidence interval (Student's t); NaN for the width of a single value."""
  values = np.asarray(values, np.float64)
  if len(values) < 2:
    return float(values.mean()), float('nan')
  from scipy.stats import t
  return float(values.mean()), float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)


def _stacked(arrays: list[np.ndarray]) -> np.ndarray:
  """R arrays [n_i, ...] -> [R, max n, ...], padded with zeros."""
  most = max(len(array) for array in arrays)
  return np.stack([np.pad(array, ((0, most - len(array)), *[(0, 0)] * (array.ndim - 1))) for array in arrays])
