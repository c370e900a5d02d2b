"""What every classification leaves to be looked at: how it does class by class."""
import numpy as np

from m2d_clap_jax.eval import metrics, plots


def draw_classes(folder, classes, targets, scores, *, multi_label: bool, title: str) -> dict[str, float]:
  """Writes FOLDER/classes.png, bars of each class' accuracy or average precision, and with one label a clip also
  FOLDER/confusion.png -> {class: that number}; NaN where a class has no clips.

  Args:
    targets, scores: [n, C].
    title: of both; the score is added.
  """
  targets, scores = np.asarray(targets), np.asarray(scores)
  if multi_label:
    values, label = metrics.average_precision(targets, scores), 'average precision'
    title = f'{title}: mAP {100 * np.mean(values):.1f}%'
  else:
    labels, predictions = targets.argmax(axis=1), scores.argmax(axis=1)
    matrix = metrics.confusion_matrix(labels, predictions, len(classes))
    values, label = metrics.per_class_accuracy(matrix), 'accuracy'
    title = f'{title}: {100 * metrics.accuracy(predictions, labels):.1f}%'
    plots.confusion_matrix(matrix, classes, folder / 'confusion.png', title=title)
  plots.class_bars(values, classes, folder / 'classes.png', title=title, label=label)
  return dict(zip(classes, values.tolist()))
