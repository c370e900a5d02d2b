"""Figures: written, of a size that keeps labels readable, and showing what they are given."""

import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

from m2d_clap_jax.eval import class_plots, plots


def curves(n=500):
  steps, rng = np.arange(n), np.random.default_rng(0)
  return {
    'train/loss_m2d': (steps, 1 + rng.random(n)), 'train/loss_clap': (steps, 4 - steps / n),
    'train/grad_norm': (steps, rng.random(n) + 0.1), 'train/learning_rate': (steps, steps / n),
    'train/ema_decay': (steps, steps / n), 'train/logit_scale': (steps, 14 + steps / n),
    'train/retrieval_audio_to_text': (steps, steps / n), 'train/samples_per_second': (steps, steps),
  }


def read(path):
  image = matplotlib.image.imread(str(path))
  assert image.ndim == 3 and image[..., :3].std() > 0.02  # something is drawn
  return image


@pytest.mark.filterwarnings('error')
def test_loss_curves_have_a_panel_for_each_kind(tmp_path):
  history = curves()
  plots.loss_curves(history, tmp_path / 'new' / 'all.png')
  plots.loss_curves({'loss': ([0, 10], [2.0, 1.0]), 'empty_loss': ([], [])}, tmp_path / 'one.png')
  everything, one = read(tmp_path / 'new' / 'all.png'), read(tmp_path / 'one.png')
  assert everything.shape[0] == 2 * one.shape[0] and everything.shape[1] == 3 * one.shape[1]  # six panels
  with pytest.raises(ValueError, match='nothing to draw'):
    plots.loss_curves({'samples_per_second': ([0], [1])}, tmp_path / 'none.png')


@pytest.mark.filterwarnings('error')
def test_loss_curves_survive_nan_and_zero(tmp_path):
  steps = np.arange(300)
  plots.loss_curves({'loss': (steps, np.where(steps > 250, np.nan, 1.0)), 'grad_norm': (steps, np.zeros(300)),
                     'update_norm': (steps, np.full(300, np.nan))}, tmp_path / 'nan.png')
  read(tmp_path / 'nan.png')


def test_masked_patches_are_hidden_and_visible_ones_shown(tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(plots, 'save', lambda fig, path: drawn.append(fig))
  grid, patch = (5, 13), (16, 16)
  logmel = np.random.default_rng(0).normal(size=(80, 211))
  mask = np.zeros(65)
  mask[13 * 2 + 4] = 1  # third row of patches, fifth column: the index runs through time first
  plots.masked_clip(logmel, mask, grid, patch, tmp_path / 'x.png', title='t', captions=['word ' * 100])
  above, below = (ax.images[0].get_array() for ax in drawn[0].axes[:2])
  assert not np.ma.getmaskarray(above).any()
  hidden = np.zeros((80, 208), bool)
  hidden[32:48, 64:80] = True
  np.testing.assert_array_equal(np.ma.getmaskarray(below), hidden)
  np.testing.assert_array_equal(below[~hidden], logmel[:, :208][~hidden])


@pytest.mark.parametrize('grid,patch', [((5, 38), (16, 16)), ((1, 304), (80, 2)), ((5, 50), (16, 4))])
def test_masked_clip_is_written_for_every_patch_shape(tmp_path, grid, patch):
  rng = np.random.default_rng(0)
  mask = rng.random(grid[0] * grid[1]) < 0.7
  plots.masked_clip(rng.normal(size=(80, 608)), mask, grid, patch, tmp_path / 'clip.png', captions=['a dog barks'])
  assert read(tmp_path / 'clip.png').shape[1] == 1080


@pytest.mark.parametrize('classes', [1, 2, 10, 40])
@pytest.mark.filterwarnings('error')
def test_maps_grow_with_their_classes(tmp_path, classes):
  names = [f'instrument number {i}' for i in range(classes)]
  matrix = np.eye(classes, dtype=int) * 3
  matrix[-1] = 0  # a class without clips
  class_plots.confusion_matrix(matrix, names, tmp_path / 'confusion.png', title='a title')
  similarity = np.random.default_rng(0).normal(size=(classes, classes))
  similarity[-1] = np.nan
  class_plots.similarity_map(similarity, names, names, tmp_path / 'similarity.png')
  for name in ('confusion', 'similarity'):
    height, width, _ = read(tmp_path / f'{name}.png').shape
    assert 400 < height < 5000 and 500 < width < 5000
    assert width >= 28 * classes  # pixels a label: 8 points need 14


def test_many_clips_get_one_label_a_class(tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(plots, 'save', lambda fig, path: drawn.append(fig))
  labels = [name for name in ('flute', 'harp', 'tuba') for _ in range(50)]
  class_plots.similarity_map(np.zeros((150, 3)), labels, ['flute', 'harp', 'tuba'], tmp_path / 'x.png')
  assert [label.get_text() for label in drawn[0].axes[0].get_yticklabels()] == ['flute', 'harp', 'tuba']
  with pytest.raises(ValueError, match='150 rows and 2 columns'):
    class_plots.similarity_map(np.zeros((150, 3)), labels, ['a', 'b'], tmp_path / 'x.png')


def test_hundreds_of_classes_still_fit_on_one_page(tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(plots, 'save', lambda fig, path: drawn.append(fig))
  names = [f'class {i}' for i in range(527)]
  class_plots.confusion_matrix(np.eye(527), names, tmp_path / 'x.png')
  width, height = drawn[0].get_size_inches()
  labels = drawn[0].axes[0].get_xticklabels()
  assert max(width, height) < 36 and width / len(labels) > 0.15 and labels[1].get_text() == 'class 3'


def test_plotting_leaves_pyplot_alone():
  code = 'import sys, m2d_clap_jax.eval.plots; assert not {"matplotlib.pyplot", "jax"} & set(sys.modules)'
  subprocess.run([sys.executable, '-c', code], check=True, env={'PYTHONPATH': ':'.join(sys.path)})
