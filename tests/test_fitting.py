"""What an update may need of a device's memory decides what it keeps and in how many parts it computes a batch."""
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2d_clap_jax import sharding
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.models import M2DCLAP
from m2d_clap_jax.train import pretrain
from m2d_clap_jax.train.fitting import Plan, fit, memory_of, plans
from m2d_clap_jax.train.optim import linear_ramp, make_optimizer, warmup_cosine
from m2d_clap_jax.train.step import create_state, pretrain_step

NETWORK = M2DCLAP(input_size=(80, 48), width=64, depth=1, heads=2, predictor_width=32, predictor_depth=1, predictor_heads=2,
                  text_width=None)
BATCH = {'logmel': np.random.default_rng(0).standard_normal((64, 80, 48)).astype(np.float16)}


def first(n, candidates):
  return list(itertools.islice(candidates, n))


def test_the_fastest_plans_come_first_and_what_is_given_stays():
  assert first(4, plans(None, None, 8)) == [Plan('cheap', 1), Plan('full', 1), Plan('cheap', 2), Plan('full', 2)]
  assert list(plans('none', 4, 8)) == [Plan('none', 4)]
  assert [plan.accumulate for plan in plans('cheap', None, 12)] == [1, 2, 4], 'parts that do not divide the samples'


def lowered(plan):
  """Needs 4 MB, divided by the number of its parts."""
  return jax.jit(lambda x: jnp.sort(x)[::2]).lower(jax.ShapeDtypeStruct((2 ** 20 // plan.accumulate,), 'float32'))


class Failing:
  """A program whose compilation fails."""

  def __init__(self, message):
    self.message = message

  def compile(self):
    raise jax.errors.JaxRuntimeError(self.message)


def test_the_first_program_that_fits_is_taken_and_named():
  need = memory_of(lowered(Plan('cheap', 2)).compile())
  taken, line = fit(lowered, plans('cheap', None, 8), need)
  assert memory_of(taken) == need and 'remat=cheap, accumulate=2' in line


FULL = 'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 37.03G of 15.75G hbm'


def test_a_compiler_that_runs_out_of_memory_is_asked_for_less():
  def lower(plan):
    return Failing(FULL) if plan.accumulate < 4 else lowered(plan)
  assert 'remat=cheap, accumulate=4' in fit(lower, plans(None, None, 8), 2 ** 30)[1]
  with pytest.raises(UserError, match=r'remat=none, accumulate=1: 37.0 GB\): lower config.batch_size'):
    fit(lower, plans('none', 1, 8), 2 ** 30)


def test_other_errors_of_the_compiler_are_not_taken_for_a_lack_of_memory():
  with pytest.raises(jax.errors.JaxRuntimeError, match='broken'):
    fit(lambda plan: Failing('INTERNAL: broken'), plans(None, None, 8), 2 ** 30)


@functools.cache
def losses(memory, remat=None, **loss):
  """Of three updates on two devices of this memory, and what is reported of it."""
  tx = make_optimizer(warmup_cosine(1e-3, 0, 10))
  mesh = sharding.make_mesh(jax.devices()[:2])
  create = functools.partial(create_state, 0, model=NETWORK, tx=tx)
  step = functools.partial(pretrain_step, tx=tx, ema_schedule=linear_ramp(0.9, 0.99, 10))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'device_memory', lambda: memory)
    update, line = pretrain.fitted_update(step, NETWORK, {'m2d_weight': 1.0, **loss}, remat, jax.eval_shape(create),
                                          lambda: BATCH, mesh)
  state = jax.jit(create, out_shardings=sharding.of_state(jax.eval_shape(create), mesh))()
  found = []
  for number in range(3):
    state, metrics = update(state, sharding.to_devices(mesh, BATCH), number)
    found.append(float(metrics['loss']))
  return found, line


def test_a_run_on_devices_that_report_little_memory_computes_its_batch_in_parts_with_the_same_losses():
  plain, nothing = losses(None)
  assert nothing == ''
  roomy, line = losses(2 ** 30)
  assert 'accumulate=1' in line
  need = float(line.split('needs ')[1].split(' of')[0])
  assert need >= 0
  with pytest.raises(UserError, match='does not fit into the 0.0 GB'):
    losses(2 ** 16, 'full', accumulate=1)
  tight, line = losses(4 * 2 ** 20, 'cheap')
  assert 'accumulate=1' not in line
  np.testing.assert_allclose(roomy, plain, rtol=1e-5)
  np.testing.assert_allclose(tight, plain, rtol=1e-5)
