"""How a state is divided over devices changes where it lies, never what is computed; what is sent: test_compiled_program."""
import functools

import jax
import numpy as np
import pytest

from m2d_clap_jax import sharding
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.models import M2DCLAP, SIZES
from m2d_clap_jax.train.optim import linear_ramp, make_optimizer, warmup_cosine
from m2d_clap_jax.train.step import create_state, pretrain_step
from m2d_clap_jax.weights import expected_shapes

FIELDS = dict(input_size=(80, 48), width=64, depth=2, heads=2, predictor_width=32, predictor_depth=1,
              predictor_heads=2, text_width=16)
BATCH = 16
TX = make_optimizer(warmup_cosine(1e-2, 0, 100))


def compiled(devices=1, fsdp=1, model_options=None, **loss_options):
  """(state, shardings, compiled update, batch) of a small model on the first forced host devices."""
  model = M2DCLAP(**FIELDS, **(model_options or {}))
  mesh = sharding.make_mesh(jax.devices()[:devices], fsdp)
  create = functools.partial(create_state, 0, model=model, tx=TX)
  shardings = sharding.of_state(jax.eval_shape(create), mesh)
  state = jax.jit(create, out_shardings=shardings)()
  draw = np.random.default_rng(0)
  batch = sharding.to_devices(mesh, {
      'logmel': draw.standard_normal((BATCH, *model.input_size)).astype(np.float16),
      'text': draw.standard_normal((BATCH, model.text_width)).astype(np.float16)})
  step = functools.partial(pretrain_step, model=model, tx=TX, ema_schedule=linear_ramp(0.9, 0.99, 10), clap_weight=1.0,
                           gather=sharding.gather(mesh), **loss_options)
  update = jax.jit(step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)))
  return state, shardings, update.lower(state, batch).compile(), batch


def five_steps(**options):
  state, _, update, batch = compiled(**options)
  losses = []
  for _ in range(5):
    state, metrics = update(state, batch)
    losses.append([float(metrics[name]) for name in ('loss', 'loss_m2d', 'loss_clap')])
  return np.array(losses), jax.device_get((state.params, state.target_params))


@functools.cache
def alone():
  return five_steps()


@pytest.mark.parametrize('options', [
    dict(devices=8), dict(devices=8, fsdp=2), dict(devices=8, fsdp=8), dict(accumulate=4),
    dict(model_options={'remat': 'cheap'}), dict(devices=8, fsdp=4, model_options={'remat': 'full'}),
], ids=str)
def test_losses_and_parameters_after_five_steps_do_not_depend_on_the_layout(options):
  losses, trees = five_steps(**options)
  expected_losses, expected = alone()
  np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(trees), jax.tree.leaves(expected)):
    if 'qkv' in str(path) and a.ndim == 1:
      continue  # Adam makes full steps of the rounding noise that key biases have for a gradient
    assert np.linalg.norm(a - b) <= 1e-5 * max(1, np.linalg.norm(b)), jax.tree_util.keystr(path)


def test_the_state_is_made_divided_and_stays_so():
  state, shardings, update, batch = compiled(devices=8, fsdp=8)
  state, _ = update(state, batch)
  whole = parts = 0
  for leaf, sharding_ in zip(jax.tree.leaves(state), jax.tree.leaves(shardings)):
    assert leaf.sharding.is_equivalent_to(sharding_, leaf.ndim)
    whole += leaf.nbytes
    parts += leaf.addressable_shards[0].data.nbytes
  assert parts < 0.2 * whole  # 1/8, and the vectors
  kernel = state.opt_state[1][0].mu['encoder']['blocks_0']['mlp']['fc1']['kernel']
  assert kernel.sharding.shard_shape(kernel.shape) == (64, 32)


@pytest.mark.parametrize('size, devices, gigabytes, expected', [
    ('base', 8, 80, 1), ('large', 8, 16, 2), ('large', 8, 8, 4), ('large', 8, 1e-3, 8), ('base', 8, None, 1)])
def test_the_state_is_divided_over_as_few_devices_as_needed(size, devices, gigabytes, expected):
  parameters = sum(int(np.prod(shape)) for shape in expected_shapes(M2DCLAP(**SIZES[size]))['params'].values())
  memory = gigabytes and int(gigabytes * 2 ** 30)
  assert sharding.choose_fsdp(parameters, [jax.devices()[0]] * devices, memory) == expected


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
  with pytest.raises(UserError, match=r'config.mesh.fsdp=3 does not divide the 8 devices: choose one of \[1, 2, 4, 8\]'):
    sharding.make_mesh(jax.devices()[:8], 3)


def test_the_table_tells_the_bytes_of_a_device():
  create = functools.partial(create_state, 0, model=M2DCLAP(**FIELDS), tx=TX)
  shapes = jax.eval_shape(create)
  text = sharding.table(shapes, sharding.make_mesh(jax.devices()[:8], 8))
  assert 'optimizer' in text and 'fsdp=8' in text
  total = sum(float(line[34:47]) for line in text.splitlines()[1:])
  leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(sharding.of_state(shapes, sharding.make_mesh(fsdp=8))))
  assert abs(total - sum(4 * np.prod(s.shard_shape(x.shape)) for x, s in leaves) / 2 ** 20) < 0.3
