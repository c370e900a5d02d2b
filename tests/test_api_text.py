"""Text, labels and fine-tuned heads of the Pipeline: scores by hand, and what a model lacks is said."""
import numpy as np
import pytest

import m2d_clap_jax
from m2d_clap_jax.errors import UserError
from tests.small_model import tiny_weights


def test_text_and_classification(model, music):
  labels = ['dog_bark', 'rain', 'violin']
  text = model.encode_text([f'{label.replace("_", " ")} can be heard' for label in labels])
  audio = model.encode_audio([music, music[:9000]])
  cosines = (audio @ text.T) / np.linalg.norm(audio, axis=1)[:, None] / np.linalg.norm(text, axis=1)
  np.testing.assert_allclose(model.classify([music, music[:9000]], labels=labels), cosines, atol=1e-5)
  np.testing.assert_allclose(model.classify(music, labels='dog_bark'), cosines[:1, :1], atol=1e-5)  # one label, not eight
  both = model.encode_labels(labels, ['{} can be heard', 'a recording of {}'])
  np.testing.assert_allclose(np.linalg.norm(both, axis=1), 1, atol=1e-6)
  with pytest.raises(UserError, match='no {} for the label'):
    model.classify(music, labels=labels, template='a sound')
  with pytest.raises(UserError, match='needs labels'):
    model.classify(music)


def test_models_without_a_clap_head_or_a_classifier_say_so(music):
  plain = m2d_clap_jax.load(tiny_weights(text_width=None))
  assert plain.features(music)[1] is None
  for call in (lambda: plain.encode_text(['a']), lambda: plain.encode_audio(music), lambda: plain.classify(music, labels=['a'])):
    with pytest.raises(UserError, match='no CLAP head'):
      call()
  for frames in (False, True):
    with pytest.raises(UserError, match='no fine-tuned head'):
      plain.logits(music, frames=frames)


@pytest.mark.parametrize('width', [480, 96], ids=['frames', 'mean patch'])
def test_logits_of_a_fine_tuned_head(music, width):
  rng = np.random.default_rng(0)
  tiny = tiny_weights()
  tiny.trees['head'] = {'kernel': rng.standard_normal((width, 3), np.float32), 'bias': np.ones(3, np.float32)}
  tiny.trees['head_stats'] = {'mean': rng.standard_normal(width, np.float32), 'var': np.full(width, 4, np.float32)}
  model = m2d_clap_jax.load(tiny)
  features = model.embed(music)
  if width == 96:
    features = features.reshape(1, 5, 96).mean(1)
  expected = (features - tiny.trees['head_stats']['mean']) / np.sqrt(4 + 1e-5) @ tiny.trees['head']['kernel'] + 1
  np.testing.assert_allclose(model.logits(music), expected, rtol=1e-4, atol=1e-5)
  frames, stamps = model.logits([music, music[:40000]], frames=True)
  features, same_stamps = model.encode_frames([music, music[:40000]])
  for i in range(2):
    x = features[i] if width == 480 else features[i].reshape(-1, 5, 96).mean(1)
    by_hand = (x - tiny.trees['head_stats']['mean']) / np.sqrt(4 + 1e-5) @ tiny.trees['head']['kernel'] + 1
    np.testing.assert_allclose(frames[i], by_hand, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(stamps[i], same_stamps[i])
  np.testing.assert_allclose(frames[0].mean(0), expected[0], rtol=1e-4, atol=1e-4)
  joined, stamps = model.logits(music.reshape(2, -1), frames=True)
  assert joined.shape == (2, 13, 3) and stamps.shape == (2, 13)


def test_a_text_encoder_with_other_weights_is_refused():
  tiny = tiny_weights()
  tiny.text_encoder['hash'] = '0123456789abcdef'
  with pytest.raises(UserError, match='has weights .*, but the model was trained with 0123456789abcdef'):
    m2d_clap_jax.load(tiny).encode_text(['a dog'])
  other = tiny_weights(text_width=64)
  with pytest.raises(UserError, match='has width 384, but the model expects 64'):
    m2d_clap_jax.load(other).encode_text(['a dog'])


@pytest.mark.parametrize('name, pooling', [('nvidia/NV-Embed-v2', 'eos'), ('openai/clip-vit-large-patch14', 'eos'),
                                           ('Alibaba-NLP/gte-large-en-v1.5', 'cls'), ('answerdotai/ModernBERT-base', 'cls'),
                                           ('Alibaba-NLP/gte-Qwen2-7B-instruct', 'eos'), ('roberta-base', 'cls')])
def test_a_text_encoder_that_is_no_bert_is_named_and_audio_works(name, pooling, music):
  tiny = tiny_weights()
  tiny.text_encoder.update(name=name, pooling=pooling)
  model = m2d_clap_jax.load(tiny)
  with pytest.raises(UserError, match=f'text encoder {name}: .*audio functions .* work'):
    model.encode_text(['a dog'])
  assert np.isfinite(model.encode_audio(music[:5000])).all()


def test_a_caption_of_more_tokens_than_count_is_told_once(model, capsys):
  fits = 'bell ' * 510  # and the two special tokens
  model.encode_text(['a dog', 'bell ' * 700, fits, 'a cat ' * 600])
  told = capsys.readouterr().err
  assert told.count('\n') == 1 and told.startswith("notice: text encoder minilm: sentence 1, 'bell bell") and (
      'has 702 tokens, of which only the first 512 are used; 1 more too long' in told), told
  model.encode_text([fits])
  assert not capsys.readouterr().err
