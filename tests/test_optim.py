"""Optimizers and schedules, beside plain loops, optax's and torch's."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m2d_clap_jax.train.optim import FINE_TUNING, cosine_behind_warmup, make_optimizer, warmup_cosine

STEPS = 12
DRAW = np.random.default_rng(0)
PARAMS = {'kernel': DRAW.standard_normal((4, 3)).astype(np.float32), 'bias': np.ones(3, np.float32)}
# Falling, so that the largest second moment is not the newest.
GRADS = [{name: (0.7 ** i * DRAW.standard_normal(p.shape)).astype(np.float32) for name, p in PARAMS.items()}
         for i in range(STEPS)]
RATE = warmup_cosine(0.5, 3, STEPS, end=1e-7)


def ours(name, **options):
  return updated(FINE_TUNING[name](RATE, **options))[0]


def updated(tx):
  """Parameters and the optimizer's state after all updates."""
  params = jax.tree.map(jnp.asarray, PARAMS)
  state = tx.init(params)
  for grads in GRADS:
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return params, state


def check(name, expected, **options):
  for key, value in ours(name, **options).items():
    np.testing.assert_allclose(value, expected[key], rtol=2e-5, atol=2e-6, err_msg=key)


def plain(step):
  """Runs step(i, rate, params, grads, memory) -> params for each parameter by itself."""
  out = {}
  for name, p in PARAMS.items():
    p, memory = p.astype(np.float64), {}
    for i in range(STEPS):
      p = step(i, float(RATE(i)), p, GRADS[i][name].astype(np.float64), memory)
    out[name] = p
  return out


def sgd_step(i, rate, p, g, memory):
  memory['v'] = 0.9 * memory.get('v', 0) + g
  return p - rate * memory['v']


def lars_step(i, rate, p, g, memory):
  trust = 1.0
  if p.ndim > 1:
    trust = 0.02 * np.linalg.norm(p) / (np.linalg.norm(g) + 0.01 * np.linalg.norm(p))
    g = g + 0.01 * p
  memory['v'] = 0.9 * memory.get('v', 0) + rate * trust * g
  return p - memory['v']


def amsgrad_step(i, rate, p, g, memory):
  memory['m'] = 0.9 * memory.get('m', 0) + 0.1 * g
  memory['n'] = 0.95 * memory.get('n', 0) + 0.05 * g ** 2
  memory['x'] = np.maximum(memory.get('x', 0), memory['n'])
  p = p * (1 - rate * 1e-2)
  return p - rate * memory['m'] / (1 - 0.9 ** (i + 1)) / (np.sqrt(memory['x'] / (1 - 0.95 ** (i + 1))) + 1e-8)


def test_sgd_and_lars_as_it_ran_are_plain_momentum():
  check('sgd', plain(sgd_step))
  check('lars_as_run', plain(sgd_step))


def test_true_lars_adapts_matrices_and_leaves_biases():
  check('lars', plain(lars_step), weight_decay=0.01, trust_coefficient=0.02)
  assert np.abs(ours('lars')['kernel'] - ours('sgd')['kernel']).max() > 0.1  # also where nothing decays


def test_weight_decay_spares_the_temperature_biases_and_scales_and_not_tokens():
  params = {'logit_scale': jnp.float32(2.66), 'bias': jnp.ones(3), 'scale': jnp.ones(3), 'kernel': jnp.ones((3, 3)),
            'cls_token': jnp.ones((1, 1, 3))}
  tx = make_optimizer(lambda step: 0.1, weight_decay=0.05)
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  moved = {name for name, update in updates.items() if np.abs(update).max() > 0}
  assert moved == {'kernel', 'cls_token'}


def test_amsgrad_keeps_the_largest_moment_and_decays_everything():
  check('adamw_amsgrad', plain(amsgrad_step), weight_decay=1e-2)


@pytest.mark.parametrize('name, kind, options', [
    ('sgd', 'SGD', {'momentum': 0.9}),
    ('adamw_amsgrad', 'AdamW', {'betas': (0.9, 0.95), 'weight_decay': 1e-4, 'amsgrad': True})])
def test_the_same_as_torch(name, kind, options):
  import torch
  params = {key: torch.nn.Parameter(torch.tensor(value)) for key, value in PARAMS.items()}
  optimizer = getattr(torch.optim, kind)(params.values(), lr=1.0, **options)
  for i, grads in enumerate(GRADS):
    optimizer.param_groups[0]['lr'] = float(RATE(i))
    for key, value in grads.items():
      params[key].grad = torch.tensor(value)
    optimizer.step()
  check(name, {key: value.detach().numpy() for key, value in params.items()})


def test_the_rate_warms_up_from_zero_and_ends_where_told():
  schedule = warmup_cosine(2.0, 10, 110, end=1e-7)
  np.testing.assert_allclose([schedule(i) for i in (0, 5, 10, 60, 110)], [0, 1, 2, 1 + 5e-8, 1e-7], rtol=1e-5)
  assert float(warmup_cosine(2.0, 10, 110)(110)) == 0


@pytest.mark.parametrize('epochs, warmup, after', [(70, 15, 0.891), (200, 5, 0.998), (50, 5, 0.976)])
def test_the_rate_of_fine_tuning_drops_to_the_cosine_of_all_epochs_where_the_warm_up_ends(epochs, warmup, after):
  peak, per_epoch = 0.5, 40
  schedule = cosine_behind_warmup(peak, warmup * per_epoch, epochs * per_epoch, end=1e-7)
  assert float(schedule(0)) == 0 and float(schedule(warmup * per_epoch / 2)) == pytest.approx(peak / 2)
  assert float(schedule(warmup * per_epoch - 1)) == pytest.approx(peak * (1 - 1 / (warmup * per_epoch)))
  assert float(schedule(warmup * per_epoch)) == pytest.approx(after * peak, abs=5e-4 * peak)
  assert float(schedule(epochs * per_epoch / 2)) == pytest.approx((peak + 1e-7) / 2)
  assert float(schedule(epochs * per_epoch)) == pytest.approx(1e-7)


def test_pre_training_updates_as_optax_does_and_its_state_opens_as_optax_s():
  theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE, b1=0.9, b2=0.95, weight_decay=0.05,
                                                                   mask={'kernel': True, 'bias': False}))
  norms = [float(optax.tree.norm(grads)) for grads in GRADS]
  assert min(norms) < 1.0 < max(norms)  # some are clipped, some are not
  actual, expected = updated(make_optimizer(RATE, clip_norm=1.0)), updated(theirs)
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=2e-6, atol=1e-7), actual, expected)
