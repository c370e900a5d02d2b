"""The benchmark of gradients that are summed in bfloat16."""
import json

import numpy as np
import pytest

from benchmarks import gradient_sums
from m2d_clap_jax.train import pretrain
from tests.test_pretrain import one_device, tiny_config  # noqa: F401


@pytest.mark.parametrize('count', [2, 3, 8, 21])
def test_sums_are_those_of_all_and_lose_what_bfloat16_loses(count):
  parts = np.random.default_rng(count).standard_normal((count, 1000)).astype(np.float32)
  sums = gradient_sums.Sums()
  for part in parts:
    sums.add(part)
  np.testing.assert_allclose(sums.exact, parts.astype(np.float64).sum(0))
  for total in (sums.ring, sums.pairs):
    assert 1e-4 < gradient_sums.error(total, sums.exact) < 0.02
    np.testing.assert_array_equal(total, gradient_sums.round_off(total))
  ones = gradient_sums.Sums()
  for _ in range(512):
    ones.add(np.ones(1, np.float32))
  assert (ones.exact, ones.ring, ones.pairs) == (512, 256, 512), 'where bfloat16 has no 257, a ring stays'


def test_a_run_is_measured_and_a_model_without_target_network_refused(data, tmp_path, one_device, capsys):  # noqa: F811
  pretrain.run(tiny_config(data, steps=2), tmp_path / 'run')
  gradient_sums.main([f'--run={tmp_path}/run', f'--data={data}', '--devices=4', '--batch=16', f'--out={tmp_path}/x.json'])
  rows = {row['figure']: row for row in json.loads((tmp_path / 'x.json').read_text())['rows']}
  assert 0 < rows['sums in bfloat16, in pairs']['value'] < 5
  assert rows['products in bfloat16']['value'] < rows['products in bfloat16']['ceiling']
  pixels = tiny_config(data, steps=1)
  pixels.model.update({'text_width': None, 'predict': 'pixels', 'mask_ratio': 0.75})
  pretrain.run(pixels, tmp_path / 'pixels')
  with pytest.raises(SystemExit):
    gradient_sums.main([f'--run={tmp_path}/pixels', f'--data={data}', '--devices=2', '--batch=4'])
  assert 'has no target network' in capsys.readouterr().err
