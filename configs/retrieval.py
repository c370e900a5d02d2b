"""Audio-text retrieval over a task's test clips: --config.init=MODEL --config.task=clotho --config.data.root=DIR"""
from ml_collections import ConfigDict

from m2d_clap_jax.configs.linear import common


def get_config():
  config = common('retrieval')
  config.protocol = ConfigDict()
  return config
