"""The later stages of M2D-CLAP 2025: --config=configs/clap.py:VARIANT --config.init=MODEL --config.data.folder=FOLDERS

  stage2     the text encoder and a new audio projector learn by captions alone; the audio encoder is frozen
  stage2_1   goes on from a run of stage2, on better captions, without a mask
  small_2s   stage 2 for pretrain.py:small_2s, with MiniLM: for collections of a few thousand recordings
"""
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def stage2():
  config = ConfigDict()
  config.job = 'clap'
  config.seed = 7  # of everything: the new projector, masks, dropout, order, crops, captions
  config.init = ''  # the model that goes on: a run, portable folder, .pth, released model's name ...
  config.train_audio = False  # whether the audio encoder is trained, too
  config.projector = 'new'  # a new semantic projector, or 'init': those of the model that goes on
  config.mask_ratio = 0.3  # share of the patches hidden from the audio encoder, in whole rows and columns
  config.batch_size = 2048  # of all devices together
  config.epochs = 30.0
  config.steps = placeholder(int)  # if given, instead of epochs

  config.data = ConfigDict({
      'folder': '',  # made by `m2d-clap prepare`, --text_encoder=none will do; several, with commas between them, are mixed
      'weights': placeholder(tuple),  # as in pretrain.py, like the next three
      'split': 'train',
      'sample_rate': 16000,
      'damaged': 'fail',
  })
  config.text = ConfigDict({
      'encoder': 'bert-base-uncased',  # a BERT of the Hugging Face Hub, a folder, or 'minilm'; empty: that of `init`
      'pooling': 'cls',  # or 'mean'; of `encoder`
      'max_length': 128,  # tokens kept of a caption. In one process captions are padded to a few lengths, in several to this
      'dropout': True,  # at the rates of the encoder's config.json
  })
  # The rest of the model is as in `init`.
  config.model = ConfigDict({
      'frames': 1001,  # of a training crop; None: as in `init`. Beyond those, positions are interpolated
      'semantic_depth': 1,  # of a new projector: blocks, and the MLP ratio in them
      'semantic_mlp_ratio': 1.0,
      'dtype': 'bfloat16',  # of the matrix products of both encoders
      'remat': 'none',  # or 'cheap', 'full': as in pretrain.py
  })
  config.schedule = ConfigDict({'base_learning_rate': 3e-6, 'warmup_epochs': 5.0})  # at 256 samples, as in pretrain.py
  config.optim = ConfigDict({'b1': 0.9, 'b2': 0.95, 'weight_decay': 0.05, 'clip_norm': 3.0})
  config.loss = ConfigDict({'accumulate': 1})  # parts that a batch is computed in to save memory
  config.mesh = ConfigDict({'fsdp': placeholder(int)})  # as in pretrain.py
  config.checkpoints = ConfigDict({'keep': 2, 'keep_every': placeholder(int)})
  config.stall_seconds = 3600.0  # without any progress after which a run ends itself, with a message
  config.wandb = placeholder(str)  # project of Weights & Biases to log to, beside TensorBoard; needs the extra wandb
  config.log_every = 50  # steps, as all that follow
  config.save_every = 1000
  config.evals_every = 1000
  config.evals = ConfigDict()  # as in pretrain.py; captions go through the text encoder as it is then
  return config


def stage2_1():
  config = stage2()
  config.projector = 'init'
  config.mask_ratio = 0.0
  config.text.encoder = ''
  return config


def small_2s():
  config = stage2()
  config.batch_size = 64
  config.text.update({'encoder': 'minilm', 'pooling': 'mean'})
  config.model.update({'frames': 208, 'dtype': 'float32'})
  config.schedule.update({'base_learning_rate': 4e-4, 'warmup_epochs': 3.0})
  config.log_every = 20
  config.save_every = 490
  config.evals_every = 490
  return config


VARIANTS = {'stage2': stage2, 'stage2_1': stage2_1, 'small_2s': small_2s}


def get_config(variant='stage2'):
  if variant not in VARIANTS:
    raise ValueError(f'--config=configs/clap.py:{variant}: unknown variant; known: {", ".join(VARIANTS)}')
  return VARIANTS[variant]()
