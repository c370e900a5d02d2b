"""The encoder protocol of MTEB, whose part for audio is MAEB, the Massive Audio Embedding Benchmark. Needs mteb.

  import mteb
  from m2d_clap_jax import maeb
  mteb.evaluate(maeb.Encoder('runs/clips'), mteb.get_benchmark('MAEB(v1)'))

Tasks with text (zero-shot classification, retrieval between audio and captions) are given CLAP embeddings; tasks of audio
alone (classification, clustering, pairs, reranking, retrieval of audio by audio) the features for transfer learning.

Source: https://embeddings-benchmark.github.io/mteb and arXiv 2602.16008. Alphabet: n rows, D width, E embedding.
"""
# ruff: noqa: E402 (the environment comes first)
import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault('USE_TF', '0')  # transformers, which mteb imports, fails on TensorFlow with Keras 3

import jax.numpy as jnp
import numpy as np
from datasets import Audio
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder

from m2d_clap_jax import api
from m2d_clap_jax.audio import decode
from m2d_clap_jax.audio.inputs import AudioClip
from m2d_clap_jax.losses import normalize

GROUP = 128  # rows that are in memory at once


class Encoder(AbsEncoder):
  """A model as mteb wants it; `encode` returns float32 arrays.

  Attributes: pipeline (Pipeline), mteb_model_meta (its description: name, fingerprint, modalities, parameters).
  """

  def __init__(self, model_name: 'str | api.Pipeline', revision: str | None = None, *, device: str | None = None,
               **options: Any):
    """model_name: what `m2d_clap_jax.load` opens, with its `options`, or a Pipeline.

    revision and device are mteb's; the device is that of JAX, and the revision the weights' fingerprint.
    """
    del revision, device
    self.pipeline = model_name if isinstance(model_name, api.Pipeline) else api.load(model_name, **options)
    self.mteb_model_meta = describe(self.pipeline)

  def encode(self, inputs, *, task_metadata, hf_split: str, hf_subset: str, prompt_type=None, **kwargs) -> np.ndarray:
    """A DataLoader over a data set with the columns `audio`, `text` or both -> embeddings [n, E] or [n, 5 * D].

    Audio of any length is embedded as by `Pipeline.embed`: windows of the model's crop, averaged by their length. A clip
    without samples counts as silence. Rows with both audio and text are the sum of both unit vectors.

    Raises:
      UserError: a recording is damaged, or the task needs text and the model has no CLAP head.
    """
    del hf_split, hf_subset, prompt_type, kwargs
    with_text = 'text' in task_metadata.modalities
    encode_audio = self.pipeline.encode_audio if with_text else self.pipeline.embed
    parts = []
    if 'audio' in inputs.dataset.column_names:
      files = inputs.dataset.select_columns('audio').cast_column('audio', Audio(decode=False))  # decoded by this package
      parts.append(np.concatenate([encode_audio(list(map(_clip, items))) for items in _groups(files, 'audio')]))
    if 'text' in inputs.dataset.column_names:
      lines = inputs.dataset.select_columns('text')
      parts.append(np.concatenate([self.pipeline.encode_text(texts) for texts in _groups(lines, 'text')]))
    return parts[0] if len(parts) == 1 else np.sum([normalize(jnp.asarray(part)) for part in parts], axis=0)


class _Clip(AudioClip):
  """A recording without samples is silence, since each row needs an embedding."""

  def blocks(self, sample_rate: int) -> Iterator[np.ndarray]:
    try:
      yield from super().blocks(sample_rate)
    except decode.NoSamples:
      yield np.zeros(1, np.float32)


def _clip(item: dict) -> AudioClip:
  """{'bytes', 'path'}, either of which may be None."""
  return _Clip(item['path'] or 'a recording of the data set', item['bytes'], 0)


def _groups(dataset, column: str) -> Iterator[list]:
  for start in range(0, len(dataset), GROUP):
    yield list(dataset[start:start + GROUP][column])


def describe(pipeline: api.Pipeline) -> ModelMeta:
  """What mteb records with results, and files them under: name and revision, which is the weights' fingerprint."""
  weights, network = pipeline.weights, pipeline.network
  clap = network.text_width is not None
  widths = [network.grid[0] * network.width] + [network.width] * clap
  parameters = weights.encoder_only().num_parameters
  return ModelMeta(
      loader=None, name=_name(weights.source), revision=pipeline.fingerprint, release_date=None, languages=['eng-Latn'],
      n_parameters=parameters, memory_usage_mb=round(4 * parameters / 2 ** 20, 1), max_tokens=None,
      embed_dim=sorted(widths), license=None, open_weights=None, public_training_code=None, public_training_data=None,
      framework=['JAX'], similarity_fn_name='cosine', use_instructions=False, training_datasets=None,
      modalities=['audio', 'text'] if clap else ['audio'])


def _name(source: str) -> str:
  """A name with one slash, as mteb wants: that on the Hub, or the last part of a path after 'm2d-clap-jax/'."""
  if source.startswith('hf://'):
    return source.removeprefix('hf://').partition('@')[0]
  return f'm2d-clap-jax/{os.path.basename(source.rstrip("/")) or "model"}'
