"""Sums of bits by numpy, where arrays lie in the host's memory, are those of a device."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from m2d_clap_jax import sharding
from m2d_clap_jax.train import sums
from m2d_clap_jax.train.sums import bit_sums

VALUES = {
    'float32': jax.random.normal(jax.random.key(0), (16, 40)), 'bfloat16': jnp.linspace(-1, 1, 24).astype(jnp.bfloat16),
    'float16': jnp.linspace(-1, 1, 7).astype(jnp.float16), 'bool': jnp.array([True, False, True]),
    'int32': jnp.array(-5), 'empty': jnp.zeros((0, 3)), 'key': jax.random.key(7)}


@pytest.mark.parametrize('kind', VALUES)
def test_numpy_and_a_device_give_the_same_sum(kind, monkeypatch):
  here = bit_sums({kind: VALUES[kind]})
  monkeypatch.setattr(sums, '_on_host', lambda x: False)
  assert here == bit_sums({kind: VALUES[kind]})


def test_the_sum_does_not_depend_on_the_division():
  x = VALUES['float32']
  divided = jax.device_put(x, jax.sharding.NamedSharding(sharding.make_mesh(fsdp=4), PartitionSpec('fsdp')))
  assert bit_sums({'x': divided}) == bit_sums({'x': x}) == bit_sums({'x': np.asarray(x)})


def test_one_flipped_bit_changes_the_sum():
  x = np.asarray(VALUES['float32']).copy()
  before = bit_sums({'x': x})
  x.view(np.uint32)[3, 3] ^= 1 << 11
  assert bit_sums({'x': x}) != before
