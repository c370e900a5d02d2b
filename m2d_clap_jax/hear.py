"""The common API of HEAR, the Holistic Evaluation of Audio Representations.

  hear-validator m2d_clap_jax.hear -m MODEL
  python3 -m heareval.embeddings.runner m2d_clap_jax.hear --model MODEL --tasks-dir TASKS

Results are tensors of the caller's kind: torch, TensorFlow or numpy, float32. Neither torch nor TensorFlow is imported
here; if the caller has imported one, the loaded model is a Module of it, as HEAR's tools require.

Source: https://hearbenchmark.com/hear-api.html. Alphabet: B sounds, S samples, T timestamps, D width of the encoder.
"""
import sys
from typing import Any

import numpy as np

from m2d_clap_jax import api
from m2d_clap_jax.errors import UserError


def load_model(model_file_path: str):
  """A run's workdir, a portable folder, a .pth or a .safetensors file, a released model's name -> a model for the functions below.

  Its attributes: sample_rate (Hz) of its input, scene_embedding_size and timestamp_embedding_size (both
  5 * D), and pipeline, the `Pipeline` within.

  Raises:
    UserError: there is no usable model.
  """
  pipeline = api.load(model_file_path)
  model = _module_class()()
  model.pipeline = pipeline
  model.sample_rate = pipeline.sample_rate
  model.scene_embedding_size = model.timestamp_embedding_size = pipeline.network.grid[0] * pipeline.network.width
  return model


def get_scene_embeddings(audio, model):
  """audio [B, S] mono at model.sample_rate, in [-1, 1] -> [B, 5 * D], frame features averaged over time."""
  return _like(audio, model.pipeline.embed(_waves(audio)))


def get_timestamp_embeddings(audio, model):
  """audio as above -> embeddings [B, T, 5 * D] and their timestamps [B, T] in ms.

  A timestamp is the centre of a time column of patches (16 frames of 10 ms: every 160 ms for most models, the first at
  75). A last column whose centre lies after the end of the sound is left out, unless it is the only one.
  """
  waves, logmel, patch = _waves(audio), model.pipeline.logmel, model.pipeline.network.patch_size[1]
  frames, _ = model.pipeline.encode_frames(waves)
  ms_per_frame = 1000 * logmel.hop / logmel.sample_rate  # frame t is centred on sample t * hop
  stamps = (np.arange(frames.shape[1]) * patch + (patch - 1) / 2) * ms_per_frame
  inside = max(1, np.count_nonzero(stamps <= 1000 * waves.shape[1] / logmel.sample_rate))
  stamps = np.broadcast_to(stamps[:inside].astype(np.float32), (len(waves), inside)).copy()
  return _like(audio, frames[:, :inside]), _like(audio, stamps)


class _Model:
  """The model when neither torch nor TensorFlow is in use."""


def _module_class() -> type:
  for library, path in (('torch', ('nn', 'Module')), ('tensorflow', ('Module',))):
    place: Any = sys.modules.get(library)
    if place is not None:
      for name in path:
        place = getattr(place, name)
      return place
  return _Model


def _waves(audio) -> np.ndarray:
  """Tensor or array -> numpy [B, S]."""
  waves = np.asarray(audio.detach().cpu() if _is_torch(audio) else audio)
  if waves.ndim != 2 or not waves.size:
    raise UserError(f'audio of shape {waves.shape} is not supported: give [sounds, samples], neither of them 0')
  return waves


def _like(audio, result: np.ndarray):
  """numpy array -> the kind of tensor that `audio` is, on its device."""
  if _is_torch(audio):
    return sys.modules['torch'].from_numpy(result.copy()).to(audio.device)
  tensorflow = sys.modules.get('tensorflow')
  if tensorflow is not None and isinstance(audio, tensorflow.Tensor):
    return tensorflow.convert_to_tensor(result)
  return result


def _is_torch(audio) -> bool:
  torch = sys.modules.get('torch')
  return torch is not None and isinstance(audio, torch.Tensor)
