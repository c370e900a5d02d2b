"""Reading compiled programs and describing machines; what the TPU's compiler says is in test_tpu_program."""
import sys

import jax
import jax.numpy as jnp
import pytest

from m2d_clap_jax.cli.main import main
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.planning import machines
from m2d_clap_jax.planning.program import Array, Program


def flops(function, *shapes):
  """By our reading of the program, and by XLA's analysis."""
  compiled = jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()
  program = Program(compiled.as_text())
  return sum(times * program.flops(where, each) for where, each, times in program.steps()), compiled.cost_analysis()['flops']


@pytest.mark.parametrize('options', [
    dict(window_strides=(1, 1), padding='VALID'), dict(window_strides=(2, 1), padding='SAME'),
    dict(window_strides=(1, 3), padding=((2, 1), (0, 4)), lhs_dilation=(2, 1), rhs_dilation=(1, 2))])
def test_flop_of_a_convolution_are_those_that_xla_counts(options):
  own, counted = flops(lambda x, k: jax.lax.conv_general_dilated(x, k, **options), (2, 3, 13, 17), (5, 3, 3, 4))
  assert own == pytest.approx(counted)


def test_a_loop_counts_as_often_as_it_runs():
  def looped(x, kernels):
    return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]
  own, _ = flops(looped, (8, 32), (7, 32, 32))
  assert own == 7 * 2 * 8 * 32 * 32


def test_traffic_of_a_loop_is_of_the_slices_it_reads_and_not_of_the_whole_stack():
  kernels = jax.ShapeDtypeStruct((50, 64, 64), jnp.float32)

  def looped(x, kernels):
    return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]
  program = Program(jax.jit(looped).lower(jax.ShapeDtypeStruct((4, 64), jnp.float32), kernels).compile().as_text())
  traffic = sum(times * program.traffic(where, each) for where, each, times in program.steps())
  whole = 4 * 50 * 64 * 64
  assert whole < traffic < 8 * whole, 'the stack once or a few times, where 50 times would be wrong'


def test_an_array_occupies_whole_tiles():
  assert Array('bf16', (64, 58), '1,0:T(8,128)(2,1)').bytes == 64 * 128 * 2
  assert Array('f32', (3, 191, 191), '1,2,0:T(8,128)').bytes == 3 * 192 * 256 * 4
  assert not Array('f32', (8, 128), '1,0:T(8,128)S(1)').in_main_memory


def test_machines_have_the_devices_that_cloud_tpu_sells_under_their_name():
  counts = {name: machines.find(name).devices for name in ('v5e-8', 'v5litepod-256', 'v5p-8', 'v5p-128', 'v6e-8')}
  assert counts == {'v5e-8': 8, 'v5litepod-256': 256, 'v5p-8': 4, 'v5p-128': 64, 'v6e-8': 8}
  with pytest.raises(UserError, match='--topology=v4-8: unknown; known are v5e-N'):
    machines.find('v4-8')


@pytest.mark.parametrize('options,words', [
    (['--topology=v5e-7'], 'known are v5e-N with N one of 4, 8'),
    (['--topology=v5e-256', '--batch=100'], '--batch=100: must be a multiple of the 256 devices'),
    (['--topology=v5e-8'], 'pip install "m2d-clap-jax[tpu-compile]"')])
def test_plan_says_in_one_line_what_is_wrong(options, words, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, 'libtpu', None)
  assert main(['plan', *options]) == 2
  said = capsys.readouterr().err
  assert words in said and said.count('\n') == 1
