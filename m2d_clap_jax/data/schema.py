"""One record of a data folder: a clip's log-mel spectrogram, its captions, their embeddings and its labels.

Large arrays are stored as raw little-endian bytes, so that a reader needs one `decode_raw` and no parsing of lists.
"""
import dataclasses

import numpy as np

from m2d_clap_jax.data.tfrecord import Example
from m2d_clap_jax.errors import UserError

VERSION = 1


@dataclasses.dataclass
class Record:
  """A clip as it is stored in a data folder.

  Attributes:
    key: file name relative to the audio root; unique within a split.
    logmel: [F, T] float16, not standardised.
    captions: the captions' texts; empty where only embeddings are known (the authors' folders).
    caption_embeddings: [n, E] float16 or float32, or None in a folder prepared without a text encoder.
    labels: class names, none to many.
  """
  key: str
  logmel: np.ndarray
  captions: list = dataclasses.field(default_factory=list)
  caption_embeddings: np.ndarray | None = None
  labels: list = dataclasses.field(default_factory=list)


def encode(clip):
  """Record -> bytes of a tf.train.Example."""
  if clip.logmel.dtype != np.float16 or clip.logmel.ndim != 2:
    raise ValueError(f'{clip.key}: logmel must be [F, T] float16, not {clip.logmel.shape} {clip.logmel.dtype}')
  example = Example()
  feature = example.features.feature
  embeddings = b'' if clip.caption_embeddings is None else _raw(clip.caption_embeddings)
  for name, values in {'key': [clip.key.encode()], 'logmel': [_raw(clip.logmel)], 'caption_embeddings': [embeddings],
                       'captions': [text.encode() for text in clip.captions],
                       'labels': [text.encode() for text in clip.labels]}.items():
    feature[name].bytes_list.value[:] = values
    feature[name].bytes_list.SetInParent()  # a list without values is there, too
  feature['num_frames'].int64_list.value.append(clip.logmel.shape[1])
  return example.SerializeToString(deterministic=True)


def decode(data, meta):
  """bytes of a record, prepare.json's dict -> Record. Raises ValueError or IndexError where the bytes are not such a
  record."""
  try:
    feature = Example.FromString(data).features.feature
  except Exception as e:  # protobuf's DecodeError, whose class depends on its backend
    raise ValueError(f'not a tf.train.Example: {e}') from e
  missing = [name for name in ('key', 'logmel', 'num_frames', 'caption_embeddings') if name not in feature]
  if missing:
    raise ValueError(f'lacks {", ".join(missing)}')
  frames = feature['num_frames'].int64_list.value[0]
  logmel = np.frombuffer(feature['logmel'].bytes_list.value[0], '<f2').reshape(meta['logmel']['n_mels'], frames)
  if (logmel.view('<u2') & 0x7fff).max(initial=0) >= 0x7c00:  # the exponent of NaN and infinity: 6 times isfinite's speed
    raise ValueError('its log-mel holds NaN or infinity')
  embeddings = None
  if meta['text_encoder']:
    raw = np.frombuffer(feature['caption_embeddings'].bytes_list.value[0], meta['embedding_dtype'])
    embeddings = raw.reshape(-1, meta['text_encoder']['width'])
  return Record(
      key=feature['key'].bytes_list.value[0].decode(),
      logmel=logmel,
      captions=[text.decode() for text in feature['captions'].bytes_list.value],
      caption_embeddings=embeddings,
      labels=[text.decode() for text in feature['labels'].bytes_list.value])


def tf_features(meta):
  """Features for `tf.io.parse_example`: key, logmel, caption_embeddings as raw strings, num_frames, ragged texts.

  `tf.io.decode_raw` gives logmel as float16 (F x num_frames) and the embeddings as `meta['embedding_dtype']`.
  """
  import tensorflow as tf
  check_version(meta)
  raw = tf.io.FixedLenFeature([], tf.string)
  texts = tf.io.RaggedFeature(tf.string)
  return {'key': raw, 'logmel': raw, 'num_frames': tf.io.FixedLenFeature([], tf.int64), 'caption_embeddings': raw,
          'captions': texts, 'labels': texts}


def tfds_features(meta):
  """The same record for TensorFlow Datasets, which turns the raw bytes into arrays by itself."""
  import tensorflow_datasets as tfds
  check_version(meta)
  texts = tfds.features.Sequence(tfds.features.Text())
  features = {
      'key': tfds.features.Text(),
      'logmel': tfds.features.Tensor(shape=(meta['logmel']['n_mels'], None), dtype=np.float16, encoding='bytes'),
      'num_frames': tfds.features.Scalar(np.int64),
      'captions': texts,
      'labels': texts,
  }
  if meta['text_encoder']:
    features['caption_embeddings'] = tfds.features.Tensor(
        shape=(None, meta['text_encoder']['width']), dtype=np.dtype(meta['embedding_dtype']), encoding='bytes')
  return tfds.features.FeaturesDict(features)


def check_version(meta):
  """Raises UserError for a folder written by another version of this schema."""
  if meta.get('schema') != VERSION:
    raise UserError(f'prepare.json: schema {meta.get("schema")!r} where this version reads {VERSION}: '
                    'prepare the data again with `m2d-clap prepare`')


def _raw(array):
  return np.ascontiguousarray(array, array.dtype.newbyteorder('<')).tobytes()
