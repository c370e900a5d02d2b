"""The sentence encoder as a function that can be trained: its names, its dropout, and its tokens."""
import concurrent.futures

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from m2d_clap_jax.text import TextEncoder, TextTower, flax_bert
from m2d_clap_jax.text.tower import padded

SENTENCES = ['a dog barks', 'rain on a roof', 'someone plays the piano in a hall and sings']


@pytest.fixture(scope='module')
def tower():
  return TextTower('minilm')


def arrays(tower, sentences=SENTENCES):
  tokens = tower.tokens(sentences)
  return padded(tokens, tower.length(tokens))


def test_parameters_go_back_to_their_names_in_the_file_bit_for_bit(tower):
  tensors = load_file(flax_bert.find_folder('minilm') / 'model.safetensors')
  back = flax_bert.to_torch(tower.params | tower.pooler)
  assert {name.removeprefix('bert.') for name in tensors} - set(back) <= {'embeddings.position_ids'}
  for name, value in back.items():
    np.testing.assert_array_equal(value, tensors[name], err_msg=name)
    assert value.dtype == np.float32 and value.flags.c_contiguous
  again = TextTower('minilm', tensors=back)
  jax.tree.map(np.testing.assert_array_equal, again.params | again.pooler, tower.params | tower.pooler)


def test_without_dropout_it_embeds_as_the_frozen_encoder_does(tower):
  np.testing.assert_allclose(jax.jit(tower)(tower.params, *arrays(tower)), TextEncoder('minilm')(SENTENCES), atol=2e-6)


def test_dropout_is_drawn_for_each_sentence_by_its_own_key(tower):
  ids, mask = arrays(tower)
  keys = jax.random.split(jax.random.key(0), len(ids))
  embed = jax.jit(tower)
  whole = embed(tower.params, ids, mask, keys)
  np.testing.assert_array_equal(whole, embed(tower.params, ids, mask, keys))
  for i in range(len(ids)):
    np.testing.assert_allclose(embed(tower.params, ids[i:i + 1], mask[i:i + 1], keys[i:i + 1])[0], whole[i], atol=2e-6)
  same = np.asarray(embed(tower.params, ids[[0, 0]], mask[[0, 0]], keys[:2]))
  assert np.abs(same[0] - same[1]).max() > 1e-2
  assert np.abs(whole - embed(tower.params, ids, mask)).max() > 1e-2


def test_every_parameter_gets_a_gradient(tower):
  grads = jax.jit(jax.grad(lambda params: tower(params, *arrays(tower)).std()))(tower.params)
  flat = flax_bert.to_torch(grads)
  assert all(np.abs(value).max() > 0 for name, value in flat.items() if not name.endswith('key.bias'))


def test_threads_tokenise_as_one_does(tower):
  sentences = [' '.join(['bell'] * n) for n in range(1, 700, 7)]
  alone = [tower.tokens([each])[0] for each in sentences]
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    together = list(pool.map(lambda each: tower.tokens([each])[0], sentences))
  assert together == alone
  assert max(map(len, alone)) == tower.max_length == 512
