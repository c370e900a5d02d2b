"""Fine-tuning (the paper's settings): --config=configs/finetune.py:VARIANT --config.init=MODEL --config.data.root=DIR

  as2m    AudioSet, 200,000 clips per epoch drawn by rarity; plain momentum, see optim.name
  as20k   AudioSet's balanced part
  esc50   ESC-50 in 5 folds, patch embedding frozen
  spcv2   Speech Commands V2, 35 words
  vc1     VoxCeleb1 speaker identification
  small   a small model from scratch or from pretrain.py:small_2s, for collections of a few thousand recordings
  few     any model, for a few hundred recordings: from the layer of linear evaluation, without augmentation
"""
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from m2d_clap_jax.models import SIZES


def base(task):
  config = ConfigDict()
  config.job = 'finetune'
  config.task = task  # a task of the paper, or any name with data.csv and data.seconds
  config.init = ''  # the model to start from: a run, portable folder, .pth, released model's name ...; empty: random
  config.seed = 0  # of the first run; the following runs use seed + 1, seed + 2, ...
  config.runs = 3
  config.batch_size = 64  # over all devices
  config.epochs = 200
  config.data = ConfigDict({
      'root': '',  # folder that file names are relative to
      'csv': '',  # metadata (file_name, label, split or fold); empty: ROOT/TASK.csv, or that of an EVAR work folder
      'columns': '',  # where its columns have other names: 'file_name:filename,label:category,fold:fold'
      'seconds': placeholder(float),  # length of a clip; None: the task's
      'damaged': 'fail',  # or 'skip': leave out missing or unreadable clips, and name and count them
      'cache': '',  # folder of decoded recordings (at most 5 minutes of each), 2 bytes per sample; empty: in the workdir
      'sample_rate': 16000,  # Hz, if init is empty; otherwise the model's
  })
  # With init only norm_stats, dtype and remat are used; the rest comes from the model.
  config.model = ConfigDict({
      **{key: SIZES['base'][key] for key in ('width', 'depth', 'heads')},
      'patch_size': (16, 16),
      'norm_stats': placeholder(tuple),  # (mean, deviation) of the log-mels; None: the model's, or the data's
      'dtype': 'float32',  # or 'bfloat16', of the matrix products
      'remat': 'none',  # or 'cheap', 'full': as in pretrain.py
  })
  # Frames at the end that do not fill a patch: 'drop' them, or 'pad' the patch with the mean.
  config.last_patch = 'drop'
  # Initial layer of the classifier: 'random' (the paper), or 'linear', the layer found by linear evaluation of `init`:
  # training then starts from that score (linear probing then fine-tuning, Kumar et al., ICLR 2022).
  config.head = 'random'
  config.freeze_patch_embed = False
  # By step: a line from 0 to the peak during warm-up; then half a cosine over all epochs, from the peak to `end`.
  config.schedule = ConfigDict({'learning_rate': 0.5, 'warmup_epochs': 5.0, 'end': 1e-7})
  # sgd, lars, lars_as_run (EVAR's LARS adapts only where weight decay is not 0, and it is 0: the same as sgd), or
  # adamw_amsgrad. Set only options that the optimizer has; None: the default in train/optim.py.
  config.optim = ConfigDict({'name': 'sgd', **{key: placeholder(float) for key in (
      'momentum', 'weight_decay', 'trust_coefficient', 'b1', 'b2')}})
  config.augmentation = ConfigDict({
      'mixup': 0.3,  # a of Beta(a, a); 0: none
      'mixup_on': 'waves',  # or 'logmel', before standardisation; short clips are then padded with log-mels of 0
      'spec_frequency': 30,  # widest masks, in mel bins and frames
      'spec_time': 192,
      'resize_crop': True,
      'patchout': 0.5,  # share of the patches to drop, in whole rows and columns; the head's input is then the mean patch
  })
  # weighted: clips of rare classes are drawn more often; per_epoch: number of clips per epoch in that case.
  config.sampling = ConfigDict({'weighted': False, 'per_epoch': placeholder(int)})
  config.mesh = ConfigDict({'fsdp': placeholder(int)})  # as in pretrain.py
  config.checkpoints = ConfigDict({'keep': 1})
  config.stall_seconds = 3600.0  # without progress after which a run ends itself with a message; 0: never
  config.wandb = placeholder(str)  # project of Weights & Biases to log to, beside TensorBoard; needs the extra wandb
  config.log_every = 50  # steps; at least once an epoch
  config.save_every = 5  # epochs, like the next
  config.evals_every = 1
  return config


def as2m():
  config = base('as')
  config.epochs = 70
  config.schedule.update({'learning_rate': 2.0, 'warmup_epochs': 15.0})
  config.optim.name = 'lars_as_run'
  config.augmentation.update({'mixup': 0.5, 'mixup_on': 'logmel', 'resize_crop': False})
  config.sampling.update({'weighted': True, 'per_epoch': 200_000})
  config.save_every = 1
  return config


def as20k():
  return base('as20k')


def esc50():
  config = base('esc50')
  config.batch_size = 128
  config.freeze_patch_embed = True
  config.augmentation.update({'mixup': 0.0, 'spec_frequency': 15, 'spec_time': 48})
  return config


def spcv2():
  config = base('spcv2')
  config.batch_size = 128
  config.augmentation.spec_time = 48
  config.last_patch = 'pad'  # 101 frames, 7 columns
  return config


def vc1():
  config = base('vc1')
  config.epochs = 50
  config.schedule.learning_rate = 5e-4
  config.optim.name = 'adamw_amsgrad'
  config.augmentation.update({'mixup': 0.0, 'spec_time': 48, 'resize_crop': False, 'patchout': 0.0})
  return config


def small():
  config = base('mine')
  config.data.seconds = 2.07  # 208 frames, what pretrain.py:small_2s is trained on
  config.model.update({'width': 192, 'depth': 6, 'heads': 3})
  config.last_patch = 'pad'  # so that clips of any length are used whole
  config.epochs = 20
  config.schedule.update({'learning_rate': 5e-4, 'warmup_epochs': 2.0})
  config.optim.name = 'adamw_amsgrad'
  config.augmentation.update({'spec_time': 48, 'patchout': 0.0})
  return config


def few():
  config = small()
  config.head = 'linear'
  config.batch_size = 32
  config.epochs = 10
  config.schedule.update({'learning_rate': 3e-4, 'warmup_epochs': 1.0})
  # The head's batch norm would adopt the statistics of augmented clips, which its layer was not trained on.
  config.augmentation.update({'mixup': 0.0, 'spec_frequency': 0, 'spec_time': 0, 'resize_crop': False})
  return config


VARIANTS = {'as2m': as2m, 'as20k': as20k, 'esc50': esc50, 'spcv2': spcv2, 'vc1': vc1, 'small': small, 'few': few}


def get_config(variant='as20k'):
  if variant not in VARIANTS:
    raise ValueError(f'--config=configs/finetune.py:{variant}: unknown variant; known: {", ".join(VARIANTS)}')
  return VARIANTS[variant]()
