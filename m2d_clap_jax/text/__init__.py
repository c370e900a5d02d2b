"""The frozen sentence encoder that turns captions into embeddings."""

from m2d_clap_jax.text.encoder import TextEncoder

__all__ = ['TextEncoder']
