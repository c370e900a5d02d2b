"""Sound in, log-mel spectrograms out. Imports neither jax nor TensorFlow: preparation's worker processes live here.

Decoding and resampling are in `m2d_clap_jax.audio.decode`, which alone needs soundfile and soxr.
"""

from m2d_clap_jax.audio.logmel import EPS, SILENCE, LogMel

__all__ = ['EPS', 'SILENCE', 'LogMel']
