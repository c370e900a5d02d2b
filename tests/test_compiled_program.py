"""What the step sends between 256 devices, read from the program that the compiler makes for them."""
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
DEVICES, BATCH = 256, 512

# In a process of its own, because the number of devices is fixed once JAX has started. No size is another's.
PROGRAM = '''
import json, sys, jax
jax.config.update('jax_num_cpu_devices', {devices})
from benchmarks import scale
from m2d_clap_jax.models import M2DCLAP
model = M2DCLAP(input_size=(80, 48), width=64, depth=2, heads=2, predictor_width=32, predictor_depth=1,
                predictor_heads=2, text_width=16)
out = {{}}
for fsdp in (1, 8):
  compiled, shapes, mesh = scale.compile_step(model, {batch}, {devices}, fsdp)
  out[fsdp] = {{'operations': scale.collectives(compiled.as_text()), 'parameters': scale.count_parameters(shapes),
                'kernels': [list(x.shape) for tree in (shapes.params, shapes.target_params)
                            for x in jax.tree.leaves(tree) if x.ndim == 2]}}
json.dump(out, sys.stdout)
'''


@pytest.fixture(scope='module')
def programs():
  flags = [flag for flag in os.environ['XLA_FLAGS'].split() if 'device_count' not in flag]
  done = subprocess.run([sys.executable, '-c', PROGRAM.format(devices=DEVICES, batch=BATCH)], cwd=ROOT, check=True,
                        env={**os.environ, 'XLA_FLAGS': ' '.join(flags)}, stdout=subprocess.PIPE, text=True)
  return json.loads(done.stdout)


def results(program, name):
  return [tuple(shape) for kind, found in program['operations'] if kind == name for type_, shape in found
          if type_ in ('f32', 'bf16', 'f16')]


def size(shape):
  total = 1
  for n in shape:
    total *= n
  return total


def test_data_parallel_sends_contrastive_features_and_gradients_and_nothing_else(programs):
  program = programs['1']
  assert {kind for kind, _ in program['operations']} <= {'all-gather', 'all-reduce'}
  features, numbers, best = (64, BATCH), (BATCH,), (DEVICES, BATCH)  # best: each device's best clip of each caption
  gathered = results(program, 'all-gather')
  assert features in gathered or features[::-1] in gathered
  assert set(gathered) <= {features, features[::-1], numbers, best}, 'parameters or activations are gathered'
  reduced = sum(map(size, results(program, 'all-reduce')))
  # The gradients, each once; and the contrastive features' gradient.
  assert program['parameters'] <= reduced <= 1.02 * program['parameters'] + size(features) + 4 * BATCH


def test_fully_sharded_gathers_parameters_and_never_activations(programs):
  program = programs['8']
  assert {kind for kind, _ in program['operations']} <= {'all-gather', 'all-reduce', 'reduce-scatter'}
  kernels = {tuple(shape) for shape in program['kernels']}
  allowed = kernels | {shape[::-1] for shape in kernels} | {(64, BATCH), (BATCH, 64), (BATCH,), (DEVICES, BATCH)}
  others = [shape for shape in results(program, 'all-gather') if shape not in allowed]
  assert not others, others
