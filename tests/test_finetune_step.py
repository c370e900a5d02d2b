"""One fine-tuning update, what it may depend on, and what is exported of it."""
import dataclasses
import functools

import jax
import numpy as np
import pytest

import m2d_clap_jax
from m2d_clap_jax import sharding
from m2d_clap_jax.audio import LogMel
from m2d_clap_jax.configs.finetune import get_config
from m2d_clap_jax.models import M2DCLAP
from m2d_clap_jax.models.classifier import Classifier
from m2d_clap_jax.tasks.decoded import SCALE
from m2d_clap_jax.tasks.table import TASKS
from m2d_clap_jax.train import augment, task_data
from m2d_clap_jax.train.finetune_step import (
  Augmentation,
  Inputs,
  classification_loss,
  create_state,
  finetune_step,
  freezing,
  score,
)
from m2d_clap_jax.train.optim import FINE_TUNING
from m2d_clap_jax.weights import portable
from m2d_clap_jax.weights.run import classifier_weights

RATE = 16000
TINY = {'width': 32, 'depth': 1, 'heads': 2}
NETWORK = M2DCLAP(input_size=(80, 64), text_width=None, norm_stats=(-5.0, 3.0), **TINY)
INPUTS = Inputs(LogMel(), (-5.0, 3.0), (16, 16))
LENGTHS = np.full(16, 8000, np.int32)
WAVES = (3000 * np.random.default_rng(0).standard_normal((16, 8000))).astype(np.int16)
TARGETS = np.eye(3, dtype=np.float32)[np.arange(16) % 3]


def one_step(devices, fsdp=1, frozen=False):
  model = Classifier(NETWORK, 3, flat=True)
  tx = FINE_TUNING['adamw_amsgrad'](lambda _: 1e-2)
  tx = freezing(tx, 'patch_embed') if frozen else tx
  mesh = sharding.make_mesh(jax.devices()[:devices], fsdp)
  create = functools.partial(create_state, 0, model=model, tx=tx, shape=NETWORK.input_size)
  shardings = sharding.of_state(jax.eval_shape(create), mesh)
  state = jax.jit(create, out_shardings=shardings)()
  before = jax.device_get(state.params)
  step = functools.partial(
      finetune_step, model=model, tx=tx, inputs=INPUTS, multi_label=False, gather=sharding.gather(mesh),
      augmentation=Augmentation(mixup=0.3, spec_frequency=8, spec_time=8, resize_crop=True, patchout=0.5))
  update = jax.jit(step, donate_argnums=0, static_argnames='drop',
                   out_shardings=(shardings, sharding.replicated(mesh)))
  batch = {'waves': WAVES, 'lengths': LENGTHS, 'targets': TARGETS}
  state, metrics = update(state, sharding.to_devices(mesh, batch), {}, drop=(1, 1))
  return before, jax.device_get(state), {key: float(value) for key, value in metrics.items()}


@functools.cache
def alone():
  return one_step(1)


@pytest.mark.parametrize('devices, fsdp', [(8, 1), (8, 4)])
def test_one_step_does_not_depend_on_the_devices(devices, fsdp):
  _, state, metrics = one_step(devices, fsdp)
  _, expected, numbers = alone()
  assert metrics == pytest.approx(numbers, rel=1e-4)
  for name in ('mean', 'var'):
    np.testing.assert_allclose(state.stats['head_norm'][name], expected.stats['head_norm'][name], rtol=1e-4, atol=1e-6)
  # The first step of Adam is the sign of the gradient where that is more than rounding: moments tell more.
  for a, b in zip(jax.tree.leaves(state.opt_state[0].mu), jax.tree.leaves(expected.opt_state[0].mu)):
    np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max() + 1e-8)


def test_a_frozen_part_stays_also_under_weight_decay():
  before, state, _ = one_step(1, frozen=True)
  for leaf, old in zip(jax.tree.leaves(state.params['network']['patch_embed']),
                       jax.tree.leaves(before['network']['patch_embed'])):
    np.testing.assert_array_equal(leaf, old)
  assert np.abs(state.params['head']['kernel'] - before['head']['kernel']).max() > 1e-3


@pytest.mark.parametrize('flat, last_patch, size', [(False, 'pad', (80, 64)), (True, 'pad', (80, 64)),
                                                    (True, 'drop', (80, 51))])
def test_an_exported_classifier_has_the_same_logits(flat, last_patch, size, tmp_path):
  inputs = dataclasses.replace(INPUTS, last_patch=last_patch)
  columns = size[1] // 16
  assert inputs.size(8000) == size and inputs.grid(8000) == (5, columns)
  model = Classifier(NETWORK.clone(input_size=size), 3, flat=flat)
  variables = jax.jit(model.init)(jax.random.key(1), np.zeros((1, *size), np.float32))
  draw = np.random.default_rng(1)
  width = variables['params']['head']['kernel'].shape[0]
  stats = {'head_norm': {'mean': draw.standard_normal(width).astype(np.float32),
                         'var': draw.uniform(0.5, 2, width).astype(np.float32)}}
  table = np.asarray(draw.standard_normal((1, 1 + 5 * columns, 32)), np.float32)
  expected = jax.jit(functools.partial(score, model=model, inputs=inputs))(
      variables['params'], stats, {'network': {'pos_embed': table}}, WAVES, LENGTHS)
  found = classifier_weights(model, variables['params'], stats, table=table, sample_rate=RATE, classes=('a', 'b', 'c'))
  portable.save_portable(found, tmp_path)
  opened = m2d_clap_jax.load(tmp_path)
  assert opened.network.input_size == size
  logits = opened.logits(WAVES)
  assert np.abs(expected).max() > 0.02
  np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


def test_losses_are_averaged_over_batch_and_classes():
  draw = np.random.default_rng(0)
  logits, targets = (x.astype(np.float32) for x in (draw.standard_normal((4, 5)), draw.uniform(size=(4, 5))))
  probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  np.testing.assert_allclose(classification_loss(logits, targets, False),
                             -(targets * np.log(probabilities)).sum() / 20, rtol=1e-5)
  sigmoid = 1 / (1 + np.exp(-logits))
  np.testing.assert_allclose(classification_loss(logits, targets, True),
                             -(targets * np.log(sigmoid) + (1 - targets) * np.log(1 - sigmoid)).sum() / 20, rtol=1e-5)


@pytest.mark.parametrize('variant, frames, columns, width', [
    ('as2m', 1001, 62, 768), ('as20k', 1001, 62, 768), ('esc50', 501, 31, 768), ('spcv2', 101, 7, 768),
    ('vc1', 821, 51, 3840)])
def test_the_papers_settings_fit_the_base_model(variant, frames, columns, width):
  config = get_config(variant)
  samples = round(TASKS[config.task].seconds * RATE)
  inputs = Inputs(LogMel(), (-7.1, 4.2), (16, 16), config.last_patch)
  assert LogMel().num_frames(samples) == frames and inputs.grid(samples) == (5, columns)
  augmentation = task_data.make_augmentation(config.augmentation.to_dict())
  tx = task_data.optimizer_of(config.optim.to_dict())(lambda step: 0.1)
  assert config.model.dtype == 'float32' and inputs.size(samples) == (80, 112 if variant == 'spcv2' else frames)
  network = M2DCLAP(input_size=inputs.size(samples), text_width=None, dtype=config.model.dtype)
  model = Classifier(network, 10, flat=augmentation.patchout > 0)
  state = jax.eval_shape(functools.partial(create_state, 0, model=model, tx=tx, shape=network.input_size))
  assert state.params['head']['kernel'].shape == (width, 10)
  batch = {'waves': jax.ShapeDtypeStruct((4, samples), np.int16), 'targets': jax.ShapeDtypeStruct((4, 10), np.float32),
           'lengths': jax.ShapeDtypeStruct((4,), np.int32)}
  tables = {'network': {'pos_embed': jax.ShapeDtypeStruct((1, 1 + 5 * columns, 768), np.float32)}}
  step = functools.partial(finetune_step, model=model, tx=tx, inputs=inputs, augmentation=augmentation,
                           multi_label=config.task.startswith('as'),
                           drop=augment.patchout_counts((5, columns), augmentation.patchout, 0.5))
  after, metrics = jax.eval_shape(step, state, batch, tables)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
  assert metrics['loss'].shape == ()


def test_short_clips_are_padded_with_silence_or_with_logmels_of_0():
  waves = WAVES[:2].copy()
  lengths = np.array([5000, 8000], np.int32)
  waves[0, 5000:] = 0
  silent = np.asarray(INPUTS.logmels(waves, lengths))
  np.testing.assert_allclose(silent[0, :, 34:], np.log(1.1920929e-07), rtol=1e-5)
  zero = np.asarray(dataclasses.replace(INPUTS, zero_padded=True).logmels(waves, lengths))
  alone = LogMel().numpy(waves[0, :5000] / np.float32(SCALE))  # 32 frames
  np.testing.assert_allclose(zero[0, :, :32], alone, atol=1e-3)
  assert not zero[0, :, 32:].any() and np.abs(silent[0, :, 31] - alone[:, 31]).max() > 0.01
  np.testing.assert_array_equal(zero[1], silent[1])


def test_mixup_of_logmels_comes_after_their_padding_and_before_standardising():
  inputs = dataclasses.replace(INPUTS, zero_padded=True)
  waves, lengths = WAVES[:4].copy(), np.array([4000, 8000, 8000, 8000], np.int32)
  waves[0, 4000:] = 0
  x, targets, _ = Augmentation(mixup=0.5, mixup_on='logmel')(
      jax.random.key(5), {'waves': waves, 'lengths': lengths, 'targets': np.eye(4, dtype=np.float32)}, inputs, (0, 0))
  mixed = targets @ np.asarray(inputs.logmels(waves, lengths)).reshape(4, -1)
  np.testing.assert_allclose(x[:, :, :51].reshape(4, -1), (mixed + 5.0) / 3.0, atol=1e-3)
  assert np.count_nonzero(targets[:, 0]) == 2 and (np.asarray(x[:, :, 51:]) == 0).all()
