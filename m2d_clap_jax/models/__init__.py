"""Models: plain Flax modules; nothing here knows of configurations, data or files."""
from m2d_clap_jax.models.m2d_clap import M2DCLAP, SIZES

__all__ = ['M2DCLAP', 'SIZES']
