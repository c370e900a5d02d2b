"""The authors' 17 released checkpoints: what is known of each, and files of the same layout made of constants.

Every tensor has one value, spread over its whole shape without taking space: files are small and written at once.
"""
import argparse
import pathlib
import zlib
from typing import NamedTuple

BINS, WIDTH, CLASSES = 80, 768, 527
GTE, BERT = ('thenlper/gte-base', 'mean'), ('bert-base-uncased', 'cls')
RUNTIME = 'module.ar.runtime.'  # what EVAR puts before the runtime of a model that it fine-tunes


class Released(NamedTuple):
  """What a released folder holds; `text` is (name, pooling) of the captions' encoder.

  kind: 'complete' pre-training file (five entries, predictor), 'encoder' only, 'finetuned' with EVAR's names and a head,
    'runtime' (2025: text encoder and semantic projector inside).
  """
  frames: int
  patch: tuple[int, int]
  kind: str
  file: str = 'checkpoint-300.pth'
  sample_rate: int = 16000
  text: tuple[str, str] | None = None

  @property
  def input_size(self):
    return BINS, self.frames

  @property
  def grid(self):
    return BINS // self.patch[0], self.frames // self.patch[1]

  @property
  def complete(self):
    return self.kind == 'complete'

  @property
  def classes(self):
    return CLASSES if self.kind == 'finetuned' else None


RELEASED = {
    'm2d_clap_vit_base-80x608p16x16-240128': Released(608, (16, 16), 'complete', text=GTE),
    'm2d_as_vit_base-80x608p16x16-240213': Released(608, (16, 16), 'complete'),
    'm2d_vit_base-80x608p16x16-221006-mr7': Released(608, (16, 16), 'complete'),
    'm2d_vit_base-80x608p16x16-221006-mr6': Released(608, (16, 16), 'complete'),
    'm2d_vit_base-80x200p16x4-230529': Released(200, (16, 4), 'complete'),
    'm2d_vit_base-80x608p16x16-221006-mr7_enconly': Released(608, (16, 16), 'encoder'),
    'm2d_vit_base-80x608p16x16-220930-mr7_enconly': Released(608, (16, 16), 'encoder'),
    'm2d_as_vit_base-80x608p16x16p32k-240413_enconly': Released(608, (16, 16), 'encoder', sample_rate=32000),
    'm2d_s_vit_base-80x608p80x2-230220': Released(608, (80, 2), 'complete', 'checkpoint-1000.pth'),
    'm2d_s_vit_base-80x512p80x2-230301': Released(512, (80, 2), 'complete', 'checkpoint-1000.pth'),
    'm2d_s_vit_base-80x400p80x2-230201': Released(400, (80, 2), 'complete', 'checkpoint-1000.pth'),
    'm2d_clap_vit_base-80x1001p16x16-240128_AS-FT_enconly':
        Released(1001, (16, 16), 'finetuned', 'weights_ep67it3124-0.48558.pth', text=GTE),
    'm2d_as_vit_base-80x1001p16x16-240213_AS-FT_enconly':
        Released(1001, (16, 16), 'finetuned', 'weights_ep69it3124-0.48494.pth'),
    'm2d_vit_base-80x1001p16x16-221006-mr7_as_46ab246d': Released(1001, (16, 16), 'finetuned', 'weights_ep69it3124.pth'),
    'm2d_as_vit_base-80x1001p16x16p32k-240413_AS-FT_enconly':
        Released(1001, (16, 16), 'finetuned', 'weights_ep69it3124.pth', 32000),
    'm2d_clap_vit_base-80x1001p16x16p16kpBpTI-2025':
        Released(1001, (16, 16), 'runtime', 'checkpoint-30.pth', text=BERT),
    'm2d_clap_vit_base-80x1001p80x2p16kpBpTI-2025':
        Released(1001, (80, 2), 'runtime', 'checkpoint-30.pth', text=BERT),
}


def write(name, folder, depth=12) -> pathlib.Path:
  """Writes FOLDER/NAME/FILE.pth with the layout of a released checkpoint -> its path.

  depth: transformer blocks of the encoder (12 in the released files), and at most those of predictor and text encoder.
  """
  import torch
  about = RELEASED[name]
  path = pathlib.Path(folder) / name / about.file
  path.parent.mkdir(parents=True, exist_ok=True)
  tensors = {key: torch.tensor(_value(key)).expand(shape) for key, shape in shapes(name, depth).items()}
  for key in tensors:
    if key.endswith('norm_stats'):
      tensors[key] = torch.tensor([-7.2618, 4.3512] if about.kind == 'runtime' else [-7.1, 4.2])
    if key.endswith(('num_batches_tracked', 'position_ids')):
      tensors[key] = torch.zeros(shapes(name, depth)[key], dtype=torch.int64)
  torch.save(_wrapped(name, tensors), path)
  return path


def shapes(name, depth=12) -> dict[str, tuple]:
  """Names and shapes of all tensors in the state dict of a released file."""
  about = RELEASED[name]
  model = _encoder(about, depth)
  if about.text and about.kind != 'runtime':
    model |= _layers('audio_proj.0', 'audio_proj.2')
  if about.kind == 'complete':
    model |= _predictor(about, depth)
    if about.text:
      model['logit_scale'] = ()
    if name.startswith(('m2d_as', 'm2d_s')):
      model |= {'offline_predictor.weight': (WIDTH, WIDTH), 'offline_predictor.bias': (WIDTH,)}
  if about.kind == 'finetuned':
    features = about.grid[0] * WIDTH
    model = {f'{RUNTIME}backbone.{key}': shape for key, shape in model.items()} | _front_end(RUNTIME)
    model |= {'module.head.norm.running_mean': (features,), 'module.head.norm.running_var': (features,),
              'module.head.norm.num_batches_tracked': (), 'module.head.mlp.mlp.0.weight': (CLASSES, features),
              'module.head.mlp.mlp.0.bias': (CLASSES,)}
  if about.kind == 'runtime':
    model |= {'audio_proj.sem_token': (1, 1, WIDTH)} | _block('audio_proj.sem_blocks.0', WIDTH, ratio=1)
    model |= _norm('audio_proj.norm', WIDTH)
    model = {f'backbone.{key}': shape for key, shape in model.items()} | _front_end('')
    model |= {'text_encoder.text_encoder.' + key: shape for key, shape in _bert(depth).items()} | {'logit_scale': ()}
  return model


def _encoder(about, depth):
  model = {'cls_token': (1, 1, WIDTH), 'pos_embed': (1, 1 + about.grid[0] * about.grid[1], WIDTH), 'norm_stats': (2,),
           'patch_embed.proj.weight': (WIDTH, 1, *about.patch), 'patch_embed.proj.bias': (WIDTH,)}
  for i in range(depth):
    model |= _block(f'blocks.{i}', WIDTH)
  return model | _norm('norm', WIDTH)


def _predictor(about, depth, width=512):
  patches = about.grid[0] * about.grid[1]
  model = {'mask_token': (1, 1, width), 'decoder_pos_embed': (1, 1 + patches, width)}
  model |= _linear('decoder_embed', width, WIDTH) | _norm('decoder_norm', width) | _linear('decoder_pred', WIDTH, width)
  for i in range(min(8, depth)):
    model |= _block(f'decoder_blocks.{i}', width)
  for i in range(depth):
    model |= _block(f'target_blocks.{i}', WIDTH)
  return model | _norm('target_norm', WIDTH)


def _block(name, width, ratio=4):
  return (_norm(f'{name}.norm1', width) | _linear(f'{name}.attn.qkv', 3 * width, width)
          | _linear(f'{name}.attn.proj', width, width) | _norm(f'{name}.norm2', width)
          | _linear(f'{name}.mlp.fc1', ratio * width, width) | _linear(f'{name}.mlp.fc2', width, ratio * width))


def _bert(depth):
  """A BERT-base under Hugging Face's names."""
  model = {'embeddings.position_ids': (1, 512), 'embeddings.word_embeddings.weight': (30522, WIDTH),
           'embeddings.position_embeddings.weight': (512, WIDTH),
           'embeddings.token_type_embeddings.weight': (2, WIDTH)} | _norm('embeddings.LayerNorm', WIDTH)
  for i in range(depth):
    layer = f'encoder.layer.{i}'
    model |= _layers(*(f'{layer}.attention.{part}' for part in ('self.query', 'self.key', 'self.value', 'output.dense')))
    model |= _norm(f'{layer}.attention.output.LayerNorm', WIDTH) | _norm(f'{layer}.output.LayerNorm', WIDTH)
    model |= _linear(f'{layer}.intermediate.dense', 4 * WIDTH, WIDTH) | _linear(f'{layer}.output.dense', WIDTH, 4 * WIDTH)
  return model | _layers('pooler.dense')


def _front_end(prefix):
  """Buffers of the log-mel spectrogram."""
  return {f'{prefix}to_spec.mel_basis': (BINS, 201), f'{prefix}to_spec.stft.wsin': (201, 1, 400),
          f'{prefix}to_spec.stft.wcos': (201, 1, 400), f'{prefix}to_spec.stft.window_mask': (1, 400, 1)}


def _layers(*names):
  return {key: shape for name in names for key, shape in _linear(name, WIDTH, WIDTH).items()}


def _linear(name, out, size):
  return {f'{name}.weight': (out, size), f'{name}.bias': (out,)}


def _norm(name, width):
  return {f'{name}.weight': (width,), f'{name}.bias': (width,)}


def _value(key):
  """A value of its own for each tensor, so that none is taken for another."""
  own = zlib.crc32(key.encode()) / 2 ** 32
  return own + 0.5 if key.endswith(('norm.weight', 'norm1.weight', 'norm2.weight', 'running_var')) else own / 100


def _wrapped(name, tensors):
  """The entries of the file around its state dict."""
  about = RELEASED[name]
  if about.kind == 'finetuned':
    return tensors
  if about.kind == 'encoder':
    return {'model': tensors}
  import torch
  step = {'step': torch.tensor(1.0), 'exp_avg': torch.zeros(1).expand(WIDTH), 'exp_avg_sq': torch.zeros(1).expand(WIDTH)}
  group = {'lr': 3e-4, 'betas': (0.9, 0.95), 'eps': 1e-8, 'weight_decay': 0.05, 'amsgrad': False, 'params': [0]}
  args = argparse.Namespace(
      batch_size=512, epochs=300, accum_iter=1, model=name.partition('-')[0], input_size=list(about.input_size),
      patch_size=list(about.patch), mask_ratio=0.7, weight_decay=0.05, lr=None, blr=3e-4, norm_stats=(-7.1, 4.2), seed=3,
      distributed=True, resume='', output_dir=pathlib.PurePosixPath('/lab') / name, data_path=pathlib.Path('/lab/data'))
  return {'model': tensors, 'optimizer': {'state': {0: step}, 'param_groups': [group]}, 'epoch': 299,
          'scaler': {'scale': 65536.0, 'growth_factor': 2.0, 'backoff_factor': 0.5, 'growth_interval': 2000,
                     '_growth_tracker': 7}, 'args': args}
