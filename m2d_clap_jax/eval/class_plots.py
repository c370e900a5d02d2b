"""Figures about classes: confusions, similarities, scores, and a map of their clips."""
import colorsys

import numpy as np

from m2d_clap_jax.eval import metrics, plots

FEWEST_EMBEDDINGS = 5  # in a map
MEAN_COSINES = "mean similarity of each class's clips and captions"


def confusion_matrix(matrix, classes, path, *, title: str = '') -> plots.Drawn:
  """Draws counts [C, C] (true classes in rows, with their numbers of clips) as shares of each row, with percentages if
  there is room."""
  matrix = np.asarray(matrix, np.float64)
  shares = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
  rows = _with_counts(classes, matrix.sum(axis=1))
  limits = 0, max(1, shares.max(initial=0))
  return _map(shares, rows, classes, path, title, 'true class (clips)', 'predicted', '% of the true class', limits,
              '{:.0f}')


def similarity_map(similarity, row_labels, classes, path, *, title: str = '', names=('audio', 'text')) -> plots.Drawn:
  """Draws cosine similarities [rows, C], by default of audio (clips or class means) in rows and texts in columns; 0 is
  white, and NaN rows stay grey. `names`: of rows and columns, if they are something else."""
  similarity = np.asarray(similarity, np.float64)
  limit = np.nanmax(np.abs(similarity)) if np.isfinite(similarity).any() else 1
  return _map(similarity, row_labels, classes, path, title, *names, 'cosine similarity', (-limit, limit), '{:z.2f}',
              cmap=plots.DIVERGING)


def class_bars(values, classes, path, *, counts, chance, title: str = '', label: str = 'accuracy') -> plots.Drawn:
  """Draws a bar for each class, the best first; values [C] in 0..1; NaN (a class without clips) is left out.

  Args:
    counts: [C], numbers of clips, shown with the names.
    chance: what random scores get, for all classes or for each [C]: a line across each bar.
  """
  values, chance = np.asarray(values, np.float64), np.broadcast_to(chance, len(classes))
  order = [i for i in np.argsort(-np.nan_to_num(values, nan=-1), kind='stable') if np.isfinite(values[i])]
  fig = plots.figure(7, 1.5 + 0.2 * max(4, len(order)))
  ax = plots.axes(fig, 1, 1, 1, title)
  ax.barh(range(len(order)), 100 * values[order], color=plots.COLOURS[0], height=0.75)
  ax.vlines(100 * chance[order], np.arange(len(order)) - 0.5, np.arange(len(order)) + 0.5, colors=plots.COLOURS[1], linewidth=2)
  names = _with_counts(classes, counts)
  ax.set_yticks(range(len(order)), [names[i] for i in order], fontsize=8)
  ax.set_ylabel('class (clips)')
  ax.invert_yaxis()
  ax.margins(y=0.01)
  ax.set_xlim(0, 100)
  ax.set_xlabel(f'{label}, % (lines: chance)')
  ax.grid(True, axis='x', color='0.9', linewidth=0.8)
  ax.set_axisbelow(True)
  return plots.save(fig, path)


def embedding_map(features, labels, classes, path, *, title: str = '', most: int = 2000) -> plots.Drawn | None:
  """Draws features [n, D] of at most `most` clips in two dimensions (t-SNE); labels [n] are class numbers. Draws
  nothing for fewer than FEWEST_EMBEDDINGS clips.

  Each class has a colour and a marker of its own, so that not colour alone tells it apart. There are no axes: of t-SNE's
  coordinates only neighbourhoods mean something.
  """
  from sklearn.decomposition import PCA
  from sklearn.manifold import TSNE
  features, labels = np.asarray(features, np.float64), np.asarray(labels)
  if len(features) > most:
    chosen = np.random.default_rng(0).choice(len(features), most, replace=False)
    features, labels = features[chosen], labels[chosen]
  if len(features) < FEWEST_EMBEDDINGS:
    return None
  narrow = PCA(min(50, *features.shape), random_state=0).fit_transform(features - features.mean(axis=0))
  places = TSNE(2, perplexity=min(30, (len(features) - 1) / 3), init='pca', random_state=0).fit_transform(narrow)
  present = np.unique(labels)
  columns = -(-len(present) // 32)
  fig = plots.figure(7 + 1.7 * columns, 6.5)
  ax = plots.axes(fig, 1, 1, 1, title)
  ax.axis('off')
  for k, (number, colour) in enumerate(zip(present, class_colours(len(present)))):
    own = places[labels == number]
    ax.scatter(own[:, 0], own[:, 1], s=18, color=colour, marker='os^DvPX*'[k % 8], alpha=0.85, linewidths=0,
               label=f'{classes[number]} ({len(own)})')
  ax.legend(fontsize=7, frameon=False, loc='center left', bbox_to_anchor=(1.0, 0.5), ncols=columns)
  return plots.save(fig, path)


def class_colours(count: int) -> list:
  """As many different colours: the palette, or, for more, hues in golden sections of the circle, in three lightnesses."""
  if count <= len(plots.COLOURS):
    return list(plots.COLOURS[:count])
  return [colorsys.hls_to_rgb(k * 0.618034 % 1, (0.35, 0.5, 0.65)[k % 3], 0.75) for k in range(count)]


def draw_classes(folder, classes, targets, scores, *, multi_label: bool, title: str,
                 prefix: str = '') -> dict[str, float]:
  """Writes FOLDER/classes.png, bars of each class's accuracy or average precision, and with one label per clip also
  FOLDER/confusion.png -> {class: accuracy or average precision}; NaN for a class without clips.

  Args:
    targets, scores: [n, C].
    title: of both; the score and what chance gets are added.
    prefix: of both names.
  """
  targets, scores = np.asarray(targets), np.asarray(scores)
  by_chance = f'chance {100 * metrics.chance(targets):.1f}%'
  if multi_label:
    values, label, chance = metrics.average_precision(targets, scores), 'average precision', targets.mean(axis=0)
    title = f'{title}: mAP {100 * np.mean(values):.1f}%, {by_chance}'
  else:
    labels, predictions = targets.argmax(axis=1), scores.argmax(axis=1)
    matrix = metrics.confusion_matrix(labels, predictions, len(classes))
    values, label, chance = metrics.per_class_accuracy(matrix), 'accuracy', 1 / len(classes)
    title = f'{title}: accuracy {100 * metrics.accuracy(predictions, labels):.1f}%, {by_chance}'
    confusion_matrix(matrix, classes, folder / f'{prefix}confusion.png', title=title)
  class_bars(values, classes, folder / f'{prefix}classes.png', counts=targets.sum(axis=0), chance=chance, title=title,
             label=label)
  return dict(zip(classes, values.tolist()))


def _map(values, rows, columns, path, title, row_name, column_name, scale_name, limits, text_format,
         cmap=plots.SEQUENTIAL):
  if values.shape != (len(rows), len(columns)):
    raise ValueError(f'{values.shape} values for {len(rows)} rows and {len(columns)} columns')
  row_at, row_text = _label_runs(rows)
  column_at, column_text = _label_runs(columns)
  few = len(column_at) <= 14
  across, down = (0.62 if few else min(0.24, 28 / n) for n in (len(column_at), len(row_at)))  # inches a label
  body_height = max(down * len(row_at), min(14, 0.02 * len(rows)))
  fig = plots.figure(max(4.5, across * len(column_at) + 3.2), max(4.0, body_height + 2.2))
  ax = plots.axes(fig, 1, 1, 1, title)
  ax.set_facecolor(plots.HIDDEN)
  image = ax.imshow(np.ma.masked_invalid(values), cmap=cmap, vmin=limits[0], vmax=limits[1], aspect='auto',
                    interpolation='nearest')
  size = 9 if few else 8
  every = max(1, round(0.15 / across))  # with hundreds of classes, only some are named
  ax.set_xticks(column_at[::every], column_text[::every], rotation=45 if few else 90, fontsize=size,
                **({'ha': 'right', 'rotation_mode': 'anchor'} if few else {}))
  every = max(1, round(0.15 / down))
  ax.set_yticks(row_at[::every], row_text[::every], fontsize=size)
  ax.set_xlabel(column_name)
  ax.set_ylabel(row_name)
  ax.spines[:].set_visible(False)
  ax.tick_params(length=0)
  if few and len(rows) <= 14:
    for (i, j), value in np.ndenumerate(values):
      if np.isfinite(value):
        dark = abs(value) > (0.5 if limits[0] == 0 else 0.65) * limits[1]
        ax.text(j, i, text_format.format(value), ha='center', va='center', fontsize=8, color='white' if dark else 'black')
  fig.colorbar(image, ax=ax, label=scale_name, aspect=30, pad=0.02)
  return plots.save(fig, path)


def _with_counts(classes, counts) -> list[str]:
  return [f'{name} ({int(count)})' for name, count in zip(classes, counts)]


def _label_runs(names):
  """One label at the middle of each run of equal names, as in clips sorted by class -> (positions, labels)."""
  starts = [i for i in range(len(names)) if i == 0 or names[i] != names[i - 1]]
  return [(a + b - 1) / 2 for a, b in zip(starts, starts[1:] + [len(names)])], [names[a] for a in starts]
