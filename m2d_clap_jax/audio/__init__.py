"""Sound to log-mel spectrograms. Imports neither jax nor TensorFlow, because preparation's worker processes use it.

Decoding and resampling are in `m2d_clap_jax.audio.decode`, which alone needs soundfile and soxr.
"""

from m2d_clap_jax.audio.logmel import EPS, SILENCE, LogMel

__all__ = ['EPS', 'SILENCE', 'LogMel']
