"""The model, losses and update equal the authors' implementation in float32."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from m2d_clap_jax.models import M2DCLAP, SIZES
from m2d_clap_jax.models.masking import as_bool, num_visible, random_mask
from m2d_clap_jax.models.posemb import sincos_2d
from m2d_clap_jax.train.optim import linear_ramp, make_optimizer, warmup_cosine
from m2d_clap_jax.train.step import TrainState, apply_gradients, pretrain_loss
from m2d_clap_jax.weights.names import flax_path
from tests import reference

VARIANTS = {
    'm2d_clap_tiny': ('clap_tiny', dict(text_width=96)),
    'm2d_tiny': ('m2d_tiny', dict(text_width=None)),
    'msm_mae_tiny': ('msm_mae_tiny', dict(text_width=None, predict='pixels', mask_ratio=0.75)),
}


def tiny(variant):
  name, fields = VARIANTS[variant]
  return M2DCLAP(**{**reference.TINY, **fields}), *reference.parameters(name), reference.load(variant)


def batch_of(golden):
  batch = {'logmel': golden['lms'][:, 0]}
  return batch | ({'text': golden['text']} if 'text' in golden else {})


@functools.cache
def loss_and_gradients(variant):
  model, params, target, golden = tiny(variant)
  mask = random_mask(golden['noise'], int(golden['len_keep']))
  grads, metrics = jax.jit(jax.grad(functools.partial(pretrain_loss, model=model), has_aux=True))(
      params, target, batch_of(golden), mask)
  return traverse_util.flatten_dict(grads, sep='/'), metrics


def close(actual, expected, tolerance):
  """Relative to the norm of what is expected."""
  difference = np.linalg.norm(np.asarray(actual, np.float64) - expected)
  assert difference <= tolerance * np.linalg.norm(expected), f'{difference / np.linalg.norm(expected):.2e}'


def to_torch_layout(path, value, shape):
  return np.asarray(value).T.reshape(shape) if path.endswith('kernel') else np.asarray(value).reshape(shape)


@pytest.mark.parametrize('variant', VARIANTS)
def test_losses_equal_the_reference(variant):
  golden = reference.load(variant)
  _, metrics = loss_and_gradients(variant)
  for name in ('loss', 'loss_m2d', 'loss_clap'):
    if name in golden:
      np.testing.assert_allclose(metrics[name], golden[name], rtol=1e-5)


@pytest.mark.parametrize('variant', VARIANTS)
def test_every_gradient_norm_equals_the_reference(variant):
  golden = reference.load(variant)
  grads, _ = loss_and_gradients(variant)
  checked = set()
  total = np.sqrt(sum(golden[key] ** 2 for key in golden if key.startswith('gradnorm/')))
  for key in golden:
    kind, _, name = key.partition('/')
    if kind == 'gradnorm':
      _, path = flax_path(name)
      checked.add(path)
      # Key biases have no effect on softmax: their gradient is rounding noise inside the fused qkv bias.
      np.testing.assert_allclose(np.linalg.norm(grads[path]), golden[key], rtol=1e-4, atol=1e-6 * total, err_msg=name)
    if kind == 'grad':
      _, path = flax_path(name)
      close(to_torch_layout(path, grads[path], golden[key].shape), golden[key], 1e-4)
  assert checked == set(grads)


@pytest.mark.parametrize('variant', VARIANTS)
def test_predictions_equal_the_reference(variant):
  model, params, _, golden = tiny(variant)
  mask = random_mask(jnp.asarray(golden['noise']), int(golden['len_keep']))
  online = jax.jit(functools.partial(model.apply, method='online'))
  prediction = online({'params': params}, golden['lms'][:, 0], mask).prediction
  expected = golden['pred']
  if expected.shape[1] == model.num_patches:  # MSM-MAE's reference has the visible places, too
    expected = np.take_along_axis(expected, np.asarray(mask.masked)[:, :, None], axis=1)
  close(prediction, expected, 1e-4)


def test_mask_equals_the_reference():
  golden = reference.load('m2d_clap_tiny')
  mask = random_mask(jnp.asarray(golden['noise']), int(golden['len_keep']))
  np.testing.assert_array_equal(as_bool(mask), golden['mask'].astype(bool))
  np.testing.assert_array_equal(mask.restore, golden['ids_restore'])


@pytest.mark.parametrize('patches,ratio,visible', [(190, 0.7, 57), (190, 0.6, 76), (30, 0.75, 7), (30, 0.7, 9)])
def test_number_of_visible_patches(patches, ratio, visible):
  assert num_visible(patches, ratio) == visible


def test_position_table_equals_the_reference():
  head = reference.load('m2d_clap_base')['pos_embed_head']
  np.testing.assert_allclose(sincos_2d(768, (5, 38))[:len(head)], head, atol=1e-6)


def test_six_training_steps_equal_the_reference():
  model, params, target, golden = tiny('m2d_clap_tiny')
  t = {key[5:]: golden[key] for key in golden if key.startswith('traj/')}
  per_epoch, epochs = int(t['steps_per_epoch']), int(t['epochs'])
  schedule = warmup_cosine(float(t['base_lr']), per_epoch * int(t['warmup_epochs']), per_epoch * epochs)
  tx = make_optimizer(schedule)
  state = TrainState(jnp.zeros((), jnp.int32), params, target, tx.init(params), jax.random.key_data(jax.random.key(0)))
  step = jax.jit(functools.partial(apply_gradients, model=model, tx=tx,
                                   ema_schedule=linear_ramp(0.99995, 0.99999, per_epoch * epochs)))
  for i in range(per_epoch * epochs):
    np.testing.assert_allclose(schedule(i), t['lr'][i], rtol=1e-6, atol=1e-12)
    mask = random_mask(jnp.asarray(t['noise'][i]), int(golden['len_keep']))
    state, metrics = step(state, {'logmel': t['lms'][i][:, 0], 'text': t['text'][i]}, mask)
    for ours, theirs in {'loss': 'loss', 'loss_m2d': 'loss_m2d', 'loss_clap': 'loss_clap', 'grad_norm': 'gradnorm',
                         'logit_scale': 'logit_scale', 'ema_decay': 'ema_decay'}.items():
      np.testing.assert_allclose(metrics[ours], t[theirs][i], rtol=1e-4, err_msg=f'{ours}, step {i}')
  trees = {'params': state.params, 'target': state.target_params}
  trees = {name: traverse_util.flatten_dict(tree, sep='/') for name, tree in trees.items()}
  trees['tables'] = {name: sincos_2d(width, model.grid)[None] for name, width in
                     (('pos_embed', model.width), ('decoder_pos_embed', model.predictor_width))}
  for key in t:
    kind, _, name = key.partition('/')
    if kind in ('param', 'paramnorm') and name != 'norm_stats':  # which the input had gone through already
      tree, path = flax_path(name)
      value = trees[tree][path]
      if kind == 'param':
        close(to_torch_layout(path, value, t[key].shape), t[key], 1e-4)
      else:
        # Adam makes full steps of the rounding noise that key biases have for a gradient (softmax ignores them).
        tolerance = 1e-3 if name.endswith('qkv.bias') else 1e-4
        np.testing.assert_allclose(np.linalg.norm(value), t[key], rtol=tolerance, atol=1e-6, err_msg=name)


def test_base_losses_and_predictions_equal_the_reference():
  golden = reference.load('m2d_clap_base')
  logmel = np.random.default_rng(int(golden['lms_seed'])).standard_normal((3, 1, 80, 608)).astype(np.float32)
  np.testing.assert_array_equal(logmel[0, 0, :4, :4], golden['lms_head'])
  params, target = reference.parameters('m2d_clap_vit_base-80x608p16x16')
  model = M2DCLAP(**SIZES['base'], norm_stats=(0.0, 1.0))
  mask = random_mask(jnp.asarray(golden['noise']), int(golden['len_keep']))
  batch = {'logmel': logmel[:, 0], 'text': golden['text']}
  _, metrics = jax.jit(functools.partial(pretrain_loss, model=model))(params, target, batch, mask)
  for name in ('loss', 'loss_m2d', 'loss_clap'):
    np.testing.assert_allclose(metrics[name], golden[name], rtol=1e-5)
  online = jax.jit(functools.partial(model.apply, method='online'))
  prediction = online({'params': params}, batch['logmel'], mask).prediction
  head = golden['pred_head']
  close(prediction[:head.shape[0], :head.shape[1], :head.shape[2]], head, 1e-4)
