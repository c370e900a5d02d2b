"""Zero-shot classification of a task's test clips: --config.init=MODEL --config.task=esc50 --config.data.root=DIR"""
from ml_collections import ConfigDict

from m2d_clap_jax.configs.linear import common


def get_config():
  config = common('zeroshot')
  # Captions for each label, averaged, such as ('the sound of {}', 'a recording of {}'); empty: data.template.
  config.protocol = ConfigDict({'templates': ()})
  return config
