"""Public checkpoints come in and go out bit-identical, and what does not fit is named."""
import json
import subprocess
import sys

import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import save_file

from m2d_clap_jax import weights
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.models.posemb import sincos_2d
from m2d_clap_jax.weights import names, portable, public
from tests import reference

TINY = dict(heads=3, predictor_heads=4)  # what shapes do not tell: these heads are 32 and 16 wide
FOLDER = 'm2d_clap_vit_tiny-80x96p16x16-240128'


def complete(name):
  """A reference checkpoint with its fixed tables, as the files have them."""
  tensors = reference.state_dict(name)
  shapes = reference.shapes(name)
  for table in ('pos_embed', 'decoder_pos_embed'):
    columns = (shapes[table][1] - 1) // 5
    tensors[table] = sincos_2d(shapes[table][2], (5, columns))[None]
  return tensors | {'norm_stats': np.array([-7.1, 4.2], np.float32)}


def of_2025(tensors):
  """The same as the 2025 models are written: a projector of one block, an MLP for text, and a BERT's tensors inside."""
  shapes = {'audio_proj.sem_token': (1, 1, 96), 'audio_proj.norm.weight': (96,), 'audio_proj.norm.bias': (96,),
            'text_proj.0.weight': (96, 24), 'text_proj.0.bias': (96,), 'text_proj.2.weight': (96, 96),
            'text_proj.2.bias': (96,)}
  for name, shape in {'norm1.weight': (96,), 'norm1.bias': (96,), 'norm2.weight': (96,), 'norm2.bias': (96,),
                      'attn.qkv.weight': (288, 96), 'attn.qkv.bias': (288,), 'attn.proj.weight': (96, 96),
                      'attn.proj.bias': (96,), 'mlp.fc1.weight': (96, 96), 'mlp.fc1.bias': (96,),
                      'mlp.fc2.weight': (96, 96), 'mlp.fc2.bias': (96,)}.items():
    shapes[f'audio_proj.sem_blocks.0.{name}'] = shape
  kept = {name: value for name, value in tensors.items() if not name.startswith('audio_proj')}
  kept |= {name: reference.weight(name, shape) for name, shape in shapes.items()}
  text = {'embeddings.word_embeddings.weight': (50, 24), 'encoder.layer.0.output.dense.weight': (24, 96)}
  return ({name if name == 'logit_scale' else f'backbone.{name}': value for name, value in kept.items()}
          | {f'text_encoder.text_encoder.{name}': reference.weight(name, shape) for name, shape in text.items()})


def saved(folder, tensors, name=FOLDER, file='checkpoint-300.safetensors'):
  path = folder / name / file
  path.parent.mkdir(parents=True, exist_ok=True)
  save_file({key: np.ascontiguousarray(value).reshape(value.shape) for key, value in tensors.items()}, path)
  return path


def same(actual, expected):
  assert set(actual) == set(expected)
  for name, value in expected.items():
    assert actual[name].dtype == value.dtype and actual[name].shape == value.shape, name
    assert actual[name].tobytes() == value.tobytes(), name


LAYOUTS = {
    'clap_tiny': lambda: (complete('clap_tiny'), FOLDER),
    'm2d_tiny': lambda: (complete('m2d_tiny'), 'm2d_vit_tiny-80x96p16x16-221006'),
    'msm_mae_tiny': lambda: (complete('msm_mae_tiny'), 'msm_mae_vit_tiny-80x96p16x16-220924'),
    'base': lambda: (complete('m2d_clap_vit_base-80x608p16x16'), 'm2d_clap_vit_base-80x608p16x16-240128'),
    '2025': lambda: (of_2025(complete('clap_tiny')), 'm2d_clap_vit_tiny-80x96p16x16p16kpBpTI-250327'),
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_in_and_out_again_is_bit_identical_in_every_tensor(layout, tmp_path):
  tensors, folder = LAYOUTS[layout]()
  heads = {} if layout == 'base' else TINY
  loaded = weights.read(saved(tmp_path, tensors, folder), **heads)
  same(public.public_tensors(loaded), tensors)
  portable.save_portable(loaded, tmp_path / 'portable')
  again = weights.read(tmp_path / 'portable')
  same(public.public_tensors(again), tensors)
  assert again.model == loaded.model and again.fingerprint == loaded.fingerprint
  assert again.text_encoder == loaded.text_encoder and again.complete


def test_flax_to_torch_and_back_is_bit_identical():
  loaded = weights.Weights(model=dict(reference.TINY, text_width=8), trees={})
  rng = np.random.default_rng(0)
  trees = {tree: {path: rng.standard_normal(shape, np.float32) for path, shape in shapes.items()}
           for tree, shapes in weights.expected_shapes(loaded.network()).items()}
  back = names.to_flax(names.to_torch(trees, (16, 16)))
  for tree, leaves in trees.items():
    same(back[tree], leaves)


def test_every_rule_reads_the_same_in_both_directions():
  for rule in names.RULES:
    name = rule.name.replace('#', '7')
    tree, path = names.flax_path(name)
    assert (tree, path) == (rule.tree, rule.path.lstrip('/').replace('#', '7'))
    assert names.torch_name(tree, path) == name


def encoder_tensors(patch, columns, width=64, rows=None):
  """An encoder-only file of any patch size."""
  rows = rows or 80 // patch[0]
  shapes = {name: shape for name, shape in reference.shapes('m2d_tiny').items()
            if not name.startswith(('decoder', 'target', 'mask_token', 'norm_stats'))}
  shapes = {name: [width * size // 96 if size % 96 == 0 and name != 'pos_embed' else size for size in shape]
            for name, shape in shapes.items()}
  shapes['patch_embed.proj.weight'] = (width, 1, *patch)
  tensors = {name: reference.weight(name, shape) for name, shape in shapes.items() if name != 'pos_embed'}
  return tensors | {'pos_embed': sincos_2d(width, (rows, columns))[None]}


@pytest.mark.parametrize('folder, patch, columns, rate, kind', [
    ('m2d_s_vit_base-80x608p80x2-230220', (80, 2), 304, 16000, 'M2D'),
    ('m2d_vit_base-80x200p16x4-230529', (16, 4), 50, 16000, 'M2D'),
    ('m2d_as_vit_base-80x1001p16x16-240213', (16, 16), 62, 16000, 'M2D'),
    ('m2d_clap_vit_base-80x608p16x16p32k-240128', (16, 16), 38, 32000, 'M2D'),
])
def test_released_shapes_are_recognised(tmp_path, folder, patch, columns, rate, kind):
  loaded = weights.read(saved(tmp_path, encoder_tensors(patch, columns), folder))
  network = loaded.network()
  assert (network.patch_size, network.grid, loaded.sample_rate) == (patch, (80 // patch[0], columns), rate)
  assert not loaded.complete and loaded.encoder_only().trees.keys() == loaded.trees.keys()
  assert weights.family(loaded).startswith(kind) and 'encoder only' in weights.family(loaded)


@pytest.mark.parametrize('wrap', [
    lambda t: {'model': t, 'epoch': 3}, lambda t: t, lambda t: {'state_dict': t},
    lambda t: {f'backbone.{name}': value for name, value in t.items()},
    lambda t: {'model': {f'module.ar.runtime.backbone.{name}': value for name, value in t.items()}},
], ids=['model', 'bare', 'state_dict', 'backbone', 'runtime'])
def test_pth_files_are_read_in_every_wrapping(tmp_path, wrap):
  import torch
  tensors = complete('clap_tiny')
  path = tmp_path / FOLDER / 'checkpoint-300.pth'
  path.parent.mkdir()
  torch.save(wrap({name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}), path)
  same(public.public_tensors(weights.read(path, **TINY)), tensors)


def test_a_fine_tuned_head_comes_in_and_goes_out(tmp_path):
  tensors = encoder_tensors((16, 16), 62)
  head = {'module.head.norm.running_mean': (320,), 'module.head.norm.running_var': (320,),
          'module.head.mlp.mlp.0.weight': (7, 320), 'module.head.mlp.mlp.0.bias': (7,)}
  wrapped = {f'module.ar.runtime.backbone.{name}': value for name, value in tensors.items()}
  wrapped |= {name: reference.weight(name, shape) for name, shape in head.items()}
  buffers = {'module.ar.runtime.to_spec.mel_scale.fb': np.zeros((201, 80), np.float32)}
  loaded = weights.read(saved(tmp_path, wrapped | buffers, 'm2d_vit_base-80x1001p16x16-221006-mr7_as_46ab246d'))
  assert loaded.trees['head']['kernel'].shape == (320, 7) and set(loaded.trees['head_stats']) == {'mean', 'var'}
  out = public.public_tensors(loaded)
  assert set(out) == set(wrapped) | {'module.ar.runtime.backbone.norm_stats'}
  same({name: out[name] for name in wrapped}, wrapped)


def broken(change):
  tensors = complete('clap_tiny')
  change(tensors)
  return tensors


@pytest.mark.parametrize('change, message', [
    (lambda t: t.pop('blocks.1.mlp.fc2.bias'), r'looks like M2D-CLAP .* missing \(1\): params/encoder/blocks_1/mlp/fc2'),
    (lambda t: t.update({'blocks.7000.norm1.bias': t['norm.bias']}), r'blocks up to number 7000 do not form an encoder'),
    (lambda t: t.update({'norm_stats': t['norm.bias']}), r'norm_stats has shape \(96,\)'),
    (lambda t: t.pop('logit_scale'), r'missing \(1\): params/logit_scale'),
    (lambda t: t.update({'norm.bias': t['norm.bias'][:7]}), r'of another shape \(1\): .*norm/bias \(7,\) instead'),
    (lambda t: t.pop('target_norm.bias'), 'missing .*target/norm/bias'),
    (lambda t: t.pop('cls_token'), 'lacks cls_token'),
    (lambda t: t.update({'pos_embed': t['pos_embed'][:, :21]}), r'pos_embed \(1, 21, 96\) instead'),
])
def test_tensors_that_do_not_fit_are_listed(tmp_path, change, message):
  with pytest.raises(UserError, match=message):
    weights.read(saved(tmp_path, broken(change)), **TINY)


def test_tensors_that_the_model_has_no_place_for_are_left_out_and_told(tmp_path, capsys):
  tensors = complete('m2d_tiny')
  clean = weights.read(saved(tmp_path, tensors, 'm2d_vit_tiny-80x96p16x16-221006'))
  extras = {'to_spec.a': np.zeros(2), 'to_spec.b': np.zeros(2), 'blocks.0.surprise': np.zeros(2)}
  assert capsys.readouterr().err == ''
  loaded = weights.read(saved(tmp_path, tensors | extras, 'm2d_vit_tiny-80x96p16x16-221007'))
  told = capsys.readouterr().err
  assert told.endswith('ignored 3 tensors that do not belong to the model: blocks.0.surprise, to_spec.* (2)\n')
  assert told.count('\n') == 1 and loaded.fingerprint == clean.fingerprint
  encoder = {name: value for name, value in tensors.items() if not name.startswith(('decoder_blocks', 'decoder_embed'))}
  assert not weights.read(saved(tmp_path, encoder, 'm2d_vit_tiny-80x96p16x16-221008')).complete
  assert 'decoder_norm.* (2), decoder_pos_embed, decoder_pred.* (2), mask_token' in capsys.readouterr().err


def test_both_names_of_a_predictors_blocks_are_read_and_the_plain_one_is_written(tmp_path):
  tensors = complete('clap_tiny')
  named = {name.replace('decoder_blocks.', 'decoder_blocks.layers.'): value for name, value in tensors.items()}
  assert named.keys() != tensors.keys()
  same(public.public_tensors(weights.read(saved(tmp_path, named), **TINY)), tensors)


def test_clap_files_for_inference_may_lack_the_logit_scale(tmp_path):
  tensors = {name: value for name, value in complete('clap_tiny').items()
             if not name.startswith(('decoder', 'target', 'mask_token', 'logit_scale'))}
  loaded = weights.read(saved(tmp_path, tensors), heads=3)
  assert loaded.default_logit_scale and loaded.nested('params')['logit_scale'] == np.float32(np.log(1 / 0.07))
  same(public.public_tensors(loaded), tensors)
  again = weights.read(portable.save_portable(loaded, tmp_path / 'portable'))
  assert again.default_logit_scale and again.fingerprint == loaded.fingerprint


def test_a_folder_name_that_contradicts_the_patches_is_an_error(tmp_path):
  with pytest.raises(UserError, match='patches are 16x16, but its folder .* says 80x2'):
    weights.read(saved(tmp_path, complete('clap_tiny'), 'm2d_vit_tiny-80x96p80x2-230101'))


def test_a_checkpoint_of_something_else_says_so(tmp_path):
  save_file({'layer1.conv.weight': np.zeros((3, 3), np.float32)}, tmp_path / 'resnet.safetensors')
  with pytest.raises(UserError, match='none of its 1 tensors belongs to an M2D-CLAP.*layer1.conv.weight'):
    weights.read(tmp_path / 'resnet.safetensors')
  with pytest.raises(UserError, match='no such file'):
    weights.read(tmp_path / 'missing.pth')
  with pytest.raises(UserError, match='holds 0 checkpoint files'):
    (tmp_path / 'nothing').mkdir()
    weights.read(tmp_path / 'nothing')


def test_the_pth_that_is_written_loads_strictly_into_a_torch_module_of_the_public_names(tmp_path):
  import torch
  loaded = weights.read(saved(tmp_path, complete('clap_tiny')), **TINY)
  path = public.save_pth(loaded, tmp_path / 'out', 300)
  assert path.parent.name.startswith('m2d_clap_vit_w96d2-80x96p16x16-') and path.name == 'checkpoint-300.pth'
  module = torch_module(torch, reference.shapes('clap_tiny'))
  content = torch.load(path, weights_only=False)  # as the authors do: a complete file holds a Namespace
  result = module.load_state_dict(content['model'], strict=True)
  assert not result.missing_keys and not result.unexpected_keys and content['epoch'] == 300
  assert vars(content['args']) == {
      'model': 'm2d_clap_vit_w96d2', 'input_size': [80, 96], 'patch_size': [16, 16], 'sample_rate': 16000,
      'norm_stats': pytest.approx([-7.1, 4.2]), 'mask_ratio': 0.7, 'decoder_depth': 2,
      'text_encoder': 'thenlper/gte-base', 'pooling': 'mean', 'epochs': 300}
  small = public.save_pth(loaded.encoder_only(), tmp_path / 'small', 300)
  names = set(torch.load(small, weights_only=True)['model'])
  assert names == {name for name in reference.shapes('clap_tiny')
                   if not name.startswith(('decoder', 'target', 'mask_token'))}


def torch_module(torch, shapes):
  """A module whose state dict has exactly these names and shapes."""
  root = torch.nn.Module()
  for name, shape in shapes.items():
    module = root
    *path, leaf = name.split('.')
    for part in path:
      if part not in module._modules:
        module.add_module(part, torch.nn.Module())
      module = module._modules[part]
    module.register_parameter(leaf, torch.nn.Parameter(torch.zeros(shape)))
  return root


def test_a_portable_folder_opens_without_orbax_tensorflow_torch_and_transformers(tmp_path):
  portable.save_portable(weights.read(saved(tmp_path, complete('clap_tiny')), **TINY), tmp_path / 'portable')
  code = f'''
import sys
import m2d_clap_jax
model = m2d_clap_jax.load({str(tmp_path / 'portable')!r})
print(model.embed([0.1] * 8000).shape, model.network.width)
print(*{{'orbax', 'tensorflow', 'torch', 'transformers', 'clu', 'ml_collections'}} & set(sys.modules))
'''
  result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert result.stdout.strip() == '(1, 480) 96', result.stderr


def test_a_portable_folder_with_a_damaged_description_is_refused(tmp_path):
  portable.save_portable(weights.read(saved(tmp_path, complete('clap_tiny')), **TINY), tmp_path / 'portable')
  config = tmp_path / 'portable' / 'config.json'
  assert json.loads(config.read_text())['model']['heads'] == 3
  config.write_text('{"m2d_clap_jax": 99}')
  with pytest.raises(UserError, match='m2d_clap_jax=99: must be 1, the format'):
    weights.read(tmp_path / 'portable')
  config.write_text('{"m2d_clap_jax": 1, "model": {}}')
  with pytest.raises(UserError, match='lacks sample_rate'):
    weights.read(tmp_path / 'portable')
  config.write_text('{')
  with pytest.raises(UserError, match='not valid JSON'):
    weights.read(tmp_path / 'portable')


def test_the_fingerprint_depends_on_what_inference_uses_alone(tmp_path):
  loaded = weights.read(saved(tmp_path, complete('clap_tiny')), **TINY)
  assert loaded.encoder_only().fingerprint == loaded.fingerprint
  params = traverse_util.flatten_dict(loaded.nested('params'), sep='/')
  params['encoder/norm/bias'] = params['encoder/norm/bias'] + 1e-3
  other = weights.Weights(model=loaded.model, trees={'params': params})
  assert other.fingerprint != loaded.fingerprint
