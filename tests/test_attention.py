"""The fused attention kernel computes what plain attention does; on a CPU it is interpreted. And transformers that compute
only some tokens compute what the whole ones do."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2d_clap_jax import sharding
from m2d_clap_jax.models.attention import fits, fused_attention
from m2d_clap_jax.models.masking import take
from m2d_clap_jax.models.vit import Attention, Transformer

WIDTH, HEADS = 256, 4


def inputs(length, dtype='float32', batch=3, width=WIDTH):
  draw = np.random.default_rng(length)
  qkv = jnp.asarray(draw.normal(size=(batch, length, 3 * width)), dtype)
  gradient = jnp.asarray(draw.normal(size=(batch, length, width)), dtype)
  valid = jnp.asarray(draw.random((batch, length)) < 0.6).at[:, 0].set(True)
  return qkv, gradient, valid


def plain(qkv, valid, heads):
  return Attention(heads, qkv.dtype)._plain(qkv, valid)


def both(function, qkv, gradient, valid, heads):
  """(result, gradient of the projections)."""
  out, back = jax.vjp(lambda qkv: function(qkv, valid, heads), qkv)
  return out, back(gradient)[0]


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('length', [1, 57, 58, 134, 191, 311])
def test_results_and_gradients_are_those_of_plain_attention(length, masked):
  qkv, gradient, valid = inputs(length)
  valid = valid if masked else None
  for ours, theirs in zip(both(fused_attention, qkv, gradient, valid, HEADS), both(plain, qkv, gradient, valid, HEADS)):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize('width, heads', [(384, 6), (128, 4), (128, 1)])
def test_heads_of_32_64_and_128_columns(width, heads):
  qkv, gradient, _ = inputs(20, width=width)
  for ours, theirs in zip(both(fused_attention, qkv, gradient, None, heads), both(plain, qkv, gradient, None, heads)):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_widths_without_whole_groups_of_heads_are_left_to_plain_attention():
  assert fits(768, 12) and fits(512, 16) and fits(1024, 16) and fits(384, 6)
  assert not fits(192, 3) and not fits(384, 4) and not fits(256, 1)


@pytest.mark.parametrize('length', [58, 191])
def test_in_bfloat16_the_error_is_no_larger_than_that_of_plain_attention(length):
  qkv, gradient, _ = inputs(length, 'bfloat16')
  exact = both(plain, qkv.astype('float32'), gradient.astype('float32'), None, HEADS)
  for ours, theirs, truth in zip(both(fused_attention, qkv, gradient, None, HEADS),
                                 both(plain, qkv, gradient, None, HEADS), exact):
    def error(x):
      return float(jnp.sqrt(jnp.mean(jnp.square(x.astype('float32') - truth))))  # noqa: B023
    assert error(ours) <= 1.1 * error(theirs)


def test_under_vmap():
  qkv, gradient, valid = (jnp.stack([x, x[::-1]]) for x in inputs(57))
  run = functools.partial(both, heads=HEADS)
  ours = jax.vmap(functools.partial(run, fused_attention))(qkv, gradient, valid)
  theirs = jax.vmap(functools.partial(run, plain))(qkv, gradient, valid)
  for a, b in zip(ours, theirs):
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize('masked', [False, True])
def test_each_device_computes_its_own_samples(masked):
  mesh = sharding.make_mesh(fsdp=2)
  arrays = inputs(57, batch=16)
  qkv, gradient, valid = (jax.device_put(x, sharding.over_batch(mesh)) for x in arrays)
  valid = valid if masked else None
  with jax.set_mesh(mesh):
    compiled = jax.jit(functools.partial(both, fused_attention, heads=HEADS)).lower(qkv, gradient, valid).compile()
  for ours, theirs in zip(compiled(qkv, gradient, valid), both(plain, *arrays[:2], arrays[2] if masked else None, HEADS)):
    assert ours.sharding.is_equivalent_to(sharding.over_batch(mesh), ours.ndim)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
  assert 'all-gather' not in compiled.as_text() and 'all-reduce' not in compiled.as_text()


@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
@pytest.mark.parametrize('remat', ['none', 'cheap', 'full'])
@pytest.mark.parametrize('masked', [False, True])
def test_the_last_block_computes_the_wanted_tokens_as_it_would_among_all(platform, remat, masked):
  model = Transformer(2, heads=4, remat=remat, platform=platform)  # 128 wide: the kernel takes it
  _, x, valid = inputs(23, width=128)
  valid = valid if masked else None
  wanted = jnp.asarray(np.stack([np.random.default_rng(i).permutation(23)[:16] for i in range(3)]))
  params = model.init(jax.random.key(0), x)

  @jax.jit
  def whole(params, x):
    return take(model.apply(params, x, valid), wanted)

  @jax.jit
  def part(params, x):
    return model.apply(params, x, valid, wanted)
  (theirs, back_theirs), (ours, back_ours) = (jax.vjp(function, params, x) for function in (whole, part))
  np.testing.assert_allclose(ours, theirs, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), back_ours(ours), back_theirs(ours))
