"""`m2d-clap plot` draws runs and attention, and attention is what the network computes."""
import json

import jax.numpy as jnp
import numpy as np

from m2d_clap_jax import api
from m2d_clap_jax.eval import attention
from tests.command_helpers import run, save_model, save_recordings
from tests.test_plots import read


def write_run(folder, scale):
  folder.mkdir()
  rows = [{'step': step, 'loss': scale / step, 'grad_norm': scale, 'samples_per_second': 1.0} for step in range(1, 30)]
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return folder


def test_curves_of_one_run_and_of_several(tmp_path, capsys):
  runs = [write_run(tmp_path / name, scale) for name, scale in (('a', 1.0), ('b', 2.0))]
  assert run('plot', runs[0], '-o', tmp_path / 'one') == 0 and run('plot', *runs, '-o', tmp_path / 'two') == 0
  one, two = (read(tmp_path / name)[..., :3] for name in ('one/a_curves.png', 'two/a+b_curves.png'))
  orange = [np.sum(np.abs(image - np.array([0xD5, 0x5E, 0]) / 255).max(axis=2) < 0.02) for image in (one, two)]
  assert orange[0] == 0 < orange[1], 'the second run is there, in the second colour'
  assert capsys.readouterr().out.splitlines()[0] == str(tmp_path / 'one' / 'a_curves.png')
  assert run('plot', tmp_path, '-o', tmp_path / 'none') == 2
  assert 'contains no metrics.jsonl' in capsys.readouterr().err


def test_attention_of_real_files_is_drawn_and_bad_ones_are_told(tmp_path, capsys):
  model, files = save_model(tmp_path / 'model'), save_recordings(tmp_path / 'audio')
  bad = tmp_path / 'audio' / 'more' / 'text.wav'
  assert run('plot', model, '--audio', *files[:2], files[0], bad, '-o', tmp_path / 'figures') == 0
  assert sorted(path.name for path in (tmp_path / 'figures').iterdir()) == [
      'model_a-2_attention.png', 'model_a_attention.png', 'model_b_attention.png'], 'one figure a file, also of equal names'
  for path in (tmp_path / 'figures').iterdir():
    read(path)
  assert 'text.wav' in capsys.readouterr().err
  assert run('plot', model, '--audio', bad, '-o', tmp_path / 'figures') == 2


def test_a_model_is_shown_by_sounds_in_folders_of_their_classes(tmp_path, capsys):
  sounds, out = tmp_path / 'sounds', tmp_path / 'figures'
  for name in ('dog', 'church_bell'):
    save_recordings(sounds / name)
  (sounds / 'stray.wav').write_bytes(b'of no class')
  assert run('plot', save_model(tmp_path / 'model'), '--classes', sounds, '-o', out) == 0
  printed = capsys.readouterr()
  names = [f'model_{kind}.png' for kind in ('embeddings', 'similarity', 'confusion', 'classes')]
  assert printed.out.split() == [str(out / name) for name in names]
  for name in names:
    read(out / name)
  assert printed.err.count('left out') == 5 and 'stray.wav: not in a sub-folder' in printed.err
  audio = save_model(tmp_path / 'audio_only', text_width=None)
  assert run('plot', audio, '--classes', sounds, '-o', tmp_path / 'fewer') == 0
  assert [path.name for path in (tmp_path / 'fewer').iterdir()] == ['audio_only_embeddings.png']
  for folder, words in ((sounds / 'dog' / 'more', 'has no sub-folders'), (tmp_path / 'none', 'no such folder')):
    assert run('plot', audio, '--classes', folder, '-o', out) == 2 and words in capsys.readouterr().err


def test_attention_is_that_of_the_network(tmp_path):
  pipeline = api.load(save_model(tmp_path / 'model'))
  wave = np.random.default_rng(0).standard_normal(24000).astype(np.float32) * 0.1
  logmel, shares = attention.cls_attention(pipeline, wave, 16000)
  depth, heads, rows, columns = shares.shape
  assert (depth, heads, rows) == (pipeline.network.depth, pipeline.network.heads, pipeline.network.grid[0])
  assert columns == logmel.shape[1] // pipeline.network.patch_size[1]
  assert (shares > 0).all() and (shares.sum(axis=(2, 3)) < 1).all()
  # The first block by hand: norm, qkv, softmax.
  params = pipeline.variables['params']
  tokens = pipeline.network.apply(pipeline.variables, logmel[None], method='embed')[0][0]
  block = params['encoder']['blocks_0']
  x = (tokens - tokens.mean(1, keepdims=True)) / jnp.sqrt(tokens.var(1, keepdims=True) + 1e-6)
  x = x * block['norm1']['scale'] + block['norm1']['bias']
  width = tokens.shape[1]
  qkv = x @ block['attn']['qkv']['kernel'] + block['attn']['qkv']['bias']
  for head in range(heads):
    part = slice(head * width // heads, (head + 1) * width // heads)
    scores = qkv[:, width:2 * width][:, part] @ qkv[0, :width][part] * (width // heads) ** -0.5
    weights = np.exp(scores - scores.max())
    np.testing.assert_allclose(shares[0, head].ravel(), (weights / weights.sum())[1:], rtol=1e-3, atol=1e-6)
