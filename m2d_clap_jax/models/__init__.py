"""Models: plain Flax modules, independent of configurations, data and files."""
from m2d_clap_jax.models.m2d_clap import M2DCLAP, SIZES

__all__ = ['M2DCLAP', 'SIZES']
