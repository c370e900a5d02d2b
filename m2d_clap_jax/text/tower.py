"""A BERT as a pure function of its parameters, frozen or in training, with its tokenizer.

Shapes: R sentences of a batch, L tokens, E width of the embedding.
"""
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from m2d_clap_jax.text import flax_bert

# Sentences are padded to the next of these lengths: few shapes, so few compilations.
LENGTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


def mean(hidden: jax.Array, mask: jax.Array) -> jax.Array:
  """Hidden states [R, L, E] -> [R, E], their mean over the attention mask [R, L] (GTE-base)."""
  weights = mask[..., None].astype(jnp.float32)
  return (hidden * weights).sum(1) / weights.sum(1)


def first(hidden: jax.Array, mask: jax.Array) -> jax.Array:
  """-> [R, E], the first token's (BERT-base, of models of 2025)."""
  del mask
  return hidden[:, 0]


POOLINGS = {'mean': mean, 'cls': first}


class TextTower:
  """`tower(params, ids, mask)` -> sentence embeddings.

  Attributes: name; pooling; width E; max_length in tokens; params, float32, as loaded; pooler, what the weights have of
  BERT's pooling layer, which embeds nothing but belongs to a complete file.
  """

  def __init__(self, name_or_folder, *, pooling: str = 'mean', tensors=None, max_length: int = 512, dtype='float32'):
    """Loads weights and tokenizer; arguments and errors as of `TextEncoder`. dtype: of the matrix products."""
    self.name, self.pooling = str(name_or_folder), pooling
    flax_bert.check_kind(self.name, pooling, POOLINGS)
    folder = flax_bert.find_folder(name_or_folder, tensors=not tensors)
    self._module, config, self.params, self.pooler = flax_bert.load_model(folder, tensors, dtype)
    self._precision = 'highest' if dtype == 'float32' else None  # the same numbers on every kind of device
    self.width = config.hidden_size
    self.max_length = min(max_length, config.max_position_embeddings)
    self._tokenizer = flax_bert.load_tokenizer(folder)
    # A copy that nobody changes: transformers sets truncation anew at a call, which another thread may be in.
    backend = self._tokenizer.backend_tokenizer
    self._truncating = type(backend).from_str(backend.to_str())
    self._truncating.no_padding()
    self._truncating.enable_truncation(self.max_length)

  def __call__(self, params, ids: jax.Array, mask: jax.Array, keys: jax.Array | None = None) -> jax.Array:
    """Token ids and attention mask [R, L] -> [R, E], float32.

    keys: [R], one a sentence, for dropout at the rates of the model's config.json; None: no dropout. What a sentence
    loses is so a function of its own key alone, whatever parts a batch is computed in.
    """
    with jax.default_matmul_precision(self._precision):
      if keys is None:
        hidden = self._hidden(params, ids, mask, None)
      else:
        hidden = jax.vmap(lambda *own: self._hidden(params, own[0][None], own[1][None], own[2])[0])(ids, mask, keys)
    return POOLINGS[self.pooling](hidden.astype(jnp.float32), mask)

  def _hidden(self, params, ids, mask, key):
    """-> last hidden states [R, L, E]."""
    return self._module.apply(
        {'params': params}, ids, mask, jnp.zeros_like(ids), jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape), None,
        deterministic=key is None, rngs=None if key is None else {'dropout': key})[0]

  def tokens(self, sentences: Sequence[str]) -> list[list[int]]:
    """Token ids of each sentence, at most max_length. May be called from several threads at once."""
    return [each.ids for each in self._truncating.encode_batch(list(sentences))]

  def count(self, sentence: str) -> int:
    """Tokens of a sentence, none left out."""
    return len(self._tokenizer(sentence, verbose=False)['input_ids'])

  def length(self, tokens: Sequence[Sequence[int]]) -> int:
    """To how many tokens sentences are padded together."""
    longest = max(map(len, tokens))
    return min(next((size for size in LENGTHS if longest <= size), longest), self.max_length)


def padded(tokens: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
  """Lists of token ids -> ids and attention mask [R, length], int32."""
  ids, mask = np.zeros((2, len(tokens), length), np.int32)
  for i, row in enumerate(tokens):
    ids[i, :len(row)] = row
    mask[i, :len(row)] = 1
  return ids, mask
