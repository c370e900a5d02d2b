"""Augmentation beside slow loops, and what no draw may break."""
import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2d_clap_jax.train import augment

B, F, T = 64, 80, 101
KEY = jax.random.key(0)
LOGMELS = np.random.default_rng(0).standard_normal((B, F, T)).astype(np.float32)


def test_mixup_mixes_samples_and_targets_in_the_same_proportion():
  waves = np.eye(B, 500, dtype=np.float32)  # sample i is 1 at place i: the result tells who was mixed, and how much
  targets = np.eye(B, dtype=np.float32)
  x, y = jax.jit(functools.partial(augment.mixup, alpha=0.3))(KEY, waves, targets)
  np.testing.assert_allclose(x[:, :B], y, atol=1e-6)
  np.testing.assert_allclose(y.sum(axis=1), 1, atol=1e-5)
  own = np.diag(y)
  assert (np.count_nonzero(np.asarray(y) > 0, axis=1) <= 2).all() and len(np.unique(own)) > B // 2
  partners = np.argmax(np.asarray(y) - np.diag(own), axis=1)[own < 0.999]
  assert len(partners) == len(set(partners))  # a permutation: nobody is taken twice


@pytest.mark.parametrize('alpha', [0.3, 0.5])
def test_proportions_are_of_the_beta_distribution(alpha):
  n = 4000
  _, y = augment.mixup(KEY, np.ones((n, 1), np.float32), np.eye(n, dtype=np.float32), alpha)
  share = np.diag(y)
  assert abs(share.mean() - 0.5) < 0.02
  assert abs(share.var() - 1 / (4 * (2 * alpha + 1))) < 0.01


def test_spec_augment_zeroes_one_band_and_one_span_of_the_whole_batch():
  apply = jax.jit(functools.partial(augment.spec_augment, frequency=30, time=48))
  widths, starts = [], []
  for key in jax.random.split(KEY, 300):
    hidden = np.asarray(apply(key, LOGMELS[:2] + 100)) == 0
    np.testing.assert_array_equal(hidden[0], hidden[1])
    rows, columns = hidden[0].all(axis=1), hidden[0].all(axis=0)
    np.testing.assert_array_equal(hidden[0], rows[:, None] | columns[None])
    for axis in (rows, columns):
      assert np.count_nonzero(np.diff(axis.astype(int), prepend=0, append=0)) <= 2  # one piece
    widths.append((rows.sum(), columns.sum()))
    starts.append((rows.argmax(), columns.argmax()))
  widths = np.array(widths)
  np.testing.assert_array_equal(widths.min(axis=0), 0)
  assert 28 <= widths[:, 0].max() < 30 and 45 <= widths[:, 1].max() < 48  # a width below the widest, rounded down
  np.testing.assert_allclose(widths.mean(axis=0), [14.5, 23.5], rtol=0.1)
  assert np.max(starts, axis=0)[0] > 60 and np.max(starts, axis=0)[1] > 80
  out = np.asarray(apply(KEY, LOGMELS))
  assert ((out == 0) | (out == LOGMELS)).all()


def test_a_mask_wider_than_the_clip_is_cut_to_it():
  out = augment.spec_augment(KEY, LOGMELS[:, :, :8], 500, 500)
  assert out.shape == (B, F, 8) and np.isfinite(out).all()


def slow_cubic(x):
  x, a = abs(x), -0.75
  if x <= 1:
    return (a + 2) * x ** 3 - (a + 3) * x ** 2 + 1
  return a * x ** 3 - 5 * a * x ** 2 + 8 * a * x - 4 * a if x < 2 else 0.0


def slow_resize(area, shape):
  for axis in (0, 1):
    area = np.moveaxis(area, axis, 0)
    out = []
    for i in range(shape[axis]):
      place = i * (len(area) - 1) / (shape[axis] - 1)
      first = int(np.floor(place + 1e-9))
      out.append(sum(slow_cubic(place - j) * area[min(max(j, 0), len(area) - 1)] for j in range(first - 1, first + 3)))
    area = np.moveaxis(np.stack(out), 0, axis)
  return area


@pytest.mark.parametrize('area', [(0, 12, 0, 20), (2, 7, 3, 15), (5, 7, 11, 9), (0, 12, 19, 1)])
def test_resizing_an_area_is_cubic_convolution_within_it(area):
  image = LOGMELS[0, :12, :20]
  top, height, left, width = area
  out = jax.jit(augment.resized, static_argnums=5)(image, *area, (12, 16))
  crop = image[top:top + height, left:left + width]
  np.testing.assert_allclose(out, slow_resize(crop.astype(np.float64), (12, 16)), atol=2e-5)
  import torch
  theirs = torch.nn.functional.interpolate(torch.tensor(crop)[None, None], (12, 16), mode='bicubic', align_corners=True)
  np.testing.assert_allclose(out, theirs[0, 0], atol=2e-5)


def test_random_crops_lie_in_the_canvas_and_have_the_sides_asked_for():
  tops, heights = augment._crops(KEY, 4000, 80, 80)
  lefts, widths = augment._crops(KEY, 4000, 100, 150)
  assert heights.min() == 48 and heights.max() == 80 and widths.min() == 60 and widths.max() == 149
  assert abs(np.mean(heights == 80) - 5 / 9) < 0.03  # scales of 1 to 1.5 of 0.6 to 1.5
  for starts, lengths, room in ((tops, heights, 80), (lefts, widths, 150)):
    assert starts.min() == 0 and (starts + lengths).max() == room


def test_resize_crop_keeps_shapes_and_differs_between_samples():
  same = jnp.broadcast_to(LOGMELS[:1], LOGMELS.shape)
  out = jax.jit(augment.resize_crop)(KEY, same)
  assert out.shape == same.shape and np.isfinite(out).all()
  assert len(np.unique(np.asarray(out)[:, 40, 50])) > B // 2
  silent = jax.jit(augment.resize_crop)(KEY, jnp.ones_like(same))
  assert np.any(np.abs(silent) < 1e-6) and np.any(np.abs(silent - 1) < 1e-6)  # canvas, and the clip itself


def test_patchout_counts_are_drawn_with_the_published_probabilities():
  draws = (np.arange(7000) + 0.5) / 7000
  counts = collections.Counter(augment.patchout_counts((5, 62), 0.5, u) for u in draws)
  assert counts == {(0, 31): 2000, (1, 19): 2000, (2, 6): 2000, (3, 0): 1000}
  # Tokens of a step: 8% fewer in the mean than in the longest, which is what a program for each pair saves.
  kept = {drop: (5 - drop[0]) * (62 - drop[1]) for drop in counts}
  assert list(kept.values()) == [155, 172, 168, 124]
  assert sum(kept[drop] * n for drop, n in counts.items()) / 7000 == pytest.approx(159.1, abs=0.1)


@pytest.mark.parametrize('grid, ratio', [((5, 1), 0.5), ((1, 1), 0.9), ((1, 4), 0.99), ((5, 6), 0.0)])
def test_patchout_always_leaves_something(grid, ratio):
  for u in (0.0, 0.3, 0.6, 0.999):
    rows, columns = augment.patchout_counts(grid, ratio, u)
    assert 0 <= rows < grid[0] and 0 <= columns < grid[1]


@pytest.mark.parametrize('grid, drop', [
    ((5, 62), (0, 31)), ((5, 62), (1, 19)), ((5, 62), (2, 6)), ((5, 62), (3, 0)), ((5, 38), (0, 0)), ((1, 4), (0, 2))])
def test_patchout_leaves_whole_rows_and_columns_in_equal_number(grid, drop):
  index = np.asarray(augment.structured_patchout(KEY, B, grid, drop))
  expected = grid[0] - drop[0], grid[1] - drop[1]
  assert index.shape == (B, expected[0] * expected[1])
  for kept in index:
    rows, columns = np.unique(kept // grid[1]), np.unique(kept % grid[1])
    assert (len(rows), len(columns)) == expected
    np.testing.assert_array_equal(kept, (rows[:, None] * grid[1] + columns).ravel())
  if any(drop):
    counts = np.bincount(index.ravel(), minlength=grid[0] * grid[1])
    assert counts.min() > 0 and (index != index[0]).any()
