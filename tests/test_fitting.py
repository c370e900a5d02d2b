"""What an update may need of a device's memory decides what it keeps and in how many parts it computes a batch."""
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2d_clap_jax import sharding
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.models import M2DCLAP
from m2d_clap_jax.train import pretrain
from m2d_clap_jax.train.fitting import Given, Plan, fit, memory_of, plans
from m2d_clap_jax.train.optim import linear_ramp, make_optimizer, warmup_cosine
from m2d_clap_jax.train.step import create_state, pretrain_step

NETWORK = M2DCLAP(input_size=(80, 48), width=64, depth=2, heads=2, predictor_width=32, predictor_depth=1, predictor_heads=2,
                  text_width=None)
BATCH = {'logmel': np.random.default_rng(0).standard_normal((256, 80, 48)).astype(np.float16)}


def first(n, candidates):
  return list(itertools.islice(candidates, n))


def of_small_state(given, samples=8):
  return plans(given, devices=8, samples=samples, state=1, memory=100)


def test_the_fastest_plans_come_first_and_what_is_given_stays():
  assert first(4, of_small_state(Given())) == [Plan(1, 'cheap', 1), Plan(1, 'full', 1), Plan(1, 'cheap', 2), Plan(1, 'full', 2)]
  assert list(of_small_state(Given(2, 'none', 4))) == [Plan(2, 'none', 4)]
  assert [plan.accumulate for plan in of_small_state(Given(remat='cheap'), samples=12)] == [1, 2, 4]


@pytest.mark.parametrize('devices,state,tried', [
    (8, 10, [1]), (8, 30, [1, 2, 4]), (8, 90, [1, 2, 4, 8]), (12, 150, [2, 3, 4, 6, 12]), (4, 1000, [4]), (1, 1000, [1])])
def test_a_state_is_divided_over_as_few_devices_as_hold_it_and_no_further_than_helps(devices, state, tried):
  found = plans(Given(remat='cheap', accumulate=1), devices=devices, samples=8, state=state, memory=100)
  assert [plan.fsdp for plan in found] == tried


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
  need = memory_of(lowered(Plan(1, 'cheap', 2)).compile())
  taken, plan, line = fit(lowered, of_small_state(Given(remat='cheap')), need)
  assert memory_of(taken) == need and plan == Plan(1, 'cheap', 2) and 'fsdp=1, remat=cheap, accumulate=2' in line


FULL = 'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 37.03G of 15.75G hbm'


def test_a_compiler_that_runs_out_of_memory_is_asked_for_less():
  def lower(plan):
    return Failing(FULL) if plan.accumulate < 4 else lowered(plan)
  assert 'remat=cheap, accumulate=4' in fit(lower, of_small_state(Given()), 2 ** 30)[2]
  with pytest.raises(UserError, match=r'remat=none, accumulate=1: 37.0 GB\): lower config.batch_size'):
    fit(lower, of_small_state(Given(1, 'none', 1)), 2 ** 30)


def test_other_errors_of_the_compiler_are_not_taken_for_a_lack_of_memory():
  with pytest.raises(jax.errors.JaxRuntimeError, match='broken'):
    fit(lambda plan: Failing('INTERNAL: broken'), of_small_state(Given()), 2 ** 30)


@functools.cache
def losses(memory, given=Given()):
  """Of three updates on all devices of this memory, and what is reported of it."""
  tx = make_optimizer(warmup_cosine(1e-3, 0, 10))
  create = functools.partial(create_state, 0, model=NETWORK, tx=tx)
  step = functools.partial(pretrain_step, tx=tx, ema_schedule=linear_ramp(0.9, 0.99, 10))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'device_memory', lambda: memory)
    update, mesh, line = pretrain.fitted_update(step, NETWORK, {'m2d_weight': 1.0}, given, jax.eval_shape(create), lambda: BATCH)
  state = jax.jit(create, out_shardings=sharding.of_state(jax.eval_shape(create), mesh))()
  found = []
  for number in range(3):
    state, metrics = update(state, sharding.to_devices(mesh, BATCH), number)
    found.append(float(metrics['loss']))
  return found, line


def test_a_run_on_devices_that_report_little_memory_divides_its_state_and_then_its_batch_with_the_same_losses():
  plain, nothing = losses(None)
  assert nothing == ''
  for memory, given, plan in ((2 ** 30, Given(), 'fsdp=1, remat=cheap, accumulate=1'),
                              (13 * 2 ** 19, Given(), 'fsdp=[248], remat=cheap, accumulate=1'),
                              (5 * 2 ** 20, Given(fsdp=1, remat='cheap'), 'fsdp=1, remat=cheap, accumulate=[248]')):
    found, line = losses(memory, given)
    assert re.search(plan, line)
    np.testing.assert_allclose(found, plain, rtol=1e-5)
  with pytest.raises(UserError, match='does not fit into the 0.0 GB'):
    losses(2 ** 16, Given(1, 'cheap', 1))
