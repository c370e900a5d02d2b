"""What the update may see and what it changes."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2d_clap_jax import losses, sharding
from m2d_clap_jax.models import M2DCLAP, SIZES
from m2d_clap_jax.models.masking import as_bool, num_visible, random_mask
from m2d_clap_jax.train.optim import linear_ramp, make_optimizer, warmup_cosine
from m2d_clap_jax.train.step import contrast, create_state, draw_mask, pretrain_loss, pretrain_step
from tests import reference

TINY = {**reference.TINY, 'depth': 1, 'predictor_depth': 1, 'text_width': 32}
SCHEDULE = warmup_cosine(1e-2, 0, 100)


def setup(batch_size=8, **fields):
  model = M2DCLAP(**{**TINY, **fields})
  tx = make_optimizer(SCHEDULE)
  state = jax.jit(functools.partial(create_state, 0, model=model, tx=tx))()
  draw = np.random.default_rng(0)
  batch = {'logmel': draw.standard_normal((batch_size, *model.input_size)).astype(np.float16)}
  if model.text_width:
    batch['text'] = draw.standard_normal((batch_size, model.text_width)).astype(np.float16)
  step = jax.jit(functools.partial(pretrain_step, model=model, tx=tx, ema_schedule=linear_ramp(0.9, 0.99, 10)))
  return model, state, batch, step


def mask_of(model, batch_size=8):
  noise = jax.random.uniform(jax.random.key(1), (batch_size, model.num_patches))
  return random_mask(noise, num_visible(model.num_patches, model.mask_ratio))


def online(model, state):
  return functools.partial(jax.jit(functools.partial(model.apply, method='online')), {'params': state.params})


def replace_patches(model, logmel, chosen, value):
  """Overwrites the patches that `chosen` [B, N] marks."""
  f, t = model.grid
  pixels = np.kron(np.asarray(chosen).reshape(-1, f, t), np.ones(model.patch_size, bool))
  return np.where(pixels, value, logmel)


def test_masked_patches_never_reach_the_online_encoder():
  model, state, batch, _ = setup()
  mask = mask_of(model)
  hidden = replace_patches(model, batch['logmel'], as_bool(mask), 1e3)
  apply = online(model, state)
  before, after = apply(batch['logmel'], mask), apply(hidden, mask)
  np.testing.assert_array_equal(before.prediction, after.prediction)
  np.testing.assert_array_equal(before.audio, after.audio)
  seen = apply(replace_patches(model, batch['logmel'], ~as_bool(mask), 1e3), mask)
  assert np.abs(seen.audio - before.audio).max() > 1e-2


def test_visible_patches_never_reach_the_target_encoder():
  model, state, batch, _ = setup()
  mask = mask_of(model)
  hidden = replace_patches(model, batch['logmel'], ~as_bool(mask), 1e3)
  apply = online(model, state)
  np.testing.assert_array_equal(apply(batch['logmel'], mask).masked_tokens, apply(hidden, mask).masked_tokens)


def test_no_gradient_reaches_the_target_or_its_input():
  model, state, batch, _ = setup(text_width=None)
  loss = functools.partial(pretrain_loss, model=model)
  both = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
  (actual, grads), _ = both(state.params, state.target_params, batch, mask_of(model))
  assert all(not np.any(g) for g in jax.tree.leaves(grads))

  def with_fixed_target_input(params, fixed):
    # The online network under `params`, the target's tokens from `fixed`: equal gradients prove the stop-gradient.
    mask = mask_of(model)
    prediction = model.apply({'params': params}, batch['logmel'], mask, method='online').prediction
    tokens = model.apply({'params': fixed}, batch['logmel'], mask, method='online').masked_tokens
    target = model.transformer().apply({'params': state.target_params}, tokens)[:, 1:]
    return losses.m2d_loss(prediction, target)
  expected = jax.jit(jax.grad(with_fixed_target_input))(state.params, state.params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), actual, expected)


def test_update_moves_the_target_by_exactly_the_ema_rule():
  _, state, batch, step = setup()
  after, metrics = step(state, batch)
  decay = np.float32(0.9)
  np.testing.assert_allclose(metrics['ema_decay'], decay, rtol=1e-7)
  expected = jax.tree.map(lambda t, p: decay * t + (1 - decay) * p, state.target_params, after.params['encoder'])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), after.target_params, expected)
  moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), after.target_params, state.target_params)
  assert max(jax.tree.leaves(moved)) > 1e-3


def test_target_starts_from_its_own_initialisation():
  _, state, _, _ = setup()
  kernel = lambda tree: tree['blocks_0']['attn']['qkv']['kernel']
  assert jax.tree.structure(state.target_params) == jax.tree.structure(state.params['encoder'])
  assert np.abs(kernel(state.target_params) - kernel(state.params['encoder'])).max() > 0.01


def test_logit_scale_is_clipped_after_the_update():
  _, state, batch, step = setup()
  state = state.replace(params={**state.params, 'logit_scale': jnp.float32(7.0)})
  after, _ = step(state, batch)
  assert after.params['logit_scale'] == np.float32(4.6052)


@pytest.mark.parametrize('fields', [{}, {'text_width': None, 'predict': 'pixels'}])
def test_eight_devices_give_the_same_losses_and_gradients_as_one(fields):
  model, state, batch, _ = setup(batch_size=16, **fields)
  draw = functools.partial(draw_mask, model=model)

  def loss_and_grads(state, batch):
    mask = draw(state.rng, state.step, 16)
    grads, metrics = jax.grad(pretrain_loss, has_aux=True)(state.params, state.target_params, batch, mask, model=model,
                                                           **({'clap_weight': 1.0} if model.text_width else {}))
    return grads, metrics
  results = []
  for devices in (jax.devices()[:1], jax.devices()[:8]):
    mesh = sharding.make_mesh(devices)
    state_, batch_ = jax.device_put(state, sharding.replicated(mesh)), jax.device_put(batch, sharding.over_batch(mesh))
    results.append(jax.device_get(jax.jit(loss_and_grads)(state_, batch_)))
  (alone, one_metrics), (shared, eight_metrics) = results
  for name in one_metrics:
    np.testing.assert_allclose(one_metrics[name], eight_metrics[name], rtol=1e-5, err_msg=name)
  for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(shared)):
    assert np.linalg.norm(a - b) <= 1e-5 * max(np.linalg.norm(a), 1e-2)


def test_the_loss_of_a_folder_is_the_mean_over_its_pairs_on_any_number_of_devices():
  draw = np.random.default_rng(0)
  audio, text = draw.standard_normal((2, 16, 8)).astype(np.float32)
  folder = np.int32([0, 2] * 8)
  metrics = []
  for count in (1, 8):
    mesh = sharding.make_mesh(jax.devices()[:count])
    arrays = sharding.to_devices(mesh, (audio, text, folder))
    compute = jax.jit(lambda a, t, f: contrast(a, t, jnp.float32(2.0), {'folder': f}, ['few', 'none', 'many'])[1])
    metrics.append(jax.device_get(compute(*arrays)))
  similarity = np.exp(2) * (audio / np.linalg.norm(audio, axis=1)[:, None]) @ (text / np.linalg.norm(text, axis=1)[:, None]).T
  matching = np.diagonal(similarity)
  each = 0.5 * sum(np.log(np.exp(similarity).sum(axis)) - matching for axis in (0, 1))
  for found in metrics:
    np.testing.assert_allclose(found['loss_clap'], each.mean(), rtol=1e-5)
    np.testing.assert_allclose(found['loss_clap/few'], (each[::2].sum(), 8), rtol=1e-5)
    np.testing.assert_allclose(found['loss_clap/many'], (each[1::2].sum(), 8), rtol=1e-5)
    np.testing.assert_array_equal(found['loss_clap/none'], (0, 0))


def test_contrastive_gradient_is_that_of_the_whole_batch_not_the_shrunk_one_of_gathered_features():
  draw = np.random.default_rng(0)
  audio, text = draw.standard_normal((2, 8, 16)).astype(np.float32)
  loss = lambda a: losses.clip_loss(a, text, jnp.float32(2.0))[0]
  whole = jax.grad(loss)(audio)

  def rank(own, r):  # features of the other ranks gathered without gradient, as DistributedDataParallel runs do
    return loss(jax.lax.dynamic_update_slice(jax.lax.stop_gradient(audio), own, (2 * r, 0)))
  ranks = np.concatenate([jax.grad(rank)(audio[2 * r:2 * r + 2], r) for r in range(4)]) / 4
  np.testing.assert_allclose(whole, 4 * ranks, atol=1e-7)


@pytest.mark.parametrize('devices', [1, 8])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_contrastive_products_are_of_highest_precision_in_the_program_of_the_step(dtype, devices):
  model, state, batch, _ = setup(batch_size=24, dtype=dtype)
  mesh = sharding.make_mesh(jax.devices()[:devices])
  state, batch = jax.device_put(state, sharding.replicated(mesh)), jax.device_put(batch, sharding.over_batch(mesh))
  step = functools.partial(pretrain_step, model=model, tx=make_optimizer(SCHEDULE), ema_schedule=linear_ramp(0.9, 0.99, 10))
  products = [line for line in jax.jit(step).lower(state, batch).as_text().splitlines()
              if 'dot_general' in line and '24x24x' in line]  # 24 x 24 are the logits: nothing else has these sizes
  assert len(products) == 3  # logits, and the gradients of both sides
  for line in products:
    assert 'precision = [HIGHEST, HIGHEST]' in line and 'bf16' not in line, line


def test_accumulation_in_parts_changes_neither_losses_nor_gradients():
  model, state, batch, _ = setup(batch_size=16)
  mask = mask_of(model, 16)
  def run(accumulate):
    loss = functools.partial(pretrain_loss, model=model, clap_weight=1.0, accumulate=accumulate)
    return jax.jit(jax.grad(loss, has_aux=True))(state.params, state.target_params, batch, mask)
  whole, metrics = run(1)
  parts, metrics_in_parts = run(4)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), metrics, metrics_in_parts)
  scale = max(np.abs(g).max() for g in jax.tree.leaves(whole))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), whole, parts)


def test_bfloat16_keeps_parameters_averages_and_losses_in_float32_and_agrees_with_float32():
  _, state, batch, step = setup()
  _, _, _, step16 = setup(dtype='bfloat16')
  _, expected = step(state, batch)
  after, metrics = step16(state, batch)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((after.params, after.target_params, metrics)))
  np.testing.assert_allclose(metrics['loss'], expected['loss'], rtol=0.02)
  np.testing.assert_allclose(metrics['grad_norm'], expected['grad_norm'], rtol=0.1)


def test_a_new_mask_is_drawn_every_step_and_the_same_one_again_for_the_same_step():
  model, state, _, _ = setup()
  draw = lambda step: as_bool(draw_mask(state.rng, jnp.int32(step), 4, model=model))
  np.testing.assert_array_equal(draw(5), draw(5))
  assert (draw(5) != draw(6)).mean() > 0.1
  assert (draw(5)[0] != draw(5)[1]).any()
  assert (draw(5).sum(axis=1) == 21).all()


RELEASED = [((80, 608), (16, 16)), ((80, 1001), (16, 16)), ((80, 200), (16, 4)), ((80, 608), (80, 2))]


@pytest.mark.parametrize('size,input_size,patch_size',
                         [('base', *shape) for shape in RELEASED] + [(size, *RELEASED[0]) for size in SIZES])
def test_every_size_and_released_shape_makes_a_step(size, input_size, patch_size):
  model = M2DCLAP(**SIZES[size], input_size=input_size, patch_size=patch_size)
  tx = make_optimizer(SCHEDULE)
  state = jax.eval_shape(functools.partial(create_state, 0, model=model, tx=tx))
  batch = {'logmel': jax.ShapeDtypeStruct((4, *input_size), jnp.float16),
           'text': jax.ShapeDtypeStruct((4, 768), jnp.float32)}
  step = functools.partial(pretrain_step, model=model, tx=tx, ema_schedule=linear_ramp(0.9, 0.99, 10))
  after, _ = jax.eval_shape(step, state, batch)
  assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
