"""The paper's linear evaluation of a model on a task: --config.init=MODEL --config.task=esc50 --config.data.root=DIR"""
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from m2d_clap_jax.eval.linear_protocol import SEED, Protocol


def common(job):
  config = ConfigDict()
  config.job = job
  config.task = 'esc50'  # a task of the paper, or any name with data.csv and data.seconds
  config.init = ''  # the model: a run, portable folder, .pth, released model's name ...
  config.seed = SEED  # of the first run, and of the random positions in training and validation clips
  config.data = ConfigDict({
      'root': '',  # folder that file names are relative to
      'csv': '',  # metadata (file_name, label, split or fold); empty: ROOT/TASK.csv, or that of an EVAR work folder
      'columns': '',  # where its columns have other names: 'file_name:filename,label:category,fold:fold'
      'seconds': placeholder(float),  # length of a clip; None: the task's; retrieval uses whole clips
      'names': '',  # AudioSet's class_labels_indices.csv, if labels are its identifiers (/m/09x0r)
      'damaged': 'fail',  # or 'skip': leave out missing or unreadable clips, and name and count them
      'template': placeholder(str),  # turns a label into a caption; None: the task's captions
  })
  # Values that a public checkpoint may not state.
  config.model = ConfigDict({'text_encoder': '', 'sample_rate': placeholder(int)})
  return config


def get_config():
  config = common('linear')
  config.protocol = ConfigDict(Protocol()._asdict())
  return config
