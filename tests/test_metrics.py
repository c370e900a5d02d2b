"""Metrics against scikit-learn and against the definition, spelled out."""

import numpy as np
import pytest
import sklearn.metrics

from m2d_clap_jax.eval import logistic_probe, metrics


def draw(seed, n=60, classes=7):
  rng = np.random.default_rng(seed)
  targets = rng.random((n, classes)) < rng.uniform(0.02, 0.6, classes)
  scores = rng.normal(size=(n, classes)) + targets
  return rng, targets, scores


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('decimals', [None, 1, 0, -9])
@pytest.mark.filterwarnings('ignore:No positive class')
def test_average_precision_equals_scikit_learn_with_ties_and_empty_classes(seed, decimals):
  _, targets, scores = draw(seed)
  targets[:, 0] = False
  targets[:, 1] = True
  if decimals is not None:
    scores = np.round(scores, decimals)
  expected = sklearn.metrics.average_precision_score(targets, scores, average=None)
  np.testing.assert_allclose(metrics.average_precision(targets, scores), expected, rtol=0, atol=1e-9)
  macro = sklearn.metrics.average_precision_score(targets, scores, average='macro')
  assert abs(metrics.mean_average_precision(targets, scores) - macro) < 1e-9


def test_scores_that_cannot_be_ranked_are_refused():
  with pytest.raises(ValueError, match='NaN'):
    metrics.average_precision([[1], [0]], [[0.5], [np.nan]])
  with pytest.raises(ValueError, match='clips, classes'):
    metrics.average_precision([1, 0], [0.5, 0.1])


def test_confusion_and_accuracy_equal_scikit_learn():
  rng = np.random.default_rng(0)
  labels, predictions = rng.integers(5, size=(2, 300))
  labels[labels == 3] = 0  # a class that never occurs
  matrix = metrics.confusion_matrix(labels, predictions, 6)
  np.testing.assert_array_equal(matrix, sklearn.metrics.confusion_matrix(labels, predictions, labels=range(6)))
  assert abs(metrics.accuracy(predictions, labels) - sklearn.metrics.accuracy_score(labels, predictions)) < 1e-9
  recall = metrics.per_class_accuracy(matrix)
  expected = sklearn.metrics.recall_score(labels, predictions, labels=[0, 1, 2, 4], average=None)
  np.testing.assert_allclose(recall[[0, 1, 2, 4]], expected, atol=1e-9)
  assert np.isnan(recall[3]) and np.isnan(recall[5])


@pytest.mark.parametrize('decimals', [9, 0])
def test_retrieval_equals_brute_force(decimals):
  rng = np.random.default_rng(1)
  clip_of_text = rng.permutation(np.repeat(np.arange(30), 5))
  similarity = np.round(rng.normal(size=(30, 150)) + 1.5 * (clip_of_text == np.arange(30)[:, None]), decimals)
  result = metrics.audio_text_retrieval(similarity, clip_of_text)
  for direction, table, relevant in (
      ('audio_to_text', similarity, [set(np.flatnonzero(clip_of_text == a)) for a in range(30)]),
      ('text_to_audio', similarity.T, [{a} for a in clip_of_text])):
    best, precision = [], []
    for row, good in zip(table, relevant):
      order = sorted(range(len(row)), key=lambda i: (-row[i], i in good))
      hits = [i in good for i in order]
      best.append(hits.index(True) + 1)
      precision.append(sum(sum(hits[:k + 1]) / (k + 1) for k in range(10) if hits[k]) / min(10, len(good)))
    expected = {f'R@{k}': np.mean([b <= k for b in best]) for k in (1, 5, 10)}
    expected |= {'mAP@10': np.mean(precision), 'median_rank': np.median(best), 'chance': 1 / 30}
    assert result[direction] == pytest.approx(expected, abs=1e-12)


def test_a_model_that_finds_everything_alike_retrieves_nothing():
  result = metrics.retrieval(np.zeros((20, 20)), np.eye(20, dtype=bool))
  assert result == {'R@1': 0, 'R@5': 0, 'R@10': 0, 'mAP@10': 0, 'median_rank': 20, 'chance': 0.05}


def test_zeroshot_takes_the_nearest_caption_whatever_the_lengths():
  rng = np.random.default_rng(2)
  text = rng.normal(size=(4, 16))
  labels = np.repeat([0, 1, 2], 10)  # class 3 has no clips
  audio = (text[labels] + 0.1 * rng.normal(size=(30, 16))) * rng.uniform(0.1, 9, (30, 1))
  audio[0] = text[3]
  result = metrics.zeroshot(audio, 5 * text, labels)
  assert result['accuracy'] == pytest.approx(29 / 30) and result['chance'] == 0.25
  assert result['predictions'][0] == 3 and result['confusion'][0, 3] == 1 and result['confusion'].sum() == 30
  np.testing.assert_allclose(result['per_class'], [0.9, 1, 1, np.nan])
  cosine = audio[7] @ text[2] / np.linalg.norm(audio[7]) / np.linalg.norm(text[2])
  assert result['similarity'][7, 2] == pytest.approx(cosine)
  np.testing.assert_allclose(result['class_similarity'][1], result['similarity'][10:20].mean(axis=0))
  assert np.isnan(result['class_similarity'][3]).all()


def test_zeroshot_refuses_what_does_not_fit():
  with pytest.raises(ValueError, match='3 classes'):
    metrics.zeroshot(np.ones((2, 4)), np.ones((3, 4)), [0, 3])
  with pytest.raises(ValueError, match='1 bad values'):
    metrics.zeroshot([[1.0, np.nan]], np.ones((3, 2)), [0])


def test_logistic_probe_reads_a_linear_direction_and_nothing_from_noise():
  rng = np.random.default_rng(3)
  labels = np.array(['bark', 'meow'])[rng.integers(2, size=600)]
  x = rng.normal(size=(600, 20))
  x[:, 5] = 1e6  # constant
  noise = logistic_probe.logistic_probe(x[:400], labels[:400], x[400:], labels[400:])
  x[:, 7] = 1000 * (labels == 'bark') + rng.normal(size=600)
  found = logistic_probe.logistic_probe(x[:400], labels[:400], x[400:], labels[400:])
  assert found['accuracy'] > 0.98 and found['converged'] and set(found['predictions']) == {'bark', 'meow'}
  assert 0.35 < noise['accuracy'] < 0.65


def test_feature_statistics_tell_spread_from_collapse():
  rng = np.random.default_rng(4)
  spread = metrics.statistics(rng.normal(size=(4000, 16)))
  assert 15.9 < spread['effective_rank'] <= 16.001 and abs(spread['cosine']) < 0.01
  assert spread['std'] == pytest.approx(1, abs=0.05)
  flat = rng.normal(size=(500, 3)) @ rng.normal(size=(3, 16))
  assert 2 < metrics.effective_rank(flat) < 3.01
  collapsed = metrics.statistics(np.ones((500, 16)))
  assert collapsed['effective_rank'] == pytest.approx(1, abs=1e-3)
  assert collapsed['std'] == 0 and collapsed['cosine'] == pytest.approx(1)


def test_mean_cosine_equals_all_pairs():
  x = np.random.default_rng(5).normal(size=(20, 6)) + 1
  unit = x / np.linalg.norm(x, axis=1, keepdims=True)
  pairs = (unit @ unit.T)[~np.eye(20, dtype=bool)]
  assert metrics.mean_cosine(x) == pytest.approx(pairs.mean(), abs=1e-12)
