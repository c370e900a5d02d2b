"""The benchmarks run and print what they promise; nothing here is timed."""
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import optax
import pytest

from benchmarks import compile, costs, encode, loader, parts, prepare, train_step
from benchmarks.report import Row, in_turns, table
from m2d_clap_jax.configs import pretrain
from m2d_clap_jax.models import M2DCLAP
from m2d_clap_jax.train.step import create_state

ROOT = pathlib.Path(__file__).parent.parent
TINY_MODEL = ['width=48', 'depth=1', 'predictor_width=48', 'predictor_depth=1', 'input_size=80,64']
TINY = ['--size', 'small_2s', '--model', *TINY_MODEL, '--batch', '2', '--steps', '1', '--matmul', '64']


def test_the_arithmetic_of_a_base_sample_is_83_8_gflop():
  flops = {name: f / 1e9 for name, f in train_step.sample_flops(M2DCLAP()).items()}
  assert flops['encoder'] == pytest.approx(10.0, abs=0.05)
  assert flops['target'] == pytest.approx(23.4, abs=0.05)
  assert flops['predictor'] == pytest.approx(10.1, abs=0.05)  # 10.3 if its last block computed the visible tokens, too
  assert flops['step'] == pytest.approx(83.8, abs=0.05)


def test_the_baselines_cost_what_is_left_of_it():
  flops = {name: train_step.parse(['--variant', name]).model for name in train_step.VARIANTS}
  flops = {name: train_step.sample_flops(model) for name, model in flops.items()}
  assert flops['clap']['step'] - flops['m2d']['step'] == 3 * 4 * 768 ** 2  # the audio projector
  assert flops['msm_mae']['target'] == 0 and flops['msm_mae']['step'] < flops['m2d']['step'] / 2


@pytest.mark.parametrize('options,variant', [
    ([], 'base'), (['--size', 'large'], 'large'), (['--variant', 'm2d'], 'm2d'), (['--variant', 'msm_mae'], 'msm_mae'),
    (['--size', 'small_2s'], 'small_2s')])
def test_the_models_are_those_of_the_configurations(options, variant):
  config = pretrain.get_config(variant).model.to_dict()
  del config['norm_stats'], config['remat']  # chosen when a run starts
  assert train_step.parse([*options, '--dtype', config['dtype']]).model == M2DCLAP(**config)


@pytest.mark.parametrize('variant', train_step.VARIANTS)
def test_train_step_prints_figures_beside_the_matrix_rate(variant, capsys, tmp_path):
  train_step.main([*TINY, '--variant', variant, '--out', str(tmp_path / 'x.json')])
  printed = capsys.readouterr().out
  for name in ('compile', 'step, median', "by the method's arithmetic", "by XLA's cost analysis", 'temporary memory',
               'float32 product of 64 x 64'):
    assert name in printed
  rows = {row['figure']: row for row in json.loads((tmp_path / 'x.json').read_text())['rows']}
  rate = rows["rate by the method's arithmetic"]
  assert rate['ratio'] == pytest.approx(rate['value'] / rate['ceiling'])
  counted, own = rows["rate by XLA's cost analysis"]['value'], rate['value']
  assert own < counted < 3 * own, 'the compiler counts the same products, and what is not a product'


def test_train_step_prints_the_kinds_of_instruction_that_take_longest(capsys, tmp_path):
  train_step.main([*TINY, '--profile', '3', '--out', str(tmp_path / 'x.json')])
  kinds = [row for row in json.loads((tmp_path / 'x.json').read_text())['rows'] if row['figure'].startswith('in ')]
  assert len(kinds) == 3 and sum(row['ratio'] for row in kinds) <= 1
  assert kinds[0]['value'] >= kinds[1]['value'] >= kinds[2]['value'] > 0


def test_train_step_runs_where_there_is_nothing_but_jax_flax_and_optax():
  blocked = ['tensorflow', 'tensorflow_datasets', 'transformers', 'torch', 'orbax', 'clu', 'ml_collections', 'librosa',
             'soundfile', 'soxr', 'scipy.signal', 'matplotlib', 'sklearn']
  program = (f'import sys\nfor name in {blocked}: sys.modules[name] = None\n'
             f'from benchmarks import train_step\ntrain_step.main({[*TINY, "--dtype", "bfloat16"]})')
  done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert 'bfloat16 product of 64 x 64' in done.stdout


@pytest.mark.parametrize('variant', train_step.VARIANTS)
def test_the_pytorch_network_has_as_many_parameters(variant):
  pytest.importorskip('timm', reason='the comparison with PyTorch has the blocks of timm')
  from benchmarks.torch_step import Network, transformer
  model = train_step.parse([*TINY, '--variant', variant]).model
  state = jax.eval_shape(functools.partial(create_state, 0, model=model, tx=optax.identity()))
  network, target = Network(model), transformer(model.width, model.depth, model.heads)
  pairs = [(state.params, network)] + ([(state.target_params, target)] if state.target_params else [])
  for ours, theirs in pairs:
    assert sum(x.size for x in jax.tree.leaves(ours)) == sum(p.numel() for p in theirs.parameters())


def test_train_step_prints_its_ratio_to_pytorch(capsys):
  pytest.importorskip('timm', reason='the comparison with PyTorch has the blocks of timm')
  train_step.main([*TINY, '--torch', '--onednn'])
  printed = capsys.readouterr().out
  assert 'PyTorch (eager) in the same run' in printed and "oneDNN's products in the same run" in printed
  assert 'the same by processor time' in printed


def test_parts_of_the_step_are_timed_beside_the_whole(capsys, tmp_path):
  parts.main([*TINY, '--out', str(tmp_path / 'x.json')])
  assert 'optimizer, EMA and norms' in capsys.readouterr().out
  rows = {row['figure']: row['value'] for row in json.loads((tmp_path / 'x.json').read_text())['rows']}
  assert {'loss', 'loss and gradients', *(f'step without {name}' for name in parts.WITHOUT)} <= set(rows)
  assert all(rows[name] > 0 for name in ('loss', 'loss and gradients', 'step'))


def test_what_a_step_is_compiled_without_is_left_out():
  args = train_step.parse(TINY)
  batch = train_step.make_batch(args.model, args.batch)

  def work(step):
    return step.compiled.cost_analysis()['transcendentals']

  def in_place():
    return [getattr(place, attribute) for place, attribute, _ in parts.WITHOUT.values()]
  whole, before = work(train_step.JaxStep(args.model, batch, burst=1)), in_place()
  assert all(work(step) < whole for step in parts.steps_without(args.model, batch).values())
  assert in_place() == before, 'and is there again afterwards'


def test_costs_grow_with_batch_and_clip_length(tmp_path):
  tiny = {**train_step.PRESETS['small_2s'], 'width': 48, 'depth': 1, 'predictor_width': 48, 'predictor_depth': 1}
  small, more, longer = (costs.cost({**tiny, 'input_size': (80, frames)}, batch, timed=False)
                         for frames, batch in ((64, 2), (64, 4), (128, 2)))
  for bigger in (more, longer):
    assert bigger.arithmetic >= 2 * small.arithmetic and bigger.flops > 1.5 * small.flops
    assert bigger.temporary > small.temporary
  costs.draw({what: {2: small, 4: row} for what, row in {'batch': more, 'seconds': longer}.items()}, tmp_path / 'x.png')
  assert (tmp_path / 'x.png').read_bytes()[:4] == b'\x89PNG'


def test_the_time_to_the_first_update_is_that_of_a_real_run(tmp_path):
  loader.write_records(tmp_path, 8)
  seconds = compile.start_seconds('small_2s', 8, 'float32', str(tmp_path), loader.WIDTH, str(tmp_path / 'cache'),
                                  str(tmp_path / 'run'), *(f'--config.model.{each}' for each in TINY_MODEL))
  assert json.loads((tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()[-1])['step'] == 1 and seconds > 0
  assert any((tmp_path / 'cache').iterdir())


@pytest.fixture
def shallow(monkeypatch):
  monkeypatch.setitem(encode.PRESETS, 'small_2s', {**encode.PRESETS['small_2s'], 'depth': 1})


def test_encode_prints_clips_a_second_beside_the_matrix_rate_and_pytorch(shallow, capsys, tmp_path):
  pytest.importorskip('timm', reason='the comparison with PyTorch has the blocks of timm')
  encode.main(['--size', 'small_2s', '--batch', '1', '2', '--rounds', '1', '--matmul', '64', '--torch', '--out',
               str(tmp_path / 'x.json')])
  printed = capsys.readouterr().out
  for name in ('clips at batch 2', 'ViT alone in PyTorch, in the same run', 'log-mel alone', 'peak growth of memory'):
    assert name in printed
  rows = [row for row in json.loads((tmp_path / 'x.json').read_text())['rows'] if row['figure'] == 'clips at batch 2']
  assert len(rows) == 2 and rows[0]['value'] == rows[1]['value'] and rows[0]['ceiling_is'].endswith('product of 64')


def test_encode_prints_its_ratio_to_the_exported_program(shallow, capsys):
  encode.main('--size small_2s --batch 2 --rounds 1 --matmul 64 --stablehlo'.split())
  assert 'the exported StableHLO program, in the same run' in capsys.readouterr().out


def test_the_benchmark_encodes_the_tokens_that_a_clip_has():
  model = encode.M2DCLAP(width=32, depth=1, heads=2, predictor_width=16, predictor_depth=1, predictor_heads=2)
  pipeline = encode.random_pipeline(model, 1)
  assert encode.token_counts(pipeline) == [1 + 5 * 38, 1 + 5 * 25], '1001 frames: 608, and 393 in 25 columns'
  frames, _ = pipeline.encode_frames(encode.np.zeros(160000, encode.np.float32))
  assert sum(encode.token_counts(pipeline)) == 2 + 5 * frames.shape[1]
  # Of Base: 2 * 3072 * 768 * 4 a token in the products of a block, and attention. By hand, for 191 and 126 tokens.
  base = encode.clip_flops(M2DCLAP(), [191, 126])
  assert base == pytest.approx(12 * 2 * 768 * (12 * 768 * 317 + 2 * (191 ** 2 + 126 ** 2)) + 2 * 315 * 256 * 768)


def test_encode_runs_without_tensorflow_orbax_and_transformers():
  blocked = ['tensorflow', 'tensorflow_datasets', 'transformers', 'orbax', 'clu', 'ml_collections']
  program = (f'import sys\nfor name in {blocked}: sys.modules[name] = None\nfrom benchmarks import encode\n'
             'encode.PRESETS["small_2s"]["depth"] = 1\n'
             'encode.main("--size small_2s --batch 1 --rounds 1 --matmul 64 --dtype bfloat16".split())\n'
             'assert "torch" not in sys.modules')
  done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert 'clips at batch 1' in done.stdout


def test_a_misspelt_field_of_the_model_is_named(capsys):
  with pytest.raises(SystemExit):
    train_step.main(['--model', 'widht=48'])
  assert "did you mean 'width'?" in capsys.readouterr().err


def test_loader_prints_figures_beside_both_ceilings(capsys):
  loader.main(['--clips', '32', '--batch', '8', '--steps', '6', '--rounds', '1'])
  printed = capsys.readouterr().out
  for name in ('records/s', 'tf.data, read and parse only', 'raw read of the files', 'peak growth of memory'):
    assert name in printed


def test_prepare_prints_figures_beside_both_ceilings(capsys):
  prepare.main(['--clips', '4', '--rounds', '1', '--workers', '2'])
  printed = capsys.readouterr().out
  for name in ('h/min', 'decode, resample and log-mel alone', 'decode alone', 'peak of a worker'):
    assert name in printed


def test_calls_are_timed_in_turns_after_the_warm_up():
  calls = []
  timings = in_turns({name: lambda name=name: calls.append(name) for name in 'ab'}, rounds=3, warm_up=2)
  assert ''.join(calls) == 'ababababab'
  assert len(timings['a'].seconds) == 3 and 0 <= timings['a'].best <= timings['a'].median


def test_a_row_without_a_ceiling_has_no_ratio():
  assert table([Row('step', 1234.5, 'ms'), Row('rate', 50, 'GFLOP/s', 200, 'product')]).splitlines()[1:] == [
      'step    1,234  ms',
      'rate       50  GFLOP/s      200   0.25  product']
