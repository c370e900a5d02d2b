"""Audio and text in, embeddings and scores out: `load` opens a model, `Pipeline` runs it.

Alphabet: B clips, S samples, T time columns (patches), D width of the encoder, E embedding, C classes.
"""
import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from m2d_clap_jax import sharding
from m2d_clap_jax.audio import LogMel
from m2d_clap_jax.audio.chunks import Chunk, Chunker
from m2d_clap_jax.audio.inputs import as_clips
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.models import inference
from m2d_clap_jax.processor import jit_batches
from m2d_clap_jax.startup import keep_memory
from m2d_clap_jax.weights import Weights, family, read

TEMPLATE = '{} can be heard'  # turns a label into a caption for zero-shot classification
# Tokens that the semantic projector sees at once: 64 chunks of 190. Its cost grows with their square.
MOST_TOKENS = 64 * 190
FEWEST_TEXTS = 8  # that are projected at once: filled up
# Batches: XLA computes those of one thread in turn, which leaves cores idle where batches are small. Two full ones at once
# take more memory and no less time.
AT_ONCE = 2


def load(path, *, dtype: str = 'float32', batch_size: int = 32, pad_short: bool | None = None, **overrides) -> 'Pipeline':
  """Opens a run's workdir, a portable folder, a .pth or a .safetensors file, a released model by its name (`m2d-clap
  models` lists them), or hf://ORGANISATION/NAME, for inference.

  Args:
    dtype: of the matrix products, 'float32' or 'bfloat16'.
    batch_size: chunks (of 6.08 s, for most models) that each device of this process handles at a time.
    pad_short: whether recordings shorter than the model's crop are padded with silence to it, as in training. None: for
      models trained by this package; for the authors' files not, as in their runtime.
    overrides: values that a public file lacks or states wrongly: sample_rate, text_encoder (name or folder), fields of
      `M2DCLAP` such as input_size.

  Raises:
    UserError: there is no usable model.
  """
  keep_memory()
  return Pipeline(path if isinstance(path, Weights) else read(path, **overrides), dtype=dtype, batch_size=batch_size,
                  pad_short=pad_short)


class Pipeline:
  """A model ready for inference. An embedding depends on its own clip only, not on the rest of the call.

  Audio is one array [S], a batch [B, S] or [B, channels, S], a list of arrays of different lengths, or file paths, of
  any length. It is resampled, mixed to mono and cut into chunks of the length that the model was trained on (the last
  chunk keeps its own length), and the chunks' time columns are joined. `sample_rate` is that of the arrays in Hz; None
  means the model's.

  Attributes: network (M2DCLAP), variables (its Flax variables), logmel, sample_rate, weights, fingerprint, classes (of
  a fine-tuned head, or None), padded_to (frames that shorter recordings are padded to, or 0).
  """

  def __init__(self, weights: Weights, *, dtype: str = 'float32', batch_size: int = 32,
               pad_short: bool | None = None):
    self.weights = weights
    self._mesh = sharding.make_mesh(devices=jax.local_devices())
    self.network = weights.network(dtype).clone(platform=sharding.platform(self._mesh))
    self.sample_rate = weights.sample_rate
    self.logmel = LogMel.for_rate(weights.sample_rate)
    self.classes = weights.classes
    tables = weights.trees.get('tables', {})
    variables = {'params': {name: tree for name, tree in weights.nested('params').items() if name != 'predictor'}}
    if 'pos_embed' in tables:
      variables['tables'] = {'pos_embed': np.asarray(tables['pos_embed'])}
    self._everywhere = jax.device_put(variables, sharding.replicated(self._mesh))
    self.variables = jax.tree.map(lambda x: x.addressable_data(0), self._everywhere)  # not a copy
    self._batch_size = batch_size * self._mesh.size
    frames = self.network.input_size[1]
    self._as_is = Chunker(self.logmel, frames=frames, patch=self.network.patch_size[1], columns=self.network.grid[1],
                          pad=self.network.norm_stats[0])
    self.padded_to = weights.padded_to if pad_short is None else pad_short and (weights.padded_to or frames)
    self._chunker = dataclasses.replace(self._as_is, shortest=self.padded_to)
    self._pooled = jit_batches(functools.partial(inference.pooled, network=self.network), self._batch_size)
    self._columns = jit_batches(functools.partial(inference.columns, network=self.network), self._batch_size,
                                static_argnames='layers')
    self._project = jax.jit(functools.partial(inference.project, network=self.network))
    self._project_text = jax.jit(functools.partial(inference.project_text, network=self.network))

  def __repr__(self) -> str:
    seconds = self.network.input_size[1] * self.logmel.hop / self.sample_rate
    about = self.weights.text_encoder
    text = f"captions by {about['name']}" if about else 'no captions'
    return f'Pipeline({family(self.weights)}; chunks of {seconds:g} s; {text}; from {self.weights.source or "memory"})'

  @property
  def fingerprint(self) -> str:
    return self.weights.fingerprint

  def embed(self, waves, sample_rate: int | None = None) -> np.ndarray:
    """-> [B, 5 * D] clip embeddings for transfer learning: frame features averaged over time."""
    return np.stack(list(self._means(as_clips(waves, self._rate(sample_rate)))))

  def encode_audio(self, waves, sample_rate: int | None = None) -> np.ndarray:
    """-> [B, E] CLAP audio embeddings, not normalised; UserError without a CLAP head."""
    self._need_clap()
    _, embeddings = self.features(waves, sample_rate)
    assert embeddings is not None
    return embeddings

  def features(self, waves, sample_rate: int | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Both kinds in one pass: ([B, 5 * D] of `embed`, [B, E] of `encode_audio` or None without a CLAP head)."""
    clips = as_clips(waves, self._rate(sample_rate))
    if self.network.text_width is None:
      return np.stack(list(self._means(clips))), None
    if self.network.audio_projector == 'mlp':
      means = np.stack(list(self._means(clips)))
      patches = means.reshape(len(means), -1, self.network.width).mean(axis=1)
      return means, np.asarray(self._project(self.variables, patches[:, None], np.ones((len(means), 1), bool)))
    pairs = [(frames.mean(axis=0), self._semantic(frames)) for frames, _ in self._frames(clips, self._chunker)]
    return np.stack([mean for mean, _ in pairs]), np.stack([embedding for _, embedding in pairs])

  def encode_frames(self, waves, sample_rate: int | None = None, *, layer: int | str | None = None):
    """-> frame features [B, T, 5 * D] and time stamps [B, T] in ms.

    A frame holds the embeddings of one time column's patches side by side, lowest frequencies first. For clips of
    different lengths both are lists of B arrays. Short clips are not padded (see `load`).

    Args:
      layer: None for the encoder's output, its final norm included. K from 1 to the number of blocks, or from -1 down
        from the last one: the output of block K before any norm. 'all': that of all blocks, [blocks, B, T, 5 * D], or
        for clips of different lengths a list of [blocks, T, 5 * D].
    """
    layers = self._layers(layer)
    features, stamps = self._stamped(as_clips(waves, self._rate(sample_rate)), layers)
    if layers:
      features = [np.moveaxis(each, 1, 0) if layer == 'all' else each[:, 0] for each in features]
    joined, stamps = _stacked(features, stamps)
    return (np.moveaxis(joined, 0, 1) if layer == 'all' and isinstance(joined, np.ndarray) else joined), stamps

  def encode_text(self, texts: Sequence[str]) -> np.ndarray:
    """-> [n, E] captions in the space of `encode_audio`, not normalised; UserError without a CLAP head."""
    self._need_clap()
    embeddings = self.text_encoder(texts)
    count = max(FEWEST_TEXTS, 1 << (len(embeddings) - 1).bit_length())  # few shapes, so few compilations
    padded = np.pad(embeddings, ((0, count - len(embeddings)), (0, 0)))
    return np.asarray(self._project_text(self.variables, padded))[:len(embeddings)]

  def classify(self, waves, sample_rate: int | None = None, labels: Sequence[str] = (),
               template: str | Sequence[str] = TEMPLATE) -> np.ndarray:
    """Zero-shot classification -> [B, C] cosine similarities of clips and labels.

    Args:
      labels: C class names, or captions with template='{}'.
      template: turns a label into a caption; the normalised embeddings of several templates are averaged.
    """
    self._need_clap()
    if not len(labels):
      raise UserError('classify needs labels, such as labels=["dog", "rain"]')
    return _unit(self.encode_audio(waves, sample_rate)) @ self.encode_labels(labels, template).T

  def encode_labels(self, labels: Sequence[str], template: str | Sequence[str] = TEMPLATE) -> np.ndarray:
    """-> [C, E] unit vectors of the labels' captions; template as in `classify`."""
    labels, templates = ([each] if isinstance(each, str) else list(each) for each in (labels, template))
    captions = [_fill(each, label) for each in templates for label in labels]
    embedded = _unit(self.encode_text(captions)).reshape(len(templates), len(labels), -1)
    return _unit(embedded.mean(axis=0))

  def logits(self, waves, sample_rate: int | None = None, *, frames: bool = False):
    """-> [B, C] scores of a fine-tuned model's head, before softmax or sigmoid; UserError without a head.

    With frames: the head on each time column -> [B, T, C] and time stamps [B, T] in ms, or lists as returned by
    `encode_frames`. Their mean over time is the score of the clip.
    """
    if 'head' not in self.weights.trees:
      raise UserError(f'{self.weights.source}: has no fine-tuned head; use classify(...), which compares with captions')
    if not frames:
      return self._head(self.embed(waves, sample_rate))
    features, stamps = self._stamped(as_clips(waves, self._rate(sample_rate)))
    return _stacked([self._head(each) for each in features], stamps)

  def _head(self, x: np.ndarray) -> np.ndarray:
    """Features [n, 5 * D] -> [n, C]."""
    return inference.head(x, self.weights.trees['head'], self.weights.trees['head_stats'], network=self.network)

  @functools.cached_property
  def text_encoder(self):
    """The captions' frozen sentence encoder, loaded on first use: list of str -> [n, C] float32."""
    from m2d_clap_jax.text import TextEncoder
    about = self.weights.text_encoder
    if about is None:
      raise UserError(f'{self.weights.source}: does not state its sentence encoder; pass load(..., text_encoder=NAME)')
    encoder = TextEncoder(about['name'], pooling=about['pooling'], tensors=self.weights.text or None)
    if about['hash'] and encoder.weights_hash != about['hash']:
      raise UserError(f'text encoder {about["name"]!r} has weights {encoder.weights_hash}, but the model was trained '
                      f'with {about["hash"]}: pass load(..., text_encoder=FOLDER) with the same weights')
    if encoder.width != self.network.text_width:
      raise UserError(f'text encoder {about["name"]!r} has width {encoder.width}, but the model expects '
                      f'{self.network.text_width}: pass load(..., text_encoder=NAME) with the one it was trained with')
    return encoder

  def chunks(self, waves, sample_rate: int | None = None) -> Iterator[Chunk]:
    """Yields the chunks of raw log-mel that the network receives, clip by clip."""
    return self._chunker.cut(as_clips(waves, self._rate(sample_rate)))

  def _rate(self, sample_rate: int | None) -> int:
    return self.sample_rate if sample_rate is None else sample_rate

  def _need_clap(self):
    if self.network.text_width is None:
      raise UserError(f'{self.weights.source}: has no CLAP head, so it cannot handle text; use embed(...)')

  def _means(self, clips) -> Iterator[np.ndarray]:
    """Yields the mean frame features [5 * D] of each clip, in order."""
    sums: dict[int, np.ndarray] = {}
    counts = np.zeros(len(clips), int)
    for chunk, value in self._run(self._pooled, clips, self._chunker):
      # In float64 and by chunk number: the order in which chunks were computed must not matter.
      sums[chunk.clip] = sums.get(chunk.clip, 0) + value.astype(np.float64)
      counts[chunk.clip] += chunk.columns
    for i in range(len(clips)):
      yield (sums[i] / counts[i]).astype(np.float32)

  def _frames(self, clips, chunker: Chunker, layers: tuple[int, ...] = ()) -> Iterator[tuple[np.ndarray, float]]:
    """Yields (frame features [T, 5 * D], or [T, L, 5 * D] of L layers, seconds) of each clip, in order."""
    parts: dict[int, dict[int, np.ndarray]] = {}
    samples = [0] * len(clips)
    for chunk, value in self._run(functools.partial(self._columns, layers=layers), clips, chunker):
      parts.setdefault(chunk.clip, {})[chunk.number] = value[:chunk.columns]
      samples[chunk.clip] = max(samples[chunk.clip], chunk.samples)
    for i in range(len(clips)):
      chunks = parts.pop(i)
      yield np.concatenate([chunks[number] for number in sorted(chunks)]), samples[i] / self.sample_rate

  def _stamped(self, clips, layers: tuple[int, ...] = ()) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Frame features of each clip, as from `_frames`, and their time stamps [T] in ms."""
    pairs = [(frames, (np.arange(len(frames)) * (seconds / len(frames)) * 1000).astype(np.float32))
             for frames, seconds in self._frames(clips, self._as_is, layers)]
    features, stamps = map(list, zip(*pairs))
    return features, stamps

  def _layers(self, layer: int | str | None) -> tuple[int, ...]:
    """`layer` of encode_frames -> numbers of blocks from 1."""
    depth = self.network.depth
    if layer is None or layer == 'all':
      return tuple(range(1, depth + 1)) if layer else ()
    if isinstance(layer, bool) or not isinstance(layer, int | np.integer) or not 1 <= abs(layer) <= depth:
      raise UserError(f"layer={layer!r}: the encoder has {depth} blocks: give 1 to {depth}, -{depth} to -1, or 'all'")
    return (int(layer) % (depth + 1),)

  def _run(self, function, clips, chunker: Chunker) -> Iterator[tuple[Chunk, np.ndarray]]:
    """Runs function(variables, logmel, columns) on all clips' chunks; yields each chunk with its row of the result.

    Meanwhile the host prepares the next batch. Full ones are computed one after the other, smaller ones two at a time.
    """
    def compute(batch):
      return np.asarray(self._start(function, batch.logmel, batch.columns))
    running: deque[tuple[list[Chunk], Callable[[], np.ndarray]]] = deque()
    with ThreadPoolExecutor(AT_ONCE) as pool:
      for batch in chunker.batches(clips, self._batch_size):
        if len(running) == AT_ONCE:
          chunks, result = running.popleft()
          yield from zip(chunks, result())
        if len(batch.chunks) == self._batch_size:
          result = functools.partial(np.asarray, self._start(function, batch.logmel, batch.columns))  # not waited for yet
        else:
          result = pool.submit(compute, batch).result
        running.append((batch.chunks, result))
      for chunks, result in running:
        yield from zip(chunks, result())

  def _start(self, function, logmel, columns):
    """function(variables, logmel, columns), on all devices if their number divides the batch, else on the first."""
    if len(logmel) % self._mesh.size:
      return function(self.variables, logmel, columns)
    with jax.set_mesh(self._mesh):
      return function(self._everywhere, *jax.device_put((logmel, columns), sharding.over_batch(self._mesh)))

  def _semantic(self, frames: np.ndarray) -> np.ndarray:
    """Frame features [T, 5 * D] -> [E] by the semantic projector, which attends to all patches of a clip.

    Clips of more than MOST_TOKENS patches (6.5 minutes) are projected in parts, which are averaged by their length.
    """
    rows = self.network.grid[0]
    most = MOST_TOKENS // rows
    total = np.zeros(self.network.width)
    for start in range(0, len(frames), most):
      part = frames[start:start + most]
      tokens = part.reshape(-1, self.network.width)
      size = max(256, 1 << (len(tokens) - 1).bit_length())  # few lengths, so few compilations
      valid = np.arange(size) < len(tokens)
      tokens = np.pad(tokens, ((0, size - len(tokens)), (0, 0)))
      total += len(part) * np.asarray(self._project(self.variables, tokens[None], valid[None]))[0]
    return (total / len(frames)).astype(np.float32)


def _stacked(features: list[np.ndarray], stamps: list[np.ndarray]):
  """Stacks the clips' arrays if all have the same length; otherwise returns the lists unchanged."""
  if len({len(each) for each in stamps}) == 1:
    return np.stack(features), np.stack(stamps)
  return features, stamps


def _unit(x: np.ndarray) -> np.ndarray:
  return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.float32(1e-12))


def _fill(template: str, label: str) -> str:
  if '{}' not in template:
    raise UserError(f'template {template!r} has no {{}} for the label; add it, as in {TEMPLATE!r}')
  return template.replace('{}', label.replace('_', ' '))
