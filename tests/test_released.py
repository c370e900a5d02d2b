"""The authors' released files open, say what they are, run, and come out as they went in."""
import functools

import numpy as np
import pytest
import torch

import m2d_clap_jax
from m2d_clap_jax import weights
from m2d_clap_jax.weights import public
from tests import released_layouts
from tests.released_layouts import RELEASED
from tests.test_weights import same

DEPTH = 2  # blocks: two kinds of them are enough here, and twelve take a minute
LEFT_OUT = {'complete': ('offline_predictor.* (2)',), 'encoder': (), 'runtime': ('to_spec.* (4)',),
            'finetuned': ('to_spec.* (4)', 'module.head.norm.num_batches_tracked')}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('released')


@functools.cache
def file(name, folder):
  return released_layouts.write(name, folder, DEPTH)


@pytest.mark.parametrize('name', RELEASED)
def test_a_released_file_says_what_it_is_and_runs(name, folder, capsys):
  about = RELEASED[name]
  model = m2d_clap_jax.load(file(name, folder))
  network = model.network
  assert (network.input_size, network.patch_size, network.grid) == (about.input_size, about.patch, about.grid)
  assert (model.sample_rate, network.width, network.depth) == (about.sample_rate, 768, DEPTH)
  assert network.norm_stats == pytest.approx((-7.2618, 4.3512) if about.kind == 'runtime' else (-7.1, 4.2))
  encoder = model.weights.text_encoder
  assert (encoder and (encoder['name'], encoder['pooling'])) == about.text
  assert model.weights.complete == about.complete and bool(model.weights.text) == (about.kind == 'runtime')
  assert model.weights.default_logit_scale == (about.kind == 'finetuned' and about.text is not None)
  told = capsys.readouterr().err
  kinds = LEFT_OUT[about.kind] if about.kind != 'complete' or name.startswith(('m2d_as', 'm2d_s')) else ()
  assert told.count('\n') == bool(kinds) and all(kind in told for kind in kinds)
  wave = np.random.default_rng(0).standard_normal(about.sample_rate // 5).astype(np.float32)
  frames, _ = model.encode_frames(wave)
  assert frames.shape == (1, -(-21 // about.patch[1]), about.grid[0] * 768) and np.isfinite(frames).all()
  if about.text:
    assert model.encode_audio(wave).shape == (1, 768)
  if about.classes:
    assert model.logits(wave).shape == (1, about.classes)


@pytest.mark.parametrize('name', RELEASED)
def test_a_released_file_is_the_same_after_import_export_and_import(name, folder, tmp_path):
  first = weights.read(file(name, folder))
  exported = public.save_pth(first, tmp_path, 300)
  kind = 'm2d_clap' if RELEASED[name].text else 'm2d'
  # Such files have two layers of ViT-Base, which the authors' names do not list.
  assert exported.parent.name.startswith(f'{kind}_vit_w768d2-{name.split("-")[1]}-')
  again = weights.read(exported)
  for tree in first.trees:
    same(again.trees[tree], first.trees[tree])
  same(again.text, first.text)
  assert again.model == first.model and again.fingerprint == first.fingerprint
  assert (again.sample_rate, again.text_encoder) == (first.sample_rate, first.text_encoder)
  assert again.complete == first.complete and again.trees.keys() == first.trees.keys()
  # And in the file: names and bytes of the released one, but for what was left out.
  theirs, ours = state_dict(file(name, folder)), state_dict(exported)
  same(ours, {key: value for key, value in theirs.items() if key in ours})
  assert all(any(part in key for part in ('offline_predictor', 'to_spec', 'num_batches_tracked'))
             for key in set(theirs) - set(ours))


def state_dict(path):
  content = torch.load(path, weights_only=False)
  return {key: np.asarray(value) for key, value in content.get('model', content).items()}
