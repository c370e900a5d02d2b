"""Every figure the project draws, in one style. PNG files; no pyplot, so nothing global and no display needed.

Functions that draw return the file's path, as an object that notebooks show as the figure.
"""

import io
import re
import textwrap

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from m2d_clap_jax import paths
from m2d_clap_jax.audio import LogMel
from m2d_clap_jax.audio.logmel import mel_edges

# Okabe and Ito's palette: distinguishable with any colour vision. Black is kept for text.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
SEQUENTIAL = 'Blues'  # one hue, so lightness alone encodes the values, on paper too
DIVERGING = 'RdBu_r'  # of values around 0, which is white
HIDDEN = '#E6E6E6'

_SCORE = re.compile(r'/(accuracy|mAP|R@1)$')
# Panels of `loss_curves`: (title, pattern, log scale). A curve goes to the first panel whose pattern matches its name.
_PANELS = (
  ('Loss', r'loss', False),
  ('Gradient norm', r'grad_norm', True),
  ('Parameter norm', r'param_norm', False),
  ('Retrieval in the batch', r'retrieval', False),
  ('Evaluation', _SCORE.pattern, False),
  ('Learning rate', r'learning_rate|\blr\b', False),
  ('EMA decay', r'ema', False),
  ('Logit scale, natural log', r'logit_scale', False),
  ('Effective rank', r'rank', False),
)


class Drawn(str):
  """The path of a figure that was written; a notebook shows the figure itself."""

  def _repr_png_(self) -> bytes:
    return paths.as_path(self).read_bytes()


def loss_curves(history: dict, path, *, title: str = '') -> Drawn:
  """Draws training curves by step, one panel per kind of quantity, and the level of chance beside scores.

  Args:
    history: name -> (steps [n], values [n]). Names as logged ('train/loss_m2d', 'grad_norm', 'learning_rate',
      'ema_decay', 'logit_scale', 'retrieval_audio_to_text', ...); those that match no panel are left out.
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
  fig = figure(4.6 * columns, 3.3 * rows)
  for i, panel in enumerate(sorted(panels, key=_PANELS.index)):
    kind, _, log = panel
    names = _different(panels[panel], history)
    ax = axes(fig, rows, columns, i + 1, kind)
    for colour, name in zip(_cycle(len(names)), names):
      score = _SCORE.search(name)  # of which evaluation
      _curve(ax, *history[name], colour, (name if score else name.rsplit('/', 1)[-1]).replace('/', ' ').replace('_', ' '))
      if score:
        _chance(ax, history, name, color=colour)
    if log and not any(np.any(np.asarray(history[name][1]) <= 0) for name in names):
      ax.set_yscale('log')
    ax.set_xlabel('step')
    ax.grid(True, color='0.9', linewidth=0.8)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if len(names) > 1 or len(ax.get_lines()) > len(names):
      ax.legend(fontsize=8, frameon=False, loc='upper center', bbox_to_anchor=(0.5, -0.16), ncols=3, columnspacing=1)
  fig.suptitle(title, fontsize=11)
  return save(fig, path)


def _different(names, history) -> list[str]:
  """Without curves that another one would cover, such as the loss where it has one term only."""
  return [name for i, name in enumerate(names)
          if not any(np.array_equal(history[name], history[other], equal_nan=True) for other in names[i + 1:])]


def _chance(ax, history, score: str, color: str = '0.4'):
  """A horizontal line at what chance gets of a score, where the history has that."""
  _, values = history.get(_SCORE.sub('/chance', score), ((), ()))
  if len(values):
    known = any(line.get_label() == 'chance' for line in ax.get_lines())
    ax.axhline(values[-1], color=color, linestyle=':', linewidth=1.2, label='_' if known else 'chance')


def _curve(ax, steps, values, colour, label):
  steps, values = np.asarray(steps), np.asarray(values, np.float64)
  window = len(values) // 50
  noisy = np.nansum(np.abs(np.diff(values))) > 5 * _spread(values)
  if window < 3 or not noisy:
    ax.plot(steps, values, color=colour, linewidth=1.5, label=label, marker='o' if len(values) < 20 else None,
            markersize=3)
    return
  # A long noisy curve: the values in a light colour, and their running mean over 2% of the run.
  ax.plot(steps, values, color=colour, linewidth=0.6, alpha=0.3)
  means = np.convolve(values, np.ones(window) / window, mode='valid')
  ax.plot(steps[window // 2:window // 2 + len(means)], means, color=colour, linewidth=1.6, label=label)


def _spread(values):
  values = values[np.isfinite(values)]
  return np.ptp(values) if len(values) else 0.0


def masked_clip(logmel, mask, grid, patch, path, *, spec: LogMel, title: str = '', captions=(), scores=()) -> Drawn:
  """Draws one clip as the model sees it: the log-mel above, and the patches visible to the online encoder below.

  Args:
    logmel: [F, T]; frames beyond the grid are not shown.
    mask: [N], 1 where the patch is masked; patch index = f * grid[1] + t.
    grid: (rows in frequency, columns in time). patch: (mel bins, frames).
    spec: of the log-mel, for the axes.
    captions: drawn under the title, one per line, each with its score where there are `scores`.
  """
  height, width = grid[0] * patch[0], grid[1] * patch[1]
  logmel = np.asarray(logmel, np.float64)[:height, :width]
  hidden = np.kron(np.asarray(mask, bool).reshape(grid), np.ones(patch, bool))[:logmel.shape[0], :logmel.shape[1]]
  low, high = np.percentile(logmel, (1, 99.8))
  lines = [title] if title else []
  quoted = [f'“{textwrap.shorten(caption, 100, placeholder="…")}”' for caption in captions]
  lines += [f'{text}  {score:.2f}' for text, score in zip(quoted, scores)] if len(scores) else quoted
  fig = figure(9, 4.8 + 0.2 * len(lines))
  share = 1 - np.mean(np.asarray(mask, bool))
  seen, hop = np.ma.array(logmel, mask=hidden), spec.hop / spec.sample_rate
  panels = ((logmel, 'log-mel spectrogram'), (seen, f'visible to the online encoder ({share:.0%})'))
  for i, (values, name) in enumerate(panels):
    ax = axes(fig, 2, 1, i + 1, name)
    ax.set_facecolor(HIDDEN)
    image = ax.imshow(values, origin='lower', aspect='auto', cmap='magma', vmin=low, vmax=high, interpolation='nearest',
                      extent=(0, logmel.shape[1] * hop, 0, logmel.shape[0]))
    _in_hertz(ax, spec)
    ax.spines[:].set_visible(False)
  if grid[1] <= 80:  # outlines would cover narrower patches
    for x in np.arange(patch[1], logmel.shape[1], patch[1]):
      ax.axvline(x * hop, color='white', linewidth=0.4)
  for y in np.arange(patch[0], logmel.shape[0], patch[0]):
    ax.axhline(y, color='white', linewidth=0.4)
  ax.set_xlabel('seconds')
  fig.colorbar(image, ax=fig.axes, label='log power', aspect=30, pad=0.01)
  fig.suptitle('\n'.join(lines), fontsize=10)
  return save(fig, path)


def log_mel(logmel, path, *, spec: LogMel, title: str = '') -> Drawn:
  """Draws one log-mel [F, T] of the given settings."""
  logmel = np.asarray(logmel, np.float64)
  fig = figure(8, 3)
  ax = axes(fig, 1, 1, 1, title)
  low, high = np.percentile(logmel, (1, 99.8))
  image = ax.imshow(logmel, origin='lower', aspect='auto', cmap='magma', vmin=low, vmax=max(high, low + 1e-3),
                    interpolation='nearest', extent=(0, logmel.shape[1] * spec.hop / spec.sample_rate, 0, logmel.shape[0]))
  ax.set_xlabel('seconds')
  _in_hertz(ax, spec)
  ax.spines[:].set_visible(False)
  fig.colorbar(image, ax=ax, label='log power', aspect=20, pad=0.01)
  return save(fig, path)


def compared_curves(histories: dict[str, dict], path) -> Drawn:
  """Draws training curves of several runs: one panel per quantity of `loss_curves`, one line per run.

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
  fig = figure(4.6 * columns, 3 * -(-len(names) // columns) + 0.3)
  for i, name in enumerate(names):
    ax = axes(fig, -(-len(names) // columns), columns, i + 1, name.replace('_', ' '))
    for colour, (run, history) in zip(_cycle(len(histories)), histories.items()):
      if name in history and len(history[name][0]):
        _curve(ax, *history[name], colour, run)
        if _SCORE.search(name):
          _chance(ax, history, name)
    ax.set_xlabel('step')
    ax.grid(True, color='0.9', linewidth=0.8)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
  lines = {line.get_label(): line for ax in fig.axes for line in ax.get_lines() if not line.get_label().startswith('_')}
  fig.legend(lines.values(), lines.keys(), loc='outside lower center', ncols=4, frameon=False, fontsize=9)
  return save(fig, path)


def attention_maps(logmel, maps: dict, path, *, spec: LogMel, title: str = '') -> Drawn:
  """Draws a clip and the attention over its patches.

  Args:
    logmel: [F, T].
    maps: title -> [rows, columns], attention shares of a grid of patches, lowest frequencies first.
    spec: of the log-mel, for the axes.
  """
  logmel = np.asarray(logmel, np.float64)
  seconds, bins = logmel.shape[1] * spec.hop / spec.sample_rate, logmel.shape[0]
  fig = figure(8, 1.5 * (1 + len(maps)) + 0.6)
  low, high = np.percentile(logmel, (1, 99.8))
  panels = [('log-mel spectrogram', logmel, dict(cmap='magma', vmin=low, vmax=high))]
  top = max(np.max(values) for values in maps.values())
  panels += [(name, np.asarray(values), dict(cmap=SEQUENTIAL, vmin=0, vmax=top)) for name, values in maps.items()]
  for i, (name, values, style) in enumerate(panels):
    ax = axes(fig, len(panels), 1, i + 1, name)
    image = ax.imshow(values, origin='lower', aspect='auto', interpolation='nearest', extent=(0, seconds, 0, bins), **style)
    _in_hertz(ax, spec)
    ax.spines[:].set_visible(False)
  ax.set_xlabel('seconds')
  fig.colorbar(image, ax=fig.axes[1:len(panels)], label="share of [CLS]'s attention", aspect=30, pad=0.01)
  fig.suptitle(title, fontsize=10)
  return save(fig, path)


def frame_similarity(similarity, seconds: float, path, *, title: str = '') -> Drawn:
  """Draws cosine similarities [T, T] of the frames of a sound, evenly spaced over its `seconds`."""
  similarity = np.asarray(similarity, np.float64)
  limit = np.abs(similarity).max()
  fig = figure(6.4, 5.4)
  ax = axes(fig, 1, 1, 1, title)
  image = ax.imshow(similarity, cmap=DIVERGING, vmin=-limit, vmax=limit, interpolation='nearest', origin='lower',
                    extent=(0, seconds, 0, seconds))
  ax.set_xlabel('seconds')
  ax.set_ylabel('seconds')
  ax.spines[:].set_visible(False)
  fig.colorbar(image, ax=ax, label='cosine similarity', aspect=30, pad=0.02)
  return save(fig, path)


def _in_hertz(ax, spec: LogMel):
  """Ticks at round frequencies on an axis of mel bins."""
  centres = mel_edges(spec)[1:-1]
  ticks = [hertz for hertz in (500, 1000, 2000, 4000, 8000) if hertz < centres[-1]]
  ax.set_yticks(np.interp(ticks, centres, np.arange(spec.n_mels) + 0.5), [f'{hertz:,}' for hertz in ticks])
  ax.set_ylabel('Hz')


def figure(width, height):
  """A figure of the given size in inches."""
  fig = Figure(figsize=(width, height), dpi=120, layout='constrained', facecolor='white')
  FigureCanvasAgg(fig)
  return fig


def axes(fig, rows, columns, index, title):
  """Axes in the common style; further arguments as for `Figure.add_subplot`."""
  ax = fig.add_subplot(rows, columns, index)
  ax.set_title(title, fontsize=11)
  ax.spines[['top', 'right']].set_visible(False)
  ax.tick_params(labelsize=9)
  return ax


def _cycle(n):
  return [COLOURS[i % len(COLOURS)] for i in range(n)]


def save(fig, path) -> Drawn:
  """Writes a PNG file atomically."""
  buffer = io.BytesIO()
  fig.savefig(buffer, format='png')
  paths.write_bytes(path, buffer.getvalue())
  return Drawn(path)
