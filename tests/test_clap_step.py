"""Stage 2: what is trained, what is not, and that it equals the authors' implementation in float32."""
import functools
import json
import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from safetensors.numpy import save_file
from transformers import BertConfig, FlaxBertModel

from m2d_clap_jax import sharding
from m2d_clap_jax.models import M2DCLAP
from m2d_clap_jax.models.posemb import sincos_2d
from m2d_clap_jax.text import TextTower, flax_bert
from m2d_clap_jax.train.clap_step import AUDIO_ENCODER, apply_gradients, clap_loss, clap_step, create_state
from m2d_clap_jax.train.optim import decays, make_optimizer, warmup_cosine
from m2d_clap_jax.weights.names import flax_path, to_flax
from tests import reference

TEXT_PREFIX = 'text_encoder.'
SCHEDULE, FAST = warmup_cosine(2e-3, 2, 6), warmup_cosine(1e-2, 0, 100)


def golden():
  return reference.load('clap_stage2_tiny')


def save_encoder(folder, dropout):
  """The golden files' BERT as a folder: weights by their names, and a vocabulary of 64 words."""
  config = BertConfig(vocab_size=64, hidden_size=96, num_hidden_layers=2, num_attention_heads=3, intermediate_size=192,
                      max_position_embeddings=32, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
  (folder / 'config.json').write_text(json.dumps(config.to_dict()))
  words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'sound', 'number', 'kind', *map(str, range(40))]
  (folder / 'vocab.txt').write_text('\n'.join(words + [f'w{i}' for i in range(64 - len(words))]) + '\n')
  save_file({name: reference.weight(f'{TEXT_PREFIX}{TEXT_PREFIX}{name}', shape) for name, shape in text_shapes(config).items()},
            folder / 'model.safetensors')
  return folder


@functools.cache
def tiny_tower(dropout):
  folder = pathlib.Path(tempfile.mkdtemp())
  tower = TextTower(save_encoder(folder, dropout), pooling='cls')
  shutil.rmtree(folder)
  return tower


def text_shapes(config):
  tree = FlaxBertModel(config, _do_init=False).params_shape_tree
  tensors = flax_bert.to_torch(jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), dict(tree)))
  return {name: value.shape for name, value in tensors.items()}


@functools.cache
def setup(*, dropout=0.0, train_audio=False, schedule=SCHEDULE):
  """(model, tower, optimizer, state) with the reference's start weights."""
  tower = tiny_tower(dropout)
  model = M2DCLAP(**{**reference.TINY, 'norm_stats': (-7.1, 4.2), 'text_width': 96, 'audio_projector': 'semantic'})
  tx = make_optimizer(schedule)
  create = functools.partial(create_state, 0, model=model, text_shapes=tower.params, tx=tx, train_audio=train_audio)
  state = jax.jit(create)()
  flat = traverse_util.flatten_dict(state.params | state.frozen, sep='/')
  audio = {path: value for path, value in flat.items() if not path.startswith('text_encoder') and path != 'logit_scale'}
  names = {flax_path(name)[1]: name for name in audio_names()}
  for path, value in audio.items():
    shape = value.T.shape if path.endswith('kernel') else value.shape
    shape = (96, 1, 16, 16) if path == 'patch_embed/kernel' else shape
    (_, found), = to_flax({names[path]: reference.weight(names[path], shape)})['params'].items()
    audio[path] = jnp.asarray(found)
  trees = traverse_util.unflatten_dict(audio, sep='/')
  split = {name: name in AUDIO_ENCODER and not train_audio for name in trees}
  params = {name: tree for name, tree in trees.items() if not split[name]}
  params |= {'text_encoder': tower.params, 'logit_scale': state.params['logit_scale']}
  return model, tower, tx, state.replace(
      params=jax.tree.map(jnp.asarray, params), frozen={name: tree for name, tree in trees.items() if split[name]},
      tables={'pos_embed': jnp.asarray(sincos_2d(model.width, model.grid)[None])})


def audio_names():
  encoder = [name for name in reference.shapes('clap_tiny') if name.startswith(('cls_token', 'patch_embed', 'blocks', 'norm.'))]
  return encoder + [key.partition('/')[2] for key in golden() if key.startswith('paramnorm/audio_proj')]


def batch_of(file, i):
  return {'logmel': file[f'lms_{i}'], 'ids': file[f'ids_{i}'], 'mask': file[f'mask_{i}']}


def by_torch_name(params, tower):
  """Parameters -> {name in the reference: array}."""
  text = flax_bert.to_torch(params['text_encoder'] | tower.pooler)
  rest = traverse_util.flatten_dict({name: tree for name, tree in params.items() if name != 'text_encoder'}, sep='/')
  names = {flax_path(name)[1]: name for name in audio_names()} | {'logit_scale': 'logit_scale'}
  turned = {names[path]: np.asarray(value).T if path.endswith('kernel') else np.asarray(value) for path, value in rest.items()}
  return turned | {TEXT_PREFIX + name: value for name, value in text.items()}


def test_six_steps_equal_the_reference():
  model, tower, tx, state = setup()
  file, schedule = golden(), SCHEDULE
  step = jax.jit(functools.partial(apply_gradients, keys=None, model=model, tower=tower, tx=tx))
  for i in range(6):
    np.testing.assert_allclose(schedule(i), file['lrs'][i], rtol=1e-5, atol=1e-12)
    state, metrics = step(state, batch_of(file, i), file[f'visible_{i}'])
    for ours, theirs in {'loss': 'losses', 'grad_norm': 'gradnorms', 'logit_scale': 'logit_scales'}.items():
      np.testing.assert_allclose(metrics[ours], file[theirs][i], rtol=1e-4 if i else 1e-5, err_msg=f'{ours}, step {i}')
  found = by_torch_name(state.params, tower)
  for key in file:
    kind, _, name = key.partition('/')
    if kind == 'param':
      np.testing.assert_array_less(np.linalg.norm(found[name] - file[key]), 1e-4 * np.linalg.norm(file[key]), err_msg=name)
    elif kind == 'paramnorm':
      # Adam makes full steps of the rounding noise that key biases have for a gradient (softmax ignores them).
      tolerance = 1e-2 if name.endswith('key.bias') else 1e-3 if name.endswith('qkv.bias') else 1e-4
      np.testing.assert_allclose(np.linalg.norm(found[name]), file[key], rtol=tolerance, atol=1e-6, err_msg=name)


def test_every_gradient_norm_of_the_first_step_equals_the_reference():
  model, tower, _, state = setup()
  file = golden()

  def loss(params):
    return clap_loss(state.replace(params=params), batch_of(file, 0), file['visible_0'], None, model=model, tower=tower)
  grads, _ = jax.jit(jax.grad(loss, has_aux=True))(state.params)
  found = by_torch_name(grads, tower)
  expected = {key.partition('/')[2]: file[key] for key in file if key.startswith('gradnorm/') and '.pooler.' not in key}
  assert set(expected) == {name for name in found if '.pooler.' not in name}
  total = np.linalg.norm(list(expected.values()))
  for name, value in expected.items():
    np.testing.assert_allclose(np.linalg.norm(found[name]), value, rtol=1e-4, atol=1e-6 * total, err_msg=name)


def test_weight_decay_spares_what_the_reference_spares():
  _, tower, _, state = setup()
  spared = jax.tree.map(lambda decayed, p: np.full(p.shape, not decayed), decays(state.params), state.params)
  names = {name for name, value in by_torch_name(spared, tower).items() if value.all() and '.pooler.' not in name}
  assert names == {str(name) for name in golden()['nodecay'] if '.pooler.' not in name}


def large_batch(size=16, length=9):
  draw = np.random.default_rng(0)
  return {'logmel': (4 * draw.standard_normal((size, 80, 96)) - 7).astype(np.float16),
          'ids': draw.integers(5, 64, (size, length)).astype(np.int32),
          'mask': (np.arange(length) < draw.integers(3, length + 1, (size, 1))).astype(np.int32)}


def test_the_frozen_encoder_stays_bit_for_bit_and_has_no_optimizer_state():
  model, tower, tx, state = setup(dropout=0.1, schedule=FAST)
  step = jax.jit(functools.partial(clap_step, model=model, tower=tower, tx=tx, drop=(1, 2)))
  after = state
  for _ in range(3):
    after, metrics = step(after, large_batch())
  jax.tree.map(np.testing.assert_array_equal, after.frozen, state.frozen)
  assert set(after.frozen) == set(AUDIO_ENCODER)
  moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), after.params, state.params)
  assert min(jax.tree.leaves({key: value for key, value in moved.items() if key != 'text_encoder'})) > 0
  assert min(jax.tree.leaves(moved['text_encoder']['encoder'])) > 0
  count = sum(x.size for x in jax.tree.leaves(state.params))
  assert sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim) <= 2 * count
  assert metrics['logit_scale'] <= np.float32(4.6052)


def test_the_audio_encoder_learns_where_that_is_asked_for():
  model, tower, tx, state = setup(train_audio=True, schedule=FAST)
  assert not state.frozen
  after, _ = jax.jit(functools.partial(clap_step, model=model, tower=tower, tx=tx))(state, large_batch())
  moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), after.params['encoder'], state.params['encoder'])
  assert min(jax.tree.leaves(moved)) > 0


@functools.cache
def gradients(devices=1, accumulate=1):
  """Of one step with dropout and mask, as the change that plain gradient descent makes."""
  model, tower, _, state = setup(dropout=0.1)
  tx = optax.sgd(1.0)
  state = state.replace(opt_state=tx.init(state.params))
  mesh = sharding.make_mesh(jax.devices()[:devices])
  placed = jax.device_put(state, sharding.replicated(mesh)), jax.device_put(large_batch(), sharding.over_batch(mesh))
  step = functools.partial(clap_step, model=model, tower=tower, tx=tx, drop=(1, 2), accumulate=accumulate)
  after, metrics = jax.jit(step)(*placed)
  return jax.device_get(jax.tree.map(lambda a, b: a - b, state.params, jax.device_put(after.params, jax.devices()[0]))), metrics


@pytest.mark.parametrize('how', [{'devices': 8}, {'accumulate': 4}])
def test_neither_devices_nor_accumulation_change_losses_and_gradients(how):
  alone, metrics = gradients()
  other, other_metrics = gradients(**how)
  np.testing.assert_allclose(metrics['loss'], other_metrics['loss'], rtol=1e-5)
  scale = np.linalg.norm([np.linalg.norm(leaf) for leaf in jax.tree.leaves(alone)])
  for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(other)):
    assert np.linalg.norm(a - b) <= 1e-5 * scale


def test_dropout_and_mask_are_drawn_anew_each_step_and_again_for_the_same_step():
  model, tower, tx, state = setup(dropout=0.1)
  step = jax.jit(functools.partial(clap_step, model=model, tower=tower, tx=tx, drop=(1, 2)))
  loss = lambda number: float(step(state.replace(step=jnp.int32(number)), large_batch())[1]['loss'])
  assert loss(5) == loss(5) != loss(6)


def test_activations_of_the_frozen_encoder_are_not_kept():
  """By what the compiled program takes in memory, with short captions."""
  def temporary(train_audio):
    _, tower, _, _ = setup()
    model = M2DCLAP(**{**reference.TINY, 'depth': 4, 'text_width': 96, 'audio_projector': 'semantic'})
    tx = make_optimizer(warmup_cosine(1e-3, 0, 10))
    state = jax.eval_shape(functools.partial(create_state, 0, model=model, text_shapes=tower.params, tx=tx,
                                             train_audio=train_audio))
    step = jax.jit(functools.partial(clap_step, model=model, tower=tower, tx=tx))
    return step.lower(state, large_batch(64, 8)).compile().memory_analysis().temp_size_in_bytes
  assert temporary(False) < 0.5 * temporary(True)
