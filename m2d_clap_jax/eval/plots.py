"""Every figure the project draws, in one style. PNG files; no pyplot, so nothing global and no display needed."""

import io
import re
import textwrap

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from m2d_clap_jax import paths

# Okabe and Ito's palette: told apart with any colour vision. Black is kept for text.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
SEQUENTIAL = 'Blues'  # one hue, so lightness alone tells the values, on paper too
HIDDEN = '#E6E6E6'
FEWEST_EMBEDDINGS = 5  # of a map

# The panels of `loss_curves`. A curve goes to the first that finds its pattern in the name: (title, pattern, log scale)
_PANELS = (
  ('Loss', r'loss', False),
  ('Norms', r'norm', True),
  ('Retrieval in the batch', r'retrieval', False),
  ('Evaluation', r'/(accuracy|mAP|R@1)$', False),
  ('Learning rate', r'learning_rate|\blr\b', False),
  ('EMA decay', r'ema', False),
  ('Logit scale', r'logit_scale', False),
  ('Effective rank', r'rank', False),
)


def loss_curves(history: dict, path) -> None:
  """Training curves by step, one panel for each kind of quantity.

  Args:
    history: name -> (steps [n], values [n]). Names as logged ('train/loss_m2d', 'grad_norm', 'learning_rate',
      'ema_decay', 'logit_scale', 'retrieval_audio_to_text', ...); those that fit no panel are left out.
    path: the PNG file to write.

  Raises:
    ValueError: no name fits any panel.
  """
  panels = {}
  for name, (steps, _) in history.items():
    panel = next((panel for panel in _PANELS if re.search(panel[1], name)), None)
    if panel and len(steps):
      panels.setdefault(panel, []).append(name)
  if not panels:
    raise ValueError(f'nothing to draw among {sorted(history)}')
  columns = min(3, len(panels))
  rows = -(-len(panels) // columns)
  fig = _figure(4.6 * columns, 3.3 * rows)
  for i, panel in enumerate(sorted(panels, key=_PANELS.index)):
    title, _, log = panel
    names = panels[panel]
    ax = _axes(fig, rows, columns, i + 1, title)
    for colour, name in zip(_cycle(len(names)), names):
      _curve(ax, *history[name], colour, name.removesuffix('/accuracy').rsplit('/', 1)[-1].replace('_', ' '))
    if log and not any(np.any(np.asarray(history[name][1]) <= 0) for name in names):
      ax.set_yscale('log')
    ax.set_xlabel('step')
    ax.grid(True, color='0.9', linewidth=0.8)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if len(names) > 1:
      ax.legend(fontsize=8, frameon=False, loc='upper center', bbox_to_anchor=(0.5, -0.16), ncols=3, columnspacing=1)
  _save(fig, path)


def _curve(ax, steps, values, colour, label):
  steps, values = np.asarray(steps), np.asarray(values, np.float64)
  window = len(values) // 50
  noisy = np.nansum(np.abs(np.diff(values))) > 5 * _spread(values)
  if window < 3 or not noisy:
    ax.plot(steps, values, color=colour, linewidth=1.5, label=label, marker='o' if len(values) < 20 else None,
            markersize=3)
    return
  # A long noisy curve: the values themselves lightly, and their running mean over 2% of the run.
  ax.plot(steps, values, color=colour, linewidth=0.6, alpha=0.3)
  means = np.convolve(values, np.ones(window) / window, mode='valid')
  ax.plot(steps[window // 2:window // 2 + len(means)], means, color=colour, linewidth=1.6, label=label)


def _spread(values):
  values = values[np.isfinite(values)]
  return np.ptp(values) if len(values) else 0.0


def masked_clip(logmel, mask, grid, patch, path, *, title: str = '', captions=(), frame_seconds: float = 0.01) -> None:
  """One clip as the model meets it: the log-mel above, and below what the online encoder sees of it.

  Args:
    logmel: [F, T]; frames beyond the grid are not shown.
    mask: [N], 1 where the patch is masked; patch index = f * grid[1] + t.
    grid: (rows in frequency, columns in time). patch: (mel bins, frames).
    captions: drawn under the title, one a line.
    frame_seconds: the hop, for the time axis.
  """
  height, width = grid[0] * patch[0], grid[1] * patch[1]
  logmel = np.asarray(logmel, np.float64)[:height, :width]
  hidden = np.kron(np.asarray(mask, bool).reshape(grid), np.ones(patch, bool))[:logmel.shape[0], :logmel.shape[1]]
  low, high = np.percentile(logmel, (1, 99.8))
  lines = [title] if title else []
  lines += [f'“{textwrap.shorten(caption, 100, placeholder="…")}”' for caption in captions]
  fig = _figure(9, 4.8 + 0.2 * len(lines))
  share = 1 - np.mean(np.asarray(mask, bool))
  seen = np.ma.array(logmel, mask=hidden)
  panels = ((logmel, 'log-mel spectrogram'), (seen, f'visible to the online encoder ({share:.0%})'))
  for i, (values, name) in enumerate(panels):
    ax = _axes(fig, 2, 1, i + 1, name)
    ax.set_facecolor(HIDDEN)
    image = ax.imshow(values, origin='lower', aspect='auto', cmap='magma', vmin=low, vmax=high, interpolation='nearest',
                      extent=(0, logmel.shape[1] * frame_seconds, 0, logmel.shape[0]))
    ax.set_ylabel('mel bin')
    ax.spines[:].set_visible(False)
  if grid[1] <= 80:  # narrower patches would drown in their outlines
    for x in np.arange(patch[1], logmel.shape[1], patch[1]):
      ax.axvline(x * frame_seconds, color='white', linewidth=0.4)
  for y in np.arange(patch[0], logmel.shape[0], patch[0]):
    ax.axhline(y, color='white', linewidth=0.4)
  ax.set_xlabel('seconds')
  fig.colorbar(image, ax=fig.axes, label='log power', aspect=30, pad=0.01)
  fig.suptitle('\n'.join(lines), fontsize=10)
  _save(fig, path)


def log_mel(logmel, path, *, title: str = '', frame_seconds: float = 0.01) -> None:
  """One clip [F, T]."""
  logmel = np.asarray(logmel, np.float64)
  fig = _figure(8, 3)
  ax = _axes(fig, 1, 1, 1, title)
  low, high = np.percentile(logmel, (1, 99.8))
  image = ax.imshow(logmel, origin='lower', aspect='auto', cmap='magma', vmin=low, vmax=max(high, low + 1e-3),
                    interpolation='nearest', extent=(0, logmel.shape[1] * frame_seconds, 0, logmel.shape[0]))
  ax.set_xlabel('seconds')
  ax.set_ylabel('mel bin')
  ax.spines[:].set_visible(False)
  fig.colorbar(image, ax=ax, label='log power', aspect=20, pad=0.01)
  _save(fig, path)


def confusion_matrix(matrix, classes, path, *, title: str = '') -> None:
  """Counts [C, C] (true classes in rows) as the share of each row, with percentages written in if there is room."""
  matrix = np.asarray(matrix, np.float64)
  shares = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
  limit = max(1, shares.max(initial=0))
  _map(shares, classes, classes, path, title, 'true', 'predicted', '% of the true class', (0, limit), '{:.0f}')


def similarity_map(similarity, row_labels, classes, path, *, title: str = '', names=('audio', 'text')) -> None:
  """Cosine similarities [rows, C]: audio (clips or class means) in rows, texts in columns; NaN rows stay grey. Other things
  are compared with other `names` of rows and columns."""
  similarity = np.asarray(similarity, np.float64)
  limits = (np.nanmin(similarity), np.nanmax(similarity)) if np.isfinite(similarity).any() else (0, 1)
  _map(similarity, row_labels, classes, path, title, *names, 'cosine similarity', limits, '{:.2f}')


def class_bars(values, classes, path, *, title: str = '', label: str = 'accuracy') -> None:
  """A bar for each class, the best first; values [C] in 0..1, NaN (a class without clips) is left out."""
  values = np.asarray(values, np.float64)
  order = [i for i in np.argsort(-np.nan_to_num(values, nan=-1), kind='stable') if np.isfinite(values[i])]
  fig = _figure(7, 1.5 + 0.2 * max(4, len(order)))
  ax = _axes(fig, 1, 1, 1, title)
  ax.barh(range(len(order)), 100 * values[order], color=COLOURS[0], height=0.75)
  ax.set_yticks(range(len(order)), [str(classes[i]) for i in order], fontsize=8)
  ax.invert_yaxis()
  ax.margins(y=0.01)
  ax.set_xlim(0, 100)
  ax.set_xlabel(f'{label}, %')
  ax.grid(True, axis='x', color='0.9', linewidth=0.8)
  ax.set_axisbelow(True)
  _save(fig, path)


def embedding_map(features, labels, classes, path, *, title: str = '', most: int = 2000) -> None:
  """Features [n, D] of at most `most` clips in two dimensions (t-SNE), a mark for each class; labels [n] are numbers.
  Nothing is drawn of fewer than FEWEST_EMBEDDINGS.

  Six colours in turn with several marks keep classes apart without relying on colour alone.
  """
  from sklearn.decomposition import PCA
  from sklearn.manifold import TSNE
  features, labels = np.asarray(features, np.float64), np.asarray(labels)
  if len(features) > most:
    chosen = np.random.default_rng(0).choice(len(features), most, replace=False)
    features, labels = features[chosen], labels[chosen]
  if len(features) < FEWEST_EMBEDDINGS:
    return
  narrow = PCA(min(50, *features.shape), random_state=0).fit_transform(features - features.mean(axis=0))
  places = TSNE(2, perplexity=min(30, (len(features) - 1) / 3), init='pca', random_state=0).fit_transform(narrow)
  present = np.unique(labels)
  columns = -(-len(present) // 32)
  fig = _figure(7 + 1.7 * columns, 6.5)
  ax = _axes(fig, 1, 1, 1, title)
  for k, number in enumerate(present):
    own = places[labels == number]
    ax.scatter(own[:, 0], own[:, 1], s=14, color=COLOURS[k % len(COLOURS)], marker='osD^vPX*'[k // len(COLOURS) % 8],
               alpha=0.75, linewidths=0, label=str(classes[number]))
  ax.set_xticks([])
  ax.set_yticks([])
  ax.legend(fontsize=7, frameon=False, loc='center left', bbox_to_anchor=(1.0, 0.5), ncols=columns)
  _save(fig, path)


def compared_curves(histories: dict[str, dict], path) -> None:
  """Training curves of several runs: a panel for each quantity of `loss_curves` that any run has, a line for each run.

  Args:
    histories: run -> history as in `loss_curves`.

  Raises:
    ValueError: no name fits any panel.
  """
  names = [name for panel in _PANELS for name in sorted({name for history in histories.values() for name in history})
           if re.search(panel[1], name) and not any(re.search(other[1], name) for other in _PANELS[:_PANELS.index(panel)])]
  if not names:
    raise ValueError('nothing to draw in any of the runs')
  columns = min(3, len(names))
  fig = _figure(4.6 * columns, 3 * -(-len(names) // columns) + 0.3)
  for i, name in enumerate(names):
    ax = _axes(fig, -(-len(names) // columns), columns, i + 1, name.replace('_', ' '))
    for colour, (run, history) in zip(_cycle(len(histories)), histories.items()):
      if name in history and len(history[name][0]):
        _curve(ax, *history[name], colour, run)
    ax.set_xlabel('step')
    ax.grid(True, color='0.9', linewidth=0.8)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
  lines = {line.get_label(): line for ax in fig.axes for line in ax.get_lines() if not line.get_label().startswith('_')}
  fig.legend(lines.values(), lines.keys(), loc='outside lower center', ncols=4, frameon=False, fontsize=9)
  _save(fig, path)


def attention_maps(logmel, maps: dict, path, *, title: str = '', frame_seconds: float = 0.01) -> None:
  """A clip and what is attended to in it.

  Args:
    logmel: [F, T].
    maps: title -> [rows, columns], shares of a grid of patches, lowest frequencies first.
  """
  logmel = np.asarray(logmel, np.float64)
  seconds, bins = logmel.shape[1] * frame_seconds, logmel.shape[0]
  fig = _figure(8, 1.5 * (1 + len(maps)) + 0.6)
  low, high = np.percentile(logmel, (1, 99.8))
  panels = [('log-mel spectrogram', logmel, dict(cmap='magma', vmin=low, vmax=high))]
  top = max(np.max(values) for values in maps.values())
  panels += [(name, np.asarray(values), dict(cmap=SEQUENTIAL, vmin=0, vmax=top)) for name, values in maps.items()]
  for i, (name, values, style) in enumerate(panels):
    ax = _axes(fig, len(panels), 1, i + 1, name)
    image = ax.imshow(values, origin='lower', aspect='auto', interpolation='nearest', extent=(0, seconds, 0, bins), **style)
    ax.set_ylabel('mel bin')
    ax.spines[:].set_visible(False)
  ax.set_xlabel('seconds')
  fig.colorbar(image, ax=fig.axes[1:len(panels)], label="share of [CLS]'s attention", aspect=30, pad=0.01)
  fig.suptitle(title, fontsize=10)
  _save(fig, path)


def growth(panels: dict[str, dict[str, dict[float, float]]], path) -> None:
  """How quantities grow: a panel for each thing that is changed, {panel: {quantity: {x: value}}}, logarithmic axes.

  Every quantity is drawn as a multiple of its first value; the dashed line is what grows in proportion to x.
  """
  fig = _figure(4.6 * len(panels), 3.6)
  for i, (what, quantities) in enumerate(panels.items()):
    ax = _axes(fig, 1, len(panels), i + 1, '')
    places = sorted(next(iter(quantities.values())))
    ax.plot(places, [x / places[0] for x in places], color='0.6', linestyle='--', linewidth=1, label='in proportion')
    for colour, (name, values) in zip(_cycle(len(quantities)), quantities.items()):
      ax.plot(places, [values[x] / values[places[0]] for x in places], color=colour, linewidth=1.5, marker='o',
              markersize=4, label=name)
    for axis, set_scale in ((ax.xaxis, ax.set_xscale), (ax.yaxis, ax.set_yscale)):
      set_scale('log', base=2)
      axis.set_major_formatter(FuncFormatter(lambda x, _: f'{x:g}'))
    ax.set_xticks(places)
    ax.set_xlabel(what)
    ax.set_ylabel('times the first')
    ax.grid(True, color='0.9', linewidth=0.8)
  ax.legend(fontsize=8, frameon=False)
  _save(fig, path)


def _map(values, rows, columns, path, title, row_name, column_name, scale_name, limits, text_format):
  if values.shape != (len(rows), len(columns)):
    raise ValueError(f'{values.shape} values for {len(rows)} rows and {len(columns)} columns')
  row_at, row_text = _label_runs(rows)
  column_at, column_text = _label_runs(columns)
  few = len(column_at) <= 14
  across, down = (0.62 if few else min(0.24, 28 / n) for n in (len(column_at), len(row_at)))  # inches a label
  body_height = max(down * len(row_at), min(14, 0.02 * len(rows)))
  fig = _figure(max(4.5, across * len(column_at) + 3.2), max(4.0, body_height + 2.2))
  ax = _axes(fig, 1, 1, 1, title)
  ax.set_facecolor(HIDDEN)
  image = ax.imshow(np.ma.masked_invalid(values), cmap=SEQUENTIAL, vmin=limits[0], vmax=limits[1], aspect='auto',
                    interpolation='nearest')
  size = 9 if few else 8
  every = max(1, round(0.15 / across))  # hundreds of classes: not every one is named
  ax.set_xticks(column_at[::every], column_text[::every], rotation=45 if few else 90, fontsize=size,
                **({'ha': 'right', 'rotation_mode': 'anchor'} if few else {}))
  every = max(1, round(0.15 / down))
  ax.set_yticks(row_at[::every], row_text[::every], fontsize=size)
  ax.set_xlabel(column_name)
  ax.set_ylabel(row_name)
  ax.spines[:].set_visible(False)
  ax.tick_params(length=0)
  if few and len(rows) <= 14:
    middle = (limits[0] + limits[1]) / 2
    for (i, j), value in np.ndenumerate(values):
      if np.isfinite(value):
        ax.text(j, i, text_format.format(value), ha='center', va='center', fontsize=8,
                color='white' if value > middle else 'black')
  fig.colorbar(image, ax=ax, label=scale_name, aspect=30, pad=0.02)
  _save(fig, path)


def _label_runs(names):
  """Clips sorted by class repeat its name: one label for each run of equal names, at its middle -> (places, labels)."""
  starts = [i for i in range(len(names)) if i == 0 or names[i] != names[i - 1]]
  return [(a + b - 1) / 2 for a, b in zip(starts, starts[1:] + [len(names)])], [names[a] for a in starts]


def _figure(width, height):
  fig = Figure(figsize=(width, height), dpi=120, layout='constrained', facecolor='white')
  FigureCanvasAgg(fig)
  return fig


def _axes(fig, rows, columns, index, title):
  ax = fig.add_subplot(rows, columns, index)
  ax.set_title(title, fontsize=11)
  ax.spines[['top', 'right']].set_visible(False)
  ax.tick_params(labelsize=9)
  return ax


def _cycle(n):
  return [COLOURS[i % len(COLOURS)] for i in range(n)]


def _save(fig, path):
  buffer = io.BytesIO()
  fig.savefig(buffer, format='png')
  paths.write_bytes(path, buffer.getvalue())
