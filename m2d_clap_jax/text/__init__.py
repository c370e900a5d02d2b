"""The sentence encoder of captions: frozen, as the embeddings of a data folder, or in training."""

from m2d_clap_jax.text.encoder import TextEncoder
from m2d_clap_jax.text.tower import TextTower

__all__ = ['TextEncoder', 'TextTower']
