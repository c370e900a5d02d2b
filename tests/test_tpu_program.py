"""What a small update needs on a TPU v5e, as the TPU's compiler says, is pinned: memory and traffic of a sample.

When a change moves a figure on purpose, change it here and name it in the commit.
"""
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason="libtpu, the TPU's compiler, is not installed")
ROOT = pathlib.Path(__file__).parent.parent

# One block each, narrow, but with 256 samples a device, so that activations lie in the main memory as those of Base do.
UPDATE = ['--topology', 'v5e-8', '--batch', '2048', '--model', 'width=128', 'heads=2', 'depth=1',
          'predictor_width=128', 'predictor_heads=4', 'predictor_depth=1']
MOST = {'temporary memory': 0.1354, 'traffic of a sample': 0.00119}  # GB

# In a process of its own, without the flags that the other tests compile with. The kernel multiplies 64 matrices of
# 256 x 256 by themselves, in a loop of 7, and says what that costs.
PROGRAM = '''
import json, sys
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from benchmarks import tpu
from m2d_clap_jax.planning import machines
from m2d_clap_jax.planning.program import Program
tpu.main({update} + ['--out', {out!r}])

def square(x):
  def kernel(x, out):
    out[...] = jnp.dot(x[...], x[...], preferred_element_type=jnp.float32).astype(out.dtype)
  block = pl.BlockSpec((None, 256, 256), lambda i: (i, 0, 0))
  return pl.pallas_call(kernel, grid=(64,), in_specs=[block], out_specs=block, out_shape=jax.typeof(x),
                        cost_estimate=pl.CostEstimate(flops=1000, transcendentals=0, bytes_accessed=0))(x)
device = jax.sharding.SingleDeviceSharding(machines.devices(machines.find('v5e-8'))[0])
shape = jax.ShapeDtypeStruct((64, 256, 256), jnp.bfloat16, sharding=device)
def looped(x):
  return jax.lax.fori_loop(0, 7, lambda _, x: square(x), x)
program = Program(jax.jit(looped).lower(shape).compile().as_text())
calls = [(where, each, times) for where, each, times in program.steps() if each.operation == 'custom-call']
json.dump([sum(times * program.flops(where, each) for where, each, times in calls),
           sum(times * program.traffic(where, each) for where, each, times in program.steps())], sys.stdout)
'''


@pytest.fixture(scope='module')
def said(tmp_path_factory):
  """-> (rows of benchmarks.tpu, [FLOP of the looped kernel, bytes of traffic])."""
  out = tmp_path_factory.mktemp('tpu') / 'rows.json'
  done = subprocess.run([sys.executable, '-c', PROGRAM.format(update=UPDATE, out=str(out))], cwd=ROOT, capture_output=True,
                        env={name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}, text=True)
  assert done.returncode == 0, done.stderr
  return {row['figure'].strip(): row for row in json.loads(out.read_text())['rows']}, json.loads(done.stdout.splitlines()[-1])


def test_an_update_needs_no_more_memory_and_traffic_than_it_did(said):
  rows, _ = said
  for name, most in MOST.items():
    assert rows[name]['value'] <= 1.1 * most, f'{name}: {rows[name]["value"]:.4g} GB where {most:.4g} is pinned'


def test_its_products_are_those_of_the_method(said):
  assert 0.95 < said[0]['arithmetic of a sample']['ratio'] < 1.1


def test_a_kernel_counts_with_the_arithmetic_it_states_and_with_its_arrays(said):
  _, (flops, traffic) = said
  array = 64 * 256 * 256 * 2
  assert flops == 7 * 1000
  assert 2 * array <= traffic < 16 * array
