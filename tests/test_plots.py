"""Figures: written, of a size that keeps labels readable, and showing what they are given."""

import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

from m2d_clap_jax.audio import LogMel
from m2d_clap_jax.audio.logmel import mel_edges
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
                     'param_norm': (steps, np.full(300, np.nan))}, tmp_path / 'nan.png')
  read(tmp_path / 'nan.png')


def test_a_curve_that_another_one_covers_is_left_out(drawn):
  same, other = ([0, 9], [2.0, 1.0]), ([0, 9], [2.0, 1.5])
  plots.loss_curves({'loss': same, 'loss_clap': same}, 'x.png')
  plots.loss_curves({'loss': same, 'loss_clap': other, 'loss_m2d': other}, 'x.png')
  assert [len(fig.axes[0].get_lines()) for fig in drawn] == [1, 2]


def test_what_a_drawing_function_returns_is_the_path_and_in_a_notebook_the_figure(tmp_path):
  figure = plots.loss_curves({'loss': ([0, 9], [2.0, 1.0])}, tmp_path / 'x.png')
  assert figure == str(tmp_path / 'x.png') and figure._repr_png_() == (tmp_path / 'x.png').read_bytes()


def test_masked_patches_are_hidden_and_visible_ones_shown(drawn, tmp_path):
  grid, patch = (5, 13), (16, 16)
  logmel = np.random.default_rng(0).normal(size=(80, 211))
  mask = np.zeros(65)
  mask[13 * 2 + 4] = 1  # third row of patches, fifth column: the index runs through time first
  plots.masked_clip(logmel, mask, grid, patch, tmp_path / 'x.png', spec=LogMel(), title='t', captions=['word ' * 100])
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
  plots.masked_clip(rng.normal(size=(80, 608)), mask, grid, patch, tmp_path / 'clip.png', spec=LogMel(), captions=['a dog barks'])
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


@pytest.fixture
def drawn(monkeypatch):
  """The figures that are drawn, instead of their files."""
  figures = []
  monkeypatch.setattr(plots, 'save', lambda fig, path: figures.append(fig))
  return figures


def test_similarities_of_either_sign_have_colours_of_their_own_and_0_is_white(drawn):
  class_plots.similarity_map(np.array([[0.4, -0.1], [np.nan, 0.0]]), ['a', 'b'], ['a', 'b'], 'x.png', title='t')
  plots.frame_similarity(np.array([[1.0, 0.2], [0.2, 1.0]]), 0.32, 'x.png')
  for fig, limit in zip(drawn, (0.4, 1.0)):
    image = fig.axes[0].images[0]
    assert image.get_clim() == (-limit, limit)
    red, white, blue = (image.cmap(image.norm(value))[:3] for value in (limit, 0.0, -limit))
    assert red[0] > red[2] and blue[2] > blue[0] and min(white) > 0.9
  assert drawn[1].axes[0].images[0].get_extent() == [0, 0.32, 0, 0.32]


def test_bars_and_confusions_say_how_many_clips_they_count_and_bars_what_chance_gets(drawn, tmp_path):
  targets = np.eye(3)[[0, 0, 0, 1]]
  class_plots.draw_classes(tmp_path, ['dog', 'rain', 'bell'], targets, targets, multi_label=False, title='t')
  class_plots.draw_classes(tmp_path, ['dog', 'rain'], targets[:, :2], targets[:, :2], multi_label=True, title='t')
  confusion, bars, multi = (fig.axes[0] for fig in drawn)
  assert [text.get_text() for text in confusion.get_yticklabels()] == ['dog (3)', 'rain (1)', 'bell (0)']
  assert [text.get_text() for text in bars.get_yticklabels()] == ['dog (3)', 'rain (1)']
  assert confusion.get_title() == bars.get_title() == 't: accuracy 100.0%, chance 33.3%'
  assert multi.get_title() == 't: mAP 100.0%, chance 50.0%'
  for ax, chances in ((bars, [100 / 3] * 2), (multi, [75, 25])):
    lines, = ax.collections
    assert [line[0][0] for line in lines.get_segments()] == pytest.approx(chances)
    assert ax.get_xlabel().endswith('(lines: chance)')


def test_scores_over_training_have_the_line_of_chance_and_the_runs_name(drawn):
  history = {'a/accuracy': ([0, 9], [0.1, 0.7]), 'a/chance': ([0, 9], [0.025] * 2), 'b/mAP': ([0, 9], [0.2, 0.5]),
             'b/chance': ([0, 9], [0.3] * 2), 'loss': ([0, 9], [2, 1])}
  plots.loss_curves(history, 'x.png', title='demo')
  plots.compared_curves({'demo': history, 'other': history}, 'x.png')
  one, two = drawn
  scores = one.axes[1]
  assert one.get_suptitle() == 'demo' and sorted({line.get_ydata()[-1] for line in scores.get_lines()}) == [0.025, 0.3, 0.5, 0.7]
  assert [text.get_text() for text in scores.get_legend().get_texts()] == ['a accuracy', 'chance', 'b mAP']
  assert [text.get_text() for text in two.legends[0].get_texts()] == ['demo', 'other', 'chance']


def test_classes_in_a_map_of_embeddings_have_different_colours_and_there_are_no_axes(drawn):
  for count in (5, 40, 100):
    assert len(set(class_plots.class_colours(count))) == count
  features = np.random.default_rng(0).normal(size=(40, 8))
  class_plots.embedding_map(features, np.arange(40) % 8, [f'class {i}' for i in range(8)], 'x.png', title='t')
  ax, = drawn[0].axes
  assert not ax.axison and ax.get_title() == 't' and len(ax.collections) == 8
  assert len({(tuple(each.get_facecolor()[0])) for each in ax.collections}) == 8


def test_spectrograms_are_in_hertz_and_seconds_and_scores_beside_the_quoted_captions(drawn):
  spec = LogMel()
  logmel = np.random.default_rng(0).normal(size=(80, 608))
  plots.masked_clip(logmel, np.arange(190) % 3 > 0, (5, 38), (16, 16), 'x.png', spec=spec, captions=['a dog'], scores=[0.5])
  plots.log_mel(logmel, 'x.png', spec=spec)
  assert '“a dog”  0.50' in drawn[0].get_suptitle()
  for ax in (*drawn[0].axes[:2], drawn[1].axes[0]):
    assert ax.get_ylabel() == 'Hz' and ax.images[0].get_extent()[1] == pytest.approx(6.08)
    ticks = {int(text.get_text().replace(',', '')): place for text, place in zip(ax.get_yticklabels(), ax.get_yticks())}
    assert abs(mel_edges(spec)[1:-1][int(ticks[1000])] - 1000) < 40, 'at the bin whose filter has its top there'
    assert len(set(np.round(np.diff(ax.get_xticks()), 6))) == 1


def test_many_clips_get_one_label_a_class(drawn, tmp_path):
  labels = [name for name in ('flute', 'harp', 'tuba') for _ in range(50)]
  class_plots.similarity_map(np.zeros((150, 3)), labels, ['flute', 'harp', 'tuba'], tmp_path / 'x.png')
  assert [label.get_text() for label in drawn[0].axes[0].get_yticklabels()] == ['flute', 'harp', 'tuba']
  with pytest.raises(ValueError, match='150 rows and 2 columns'):
    class_plots.similarity_map(np.zeros((150, 3)), labels, ['a', 'b'], tmp_path / 'x.png')


def test_hundreds_of_classes_still_fit_on_one_page(drawn, tmp_path):
  names = [f'class {i}' for i in range(527)]
  class_plots.confusion_matrix(np.eye(527), names, tmp_path / 'x.png')
  width, height = drawn[0].get_size_inches()
  labels = drawn[0].axes[0].get_xticklabels()
  assert max(width, height) < 36 and width / len(labels) > 0.15 and labels[1].get_text() == 'class 3'


def test_plotting_leaves_pyplot_alone():
  code = 'import sys, m2d_clap_jax.eval.plots; assert not {"matplotlib.pyplot", "jax"} & set(sys.modules)'
  subprocess.run([sys.executable, '-c', code], check=True, env={'PYTHONPATH': ':'.join(sys.path)})
