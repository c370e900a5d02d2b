"""Looking at a model in training: feature statistics, evaluations and figures."""
import functools
import json

import jax
import numpy as np

from m2d_clap_jax import paths, sharding
from m2d_clap_jax.data.batches import crop, whole_split
from m2d_clap_jax.data.read import Split
from m2d_clap_jax.eval import plots
from m2d_clap_jax.eval.features import statistics
from m2d_clap_jax.models import M2DCLAP
from m2d_clap_jax.models.masking import as_bool
from m2d_clap_jax.train.log import RunLog
from m2d_clap_jax.train.state import TrainState
from m2d_clap_jax.train.step import draw_mask

ENCODE_BATCH = 64
STATISTICS_CLIPS = 1024


class Observer:
  """Runs evaluators on the parameters of a running training, on all its devices, and writes what comes out.

  Args:
    split: the training clips.
    evaluators: name -> evaluator, see `eval.evaluators`.
  """

  def __init__(self, model: M2DCLAP, mesh, split: Split, evaluators: dict, log: RunLog):
    self._model, self._mesh, self._split, self._evaluators, self._log = model, mesh, split, evaluators, log
    features = functools.partial(_clip_features, model=model)
    # Every process gets the whole result, so that each can compute the same scores.
    self._features = jax.jit(features, out_shardings=sharding.replicated(mesh))
    self._project_text = jax.jit(functools.partial(_project_text, model=model))

  def encode(self, params, split: Split, limit: int | None = None):
    """-> (features [n, f * D], audio embeddings [n, E] or None, clips) of the first `limit` clips of a split."""
    count = min(split.num_clips, limit or split.num_clips)
    size = -(-min(ENCODE_BATCH, count) // self._mesh.size) * self._mesh.size
    outputs, clips = [], []
    for logmels, part in whole_split(split, self._model.input_size[1], size, limit):
      padded = np.pad(logmels, ((0, size - len(logmels)), (0, 0), (0, 0)))  # one shape, one compilation
      out = self._features(params, sharding.to_devices(self._mesh, sharding.own_part(padded)))
      outputs.append(jax.tree.map(lambda x, n=len(part): np.asarray(x)[:n], out))
      clips += part
    features, audio = zip(*outputs)
    return np.concatenate(features), None if audio[0] is None else np.concatenate(audio), clips

  def statistics(self, step: int, params):
    """Logs effective rank and the like of the features of the first training clips."""
    features, _, _ = self.encode(params, self._split, STATISTICS_CLIPS)
    self._log.write(step, {f'features/{name}': value for name, value in statistics(features).items()})

  def evaluate(self, step: int, params):
    """Runs the evaluators; logs and prints their scores, draws their figures and the curves so far."""
    for name, evaluator in self._evaluators.items():
      scalars, figures = evaluator(functools.partial(self.encode, params),
                                   functools.partial(self._project_text, params))
      self._log.write(step, {f'{name}/{key}': value for key, value in scalars.items()})
      told = [f'{key} {value:.1f}' if key.endswith('rank') else f'{key} {100 * value:.1f}%'
              for key, value in scalars.items()]
      self._log.note(f'step {step}: {name} ' + ', '.join(told))
      if self._log.active:
        paths.write_text(self._log.workdir / f'{name}.json', json.dumps({'step': step, **scalars}, indent=2))
        for key, draw in figures.items():
          draw(self._log.workdir / f'{name}_{key}.png', title=f'{name}, step {step}: {told[0]}')
    if self._log.active and step:
      plots.loss_curves(self._log.history(), self._log.workdir / 'curves.png')

  def draw_mask(self, state: TrainState):
    """Draws the first training clip with its mask of the first update."""
    if not self._log.active:
      return
    clip = self._split.clip(0)
    model = self._model
    mask = draw_mask(state.rng, state.step, 1, model=model)
    logmel = crop(clip.logmel, model.grid[1] * model.patch_size[1], 0.0).astype(np.float32)
    plots.masked_clip(logmel, np.asarray(as_bool(mask))[0], model.grid, model.patch_size,
                      self._log.workdir / 'mask.png', title=clip.key, captions=clip.captions)


def _clip_features(params, logmel, *, model):
  return model.apply({'params': params}, logmel, method='clip_features')


def _project_text(params, text, *, model):
  return model.apply({'params': params}, text, method='project_text')
