"""Sound in, log-mel spectrograms out. Imports neither jax nor TensorFlow, so that worker processes of the preparation start fast.

Decoding and resampling are in `m2d_clap_jax.audio.decode`, which alone needs soundfile and soxr.
"""

from m2d_clap_jax.audio.logmel import EPS, SILENCE, LogMel

__all__ = ['EPS', 'SILENCE', 'LogMel']
