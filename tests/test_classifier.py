"""The fine-tuned model: its head beside torch's layers, its encoder beside the pre-trained one."""
import functools

import jax
import numpy as np
import pytest

from m2d_clap_jax.models import M2DCLAP
from m2d_clap_jax.models.classifier import BatchNorm, Classifier, position_table
from m2d_clap_jax.models.posemb import sincos_2d
from m2d_clap_jax.train.augment import structured_patchout

NETWORK = M2DCLAP(input_size=(80, 96), width=32, depth=2, heads=2, predictor_width=16, predictor_depth=1,
                  predictor_heads=2, text_width=8, norm_stats=(-5.0, 3.0))
DRAW = np.random.default_rng(0)
LOGMEL = DRAW.standard_normal((6, 80, 96)).astype(np.float32)


@functools.cache
def made(flat=False):
  model = Classifier(NETWORK, 3, flat=flat)
  variables = jax.jit(model.init)(jax.random.key(0), LOGMEL)
  return model, jax.tree.map(np.asarray, variables)


def test_parameters_are_the_encoders_and_the_heads():
  _, variables = made()
  params = variables['params']
  assert set(params) == {'network', 'head'} and set(params['network']) == {'patch_embed', 'cls_token', 'encoder'}
  assert params['head']['kernel'].shape == (5 * 32, 3) and not params['head']['bias'].any()
  assert 0.008 < params['head']['kernel'].std() < 0.012
  assert variables['batch_stats']['head_norm']['mean'].shape == (160,)
  assert made(flat=True)[1]['params']['head']['kernel'].shape == (32, 3)


@pytest.mark.parametrize('flat', [False, True])
def test_logits_are_of_the_encoders_mean_features(flat):
  model, variables = made(flat)
  raw = LOGMEL * 3.0 - 5.0
  encoder = NETWORK.clone(text_width=None)
  z = jax.jit(functools.partial(encoder.apply, method='encode'))({'params': variables['params']['network']}, raw)
  features = z.mean(axis=1) if flat else NETWORK.frames(z).mean(axis=1)
  mean, var = DRAW.standard_normal(features.shape[1]), DRAW.uniform(0.5, 2, features.shape[1])
  variables = variables | {'batch_stats': {'head_norm': {'mean': mean, 'var': var}}}
  head = variables['params']['head']
  expected = (features - mean) / np.sqrt(var + 1e-5) @ head['kernel'] + head['bias']
  np.testing.assert_allclose(jax.jit(model.apply)(variables, LOGMEL), expected, atol=1e-5)


def test_batch_norm_is_torchs():
  import torch
  norm, theirs = BatchNorm(), torch.nn.BatchNorm1d(7, affine=False)
  variables = norm.init(jax.random.key(0), np.zeros((2, 7), np.float32), True)
  for _ in range(3):
    x = DRAW.normal(2, 3, (5, 7)).astype(np.float32)
    y, variables = norm.apply(variables, x, True, mutable=['batch_stats'])
    np.testing.assert_allclose(y, theirs(torch.tensor(x)), atol=1e-5)
  stats = variables['batch_stats']
  np.testing.assert_allclose(stats['mean'], theirs.running_mean, rtol=1e-5)
  np.testing.assert_allclose(stats['var'], theirs.running_var, rtol=1e-5)
  np.testing.assert_allclose(norm.apply(variables, x, False), theirs.eval()(torch.tensor(x)), atol=1e-5)


def test_patches_that_are_left_out_do_not_matter():
  model, variables = made(flat=True)
  keep = structured_patchout(jax.random.key(1), 6, (5, 6), (1, 2))
  seen = np.zeros((6, 30), bool)
  np.put_along_axis(seen, np.asarray(keep), True, axis=1)
  pixels = np.kron(seen.reshape(6, 5, 6), np.ones((16, 16), bool))
  apply = jax.jit(model.apply)
  before, after = apply(variables, LOGMEL, keep), apply(variables, np.where(pixels, LOGMEL, 100.0), keep)
  np.testing.assert_array_equal(before, after)
  assert np.abs(apply(variables, LOGMEL + np.float32(0.5), keep) - before).max() > 1e-3
  everything = np.tile(np.arange(30), (6, 1))
  np.testing.assert_allclose(apply(variables, LOGMEL, everything), apply(variables, LOGMEL), atol=1e-6)
  with pytest.raises(ValueError, match='flat=True'):
    made()[0].apply(made()[1], LOGMEL, keep)


def test_positions_are_cut_for_short_inputs():
  np.testing.assert_array_equal(position_table(NETWORK, 4)[0], sincos_2d(32, (5, 4)))
  np.testing.assert_array_equal(position_table(NETWORK, 6)[0], sincos_2d(32, (5, 6)))


@pytest.mark.parametrize('columns', [51, 62])
def test_positions_are_stretched_as_timm_stretches_them(columns):
  import torch
  own = DRAW.standard_normal((1, 191, 32)).astype(np.float32)
  long = position_table(NETWORK.clone(input_size=(80, 608)), columns, own)
  assert long.shape == (1, 1 + 5 * columns, 32)
  np.testing.assert_array_equal(long[:, 0], own[:, 0])
  patches = torch.tensor(own[:, 1:].reshape(1, 5, 38, 32)).permute(0, 3, 1, 2)
  smooth, rough = (torch.nn.functional.interpolate(patches, (5, columns), mode='bicubic', align_corners=False,
                                                   antialias=on)[0].permute(1, 2, 0).numpy() for on in (True, False))
  found = long[0, 1:].reshape(5, columns, 32)
  np.testing.assert_allclose(found, smooth, atol=1e-5)
  assert np.abs(found - rough).max() > 0.05  # torch has another kernel without antialiasing


def test_a_table_is_used_where_there_is_one():
  model, variables = made()
  table = position_table(NETWORK, 6)
  apply = jax.jit(model.apply)
  same = apply(variables | {'tables': {'network': {'pos_embed': table}}}, LOGMEL)
  np.testing.assert_allclose(same, apply(variables, LOGMEL), atol=1e-6)
  other = apply(variables | {'tables': {'network': {'pos_embed': 2 * table}}}, LOGMEL)
  assert np.abs(other - same).max() > 1e-3
