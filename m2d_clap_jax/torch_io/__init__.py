"""Weights of the authors' PyTorch implementation as Flax parameters."""
from m2d_clap_jax.torch_io.rules import to_flax

__all__ = ['to_flax']
