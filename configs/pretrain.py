"""Pre-training. Variants: --config=configs/pretrain.py:VARIANT

  base       M2D-CLAP/0.7, ViT-Base, the paper's recipe (also without a variant)
  large      the same with ViT-Large
  ddp4       base with the effective contrastive weight of the authors' 4-GPU runs (see losses.clip_loss)
  clap2025   stage 1 of M2D-CLAP 2025: semantic projector, captions embedded by NV-Embed-v2 (docs/stages.md)
  m2d        M2D/0.7: no captions;   m2d_0.6   the same with 60% masked
  msm_mae    MSM-MAE/0.75: predicts pixels, no target network, no captions
  demo       a small model on a rendered corpus of musical instruments, in minutes on a laptop
  small_2s   a small model on clips of 2 seconds, for corpora of a few thousand recordings
"""
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from m2d_clap_jax.demo.corpus import FAMILIES, INSTRUMENTS, TEMPLATES
from m2d_clap_jax.models import SIZES


def base():
  config = ConfigDict()
  config.job = 'pretrain'
  config.seed = 3  # of initialisation, masks, order, crops and captions
  config.init = ''  # weights to start from: a run, portable folder, .pth, released model's name ...; empty: random
  config.batch_size = 2048  # over all devices
  config.epochs = 300.0
  config.steps = placeholder(int)  # overrides epochs

  config.data = ConfigDict({
      'folder': '',  # made by `m2d-clap prepare`; several, with commas between them, are mixed
      'weights': placeholder(tuple),  # of several folders, how often the clips of each come in an epoch; None: once
      'split': 'train',
      'sample_rate': 16000,  # Hz; must match the prepared data
      'damaged': 'fail',  # or 'skip': leave out unreadable clips, and name and count them
      'demo': False,  # render and prepare the demo corpus in `folder` first
  })
  config.model = ConfigDict({
      **SIZES['base'],
      'input_size': (80, 608),  # mel bins, frames of 10 ms
      'patch_size': (16, 16),
      'mask_ratio': 0.7,
      'text_width': 768,  # of the caption embeddings; None: no CLAP head
      'audio_projector': 'mlp',  # or, as in models of 2025, 'semantic' with this number of blocks and MLP ratio
      'semantic_depth': 1,
      'semantic_mlp_ratio': 1.0,
      'text_projector': placeholder(str),  # identity, linear or mlp; None: identity where the widths are equal, else linear
      'predict': 'features',  # or 'pixels' (MSM-MAE)
      'norm_stats': placeholder(tuple),  # (mean, deviation) of the log-mels; None: as measured by preparation
      'dtype': 'bfloat16',  # of matrix products; parameters, averages, softmax and losses stay float32
      # Activations that are computed again instead of kept: 'none', 'cheap' (norms, GELU, softmax) or 'full' (whole blocks).
      # None: as little as fits where devices report their memory, else 'none'.
      'remat': placeholder(str),
  })
  config.schedule = ConfigDict({
      'base_learning_rate': 3e-4,  # at 256 samples; multiplied by batch_size / 256
      'warmup_epochs': 20.0,
  })
  config.optim = ConfigDict({'b1': 0.9, 'b2': 0.95, 'weight_decay': 0.05, 'clip_norm': 3.0})
  config.ema = ConfigDict({'start': 0.99995, 'end': 0.99999})  # of the target network
  config.loss = ConfigDict({
      'm2d_weight': 1.0,
      'clap_weight': 0.01,
      # Number of parts in which a batch is computed to save memory; losses still see the whole batch. None: as few as fit.
      'accumulate': placeholder(int),
  })
  # Number of devices over which parameters and optimizer state are divided (a divisor of the number of devices); None: as
  # few as leave room for the activations. The batch is always divided over all devices.
  config.mesh = ConfigDict({'fsdp': placeholder(int)})
  config.checkpoints = ConfigDict({'keep': 2, 'keep_every': placeholder(int)})  # steps between permanent checkpoints
  config.stall_seconds = 3600.0  # without progress after which a run ends itself with a message; 0: never
  config.wandb = placeholder(str)  # project of Weights & Biases to log to, beside TensorBoard; needs the extra wandb
  config.log_every = 50  # steps, like the following intervals
  config.save_every = 1000
  config.statistics_every = 5000
  config.evals_every = 10000
  config.evals = ConfigDict()  # name -> {kind: zeroshot | linear | logistic | retrieval, ...}: docs/evaluation.md
  return config


def large():
  config = base()
  config.model.update(SIZES['large'])
  return config


def ddp4():
  config = base()
  config.loss.clap_weight = 0.01 / 4
  return config


def clap2025():
  config = base()
  config.seed = 7
  config.model.update({'audio_projector': 'semantic', 'text_width': 4096})
  return config


def m2d(mask_ratio=0.7):
  config = base()
  config.model.text_width = None
  config.model.mask_ratio = mask_ratio
  return config


def msm_mae():
  config = m2d(mask_ratio=0.75)
  config.model.update({'predict': 'pixels', 'predictor_width': 384, 'predictor_depth': 4, 'predictor_heads': 6})
  return config


def small_2s():
  config = base()
  config.batch_size = 64
  config.steps = 1960
  config.model.update({
      'width': 192, 'depth': 6, 'heads': 3, 'predictor_width': 128, 'predictor_depth': 2, 'predictor_heads': 4,
      'input_size': (80, 208), 'text_width': 384, 'dtype': 'float32'})
  config.schedule = ConfigDict({
      'base_learning_rate': 4e-3,
      'warmup_share': 0.1,  # of all steps
      'warmup_steps': placeholder(int),  # if given, instead
  })
  config.ema.update({'start': 0.99, 'end': 0.9995})
  config.loss.clap_weight = 1.0
  config.log_every = 20
  config.save_every = 490
  config.statistics_every = 490
  config.evals_every = 980
  return config


def demo():
  config = small_2s()
  config.data.update({'demo': True, 'folder': 'data/demo'})
  config.steps = 480
  config.save_every = 160
  config.statistics_every = 160
  config.evals_every = 480
  # Each clip of the demo has two labels, an instrument and its family.
  config.evals = ConfigDict({
      'instrument': {'kind': 'zeroshot', 'classes': tuple(INSTRUMENTS), 'template': TEMPLATES['instrument']},
      'family': {'kind': 'zeroshot', 'classes': tuple(FAMILIES), 'template': TEMPLATES['family']},
  })
  return config


VARIANTS = {'base': base, 'large': large, 'ddp4': ddp4, 'clap2025': clap2025, 'm2d': m2d, 'm2d_0.6': lambda: m2d(0.6),
            'msm_mae': msm_mae, 'demo': demo, 'small_2s': small_2s}


def get_config(variant='base'):
  if variant not in VARIANTS:
    raise ValueError(f'--config=configs/pretrain.py:{variant}: unknown variant; known: {", ".join(VARIANTS)}')
  return VARIANTS[variant]()
