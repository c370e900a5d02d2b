"""Files of the authors' layouts give the numbers of the authors' runtime (float32, CPU), through the public API."""
import json
import shutil

import numpy as np
import pytest
import torch

import m2d_clap_jax
from m2d_clap_jax.models.posemb import sincos_2d
from m2d_clap_jax.text import flax_bert
from tests import reference
from tests.small_model import close

SECONDS = ('0.7', '10.0', '13.37')
TEXT = 'text_encoder.text_encoder.'
NAME_2025 = 'm2d_clap_vit_base-80x1001p16x16p16kpBpTI-2025'


def opened(folder, name, tensors, **options):
  """Writes a .pth into a folder of that name and opens it; the file, of half a gigabyte, is gone then."""
  path = folder / name / 'checkpoint-30.pth'
  path.parent.mkdir()
  torch.save({name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}, path)
  model = m2d_clap_jax.load(path, **options)
  path.unlink()
  return model


def tensors_of_2025(depth, norm_stats=(-7.2618, 4.3512)):
  """State dict under the names of the file, with `depth` blocks in the projector: MLP ratio 1 with one, 2 with three."""
  shapes = reference.shapes('clap_2025')
  block = {name: shape for name, shape in shapes.items() if '.sem_blocks.0.' in name}
  hidden = 768 * {1: 1, 3: 2}[depth]
  for name in block:
    shape = {'fc1.weight': [hidden, 768], 'fc1.bias': [hidden], 'fc2.weight': [768, hidden]}.get(
        name.partition('.mlp.')[2], block[name])
    shapes |= {name.replace('blocks.0', f'blocks.{i}'): shape for i in range(depth)}
  tensors = {name: reference.weight(name.removeprefix('backbone.'), shape) for name, shape in shapes.items()
             if not name.endswith(('pos_embed', 'norm_stats'))}
  return tensors | {'backbone.pos_embed': 0.97 * sincos_2d(768, (5, 62))[None],
                    'backbone.norm_stats': np.array(norm_stats, np.float32)}


def bert(folder):
  """The packaged MiniLM's tokenizer with the description of the BERT that the golden file holds."""
  shutil.copytree(flax_bert.find_folder('minilm'), folder, ignore=shutil.ignore_patterns('*.safetensors'))
  config = json.loads((folder / 'config.json').read_text())
  sizes = dict(hidden_size=768, num_hidden_layers=2, num_attention_heads=12, intermediate_size=3072)
  (folder / 'config.json').write_text(json.dumps(config | sizes))
  return str(folder)


@pytest.fixture(scope='module', params=[1, 3], ids=['one block', 'three blocks'])
def model(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp('2025')
  tensors = {name: value for name, value in tensors_of_2025(request.param).items() if not name.startswith(TEXT)}
  return opened(folder, NAME_2025, tensors)


@pytest.mark.parametrize('seconds', SECONDS)
def test_a_2025_model_embeds_audio_as_the_authors_do(model, seconds):
  golden = reference.load('clap_2025')
  wave = golden[f'wav_{seconds}'].astype(np.float32)
  frames, _ = model.encode_frames(wave)
  close(frames[:, :2], golden[f'frames_head_{seconds}'], 1e-4)
  close(frames[:, -1:], golden[f'frames_tail_{seconds}'], 1e-4)
  clip, audio = model.features(wave)
  close(clip, golden[f'clip_{seconds}'], 1e-4)
  depth = model.network.semantic_depth
  close(audio, golden[f'clap_{depth}_{seconds}'], 1e-4)
  assert model.network.semantic_mlp_ratio == {1: 1, 3: 2}[depth]


def test_a_2025_model_embeds_text_by_the_first_token_of_the_encoder_that_is_inside(tmp_path):
  folder = bert(tmp_path / 'bert')
  tensors = tensors_of_2025(1)
  model = opened(tmp_path, NAME_2025, tensors, text_encoder=folder)
  from transformers import AutoTokenizer, BertConfig, BertModel
  theirs = BertModel(BertConfig.from_pretrained(folder)).eval()
  theirs.load_state_dict({name.removeprefix(TEXT): torch.from_numpy(value) for name, value in tensors.items()
                          if name.startswith(TEXT)}, strict=True)
  captions = ['a dog barks twice', 'Rain on a tin roof, and distant thunder.', 'x', 'wind ' * 40]
  with torch.no_grad():
    tokens = AutoTokenizer.from_pretrained(folder)(captions, padding=True, return_tensors='pt')
    expected = theirs(**tokens).last_hidden_state[:, 0].numpy()
  for actual, each in zip(model.encode_text(captions), expected):  # no text_proj in the file: the identity
    close(actual, each, 1e-5)


@pytest.fixture(scope='module')
def finetuned(tmp_path_factory):
  draw = np.random.Generator(np.random.PCG64(5))
  head = {'norm.running_mean': 0.1 * draw.standard_normal(3840), 'norm.running_var': 1 + 0.1 * draw.random(3840),
          'mlp.mlp.0.weight': 0.02 * draw.standard_normal((527, 3840)), 'mlp.mlp.0.bias': 0.1 * draw.standard_normal(527)}
  tensors = {f'module.ar.runtime.{name}': value for name, value in tensors_of_2025(1, (-7.1, 4.2)).items()
             if not name.startswith((TEXT, 'backbone.audio_proj', 'logit_scale'))}
  tensors |= {f'module.head.{name}': np.asarray(value, np.float32) for name, value in head.items()}
  return opened(tmp_path_factory.mktemp('finetuned'),
                'm2d_as_vit_base-80x1001p16x16-240213_AS-FT_enconly', tensors)


@pytest.mark.parametrize('seconds', SECONDS[1:])
def test_a_fine_tuned_head_gives_the_authors_logits(finetuned, seconds):
  wave = reference.load('clap_2025')[f'wav_{seconds}'].astype(np.float32)
  close(finetuned.logits(wave), reference.load('finetuned_head')[f'logits_{seconds}'], 1e-4)
