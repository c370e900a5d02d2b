"""Log-mel spectrograms: one definition, evaluated by numpy (preparation) or jax (on the device).

Shapes: S samples, T frames, N samples of a frame (n_fft), F mel bins.
Source: M2D-CLAP (arXiv 2406.02032) section 3.1; the mel scale and its area normalisation are Slaney's, as in librosa.
"""

import dataclasses
import functools
import math

import numpy as np

from m2d_clap_jax.errors import UserError

EPS = 1.1920929e-07  # float32's machine epsilon: added to the mel power so that silence has a logarithm
SILENCE = math.log(EPS)  # -15.94: log-mel of digital silence

# Frames that numpy processes at a time: small enough for the processor's cache and for hour-long files. Every block has
# this size (the last is padded), so that a frame's bits do not depend on the length of its recording.
_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class LogMel:
  """Settings of a log-mel spectrogram: natural log of mel power, periodic Hann window, centred frames.

  Frame t is centred on sample t * hop; the ends are padded by reflection. S samples give T = S // hop + 1 frames.
  A wave too short to be reflected (fewer than n_fft // 2 + 1 samples) is first padded with silence, and still gives
  the T of its own length. Waves are mono float, nominally in [-1, 1]; ints must be scaled first (`decode.as_mono`).
  """

  sample_rate: int = 16000  # Hz
  n_fft: int = 400  # samples; window and transform length (25 ms)
  hop: int = 160  # samples (10 ms)
  n_mels: int = 80
  f_min: float = 50.0  # Hz
  f_max: float = 8000.0  # Hz

  @classmethod
  def for_rate(cls, rate):
    """The published settings for 16000 or 32000 Hz; UserError for another rate."""
    if rate == 16000:
      return cls()
    if rate == 32000:
      return cls(32000, 800, 320, 80, 50.0, 16000.0)
    raise UserError(f'sample_rate={rate}: log-mel settings exist for 16000 and 32000 Hz; use one of them '
                    '(recordings of any rate are resampled)')

  def num_frames(self, samples):
    """T for S samples."""
    return samples // self.hop + 1

  def numpy(self, wave):
    """wave [S] -> [F, T] float32, in bounded extra memory however long the wave is."""
    from scipy.fft import rfft  # transforms a whole block at once: four times as fast as numpy's
    # Sparse filters avoid the BLAS, whose threads cost more than so small a product, especially beside other processes.
    window, mel = _constants(self, sparse=True)
    wave = np.asarray(wave, np.float32)
    if wave.ndim != 1:
      raise ValueError(f'LogMel.numpy takes one mono wave [S], not an array of shape {wave.shape}')
    total = self.num_frames(len(wave))
    if self._missing(len(wave)):
      wave = np.pad(wave, (0, self._missing(len(wave))))
    out = np.empty((self.n_mels, total), np.float32)
    span = (_BLOCK - 1) * self.hop + self.n_fft
    for t in range(0, total, _BLOCK):
      piece = _reflected(wave, t * self.hop - self.n_fft // 2, span)
      frames = np.lib.stride_tricks.sliding_window_view(piece, self.n_fft)[::self.hop]  # T N, a view
      out[:, t:t + _BLOCK] = _log_mel(frames, window, mel, np, rfft)[:, :total - t]
    return out

  def chunks(self, blocks, frames):
    """The log-mel of a recording that comes in blocks, `frames` at a time: yields [F, T], bit-equal to `numpy`'s.

    Args:
      blocks: iterable of mono waves [S], joined in order; memory is bounded by one block and one chunk.
      frames: T of all chunks but the last, which has what is left.
    """
    lead = -(-self.n_fft // (2 * self.hop))  # frames affected by cutting a wave: `held` begins that many earlier
    held, skip = np.zeros(0, np.float32), 0
    for block in blocks:
      held = np.concatenate([held, block])
      while len(held) >= (span := (skip + frames - 1) * self.hop + self.n_fft // 2):
        yield self.numpy(held[:span])[:, skip:skip + frames]
        held, skip = held[(skip + frames - lead) * self.hop:], lead
    rest = self.numpy(held)[:, skip:]
    for start in range(0, rest.shape[1], frames):
      yield rest[:, start:start + frames]

  def jax(self, waves):
    """waves [..., S] -> [..., F, T] float32; can be jitted, differentiated and sharded over the leading axes."""
    import jax.numpy as jnp
    waves = jnp.asarray(waves, jnp.float32)
    total = self.num_frames(waves.shape[-1])
    keep = [(0, 0)] * (waves.ndim - 1)
    waves = jnp.pad(waves, keep + [(0, self._missing(waves.shape[-1]))])
    waves = jnp.pad(waves, keep + [(self.n_fft // 2, self.n_fft // 2)], mode='reflect')
    return self._framed(waves, total)

  def ragged(self, waves, samples):
    """waves [B, S] of which `samples`, int [B], exist, S a multiple of hop -> [B, F, S // hop + 1] float32.

    The first samples // hop + 1 frames of a row are those of its wave alone; ignore the others. Like `jax`, and also where
    B and S are symbolic dimensions.
    """
    import jax
    import jax.numpy as jnp
    half = self.n_fft // 2
    waves = jnp.where(jnp.arange(waves.shape[1]) < samples[:, None], waves, 0)
    waves = jnp.pad(waves, ((0, 0), (half, 2 * half + 1)))
    waves = waves.at[:, :half].set(waves[:, half + 1:2 * half + 1][:, ::-1])
    end = jnp.maximum(samples, half + 1) + half  # of the wave, silence added if it is too short to be reflected

    def reflect_end(wave, end):
      tail = jax.lax.dynamic_slice_in_dim(wave, end - 1 - half, half)[::-1]
      return jax.lax.dynamic_update_slice_in_dim(wave, tail, end, 0)
    waves = jax.vmap(reflect_end)(waves, end)
    return self._framed(waves, waves.shape[1] // self.hop - (3 * half + 1) // self.hop + 1)

  def _framed(self, waves, total):
    """waves [..., S], both ends reflected -> the first `total` frames' log-mel [..., F, T]."""
    import jax
    import jax.numpy as jnp
    # Frames are assembled from slices of the greatest common length: a gather would be slow on TPUs.
    size = math.gcd(self.n_fft, self.hop)
    step = self.hop // size
    count = (total - 1) * step + self.n_fft // size
    blocks = waves[..., :count * size].reshape(*waves.shape[:-1], count, size)
    frames = jnp.concatenate([blocks[..., k:k + (total - 1) * step + 1:step, :] for k in range(self.n_fft // size)], -1)
    window, mel = _constants(self)
    with jax.default_matmul_precision('highest'):  # accelerators would otherwise round the power to bfloat16 or TF32
      return _log_mel(frames, window, jnp.asarray(mel), jnp, jnp.fft.rfft)

  def _missing(self, samples):
    """Samples of silence to add to a very short wave before it can be reflected."""
    return max(0, self.n_fft // 2 + 1 - samples)


def _log_mel(frames, window, mel, xp, rfft):
  """frames [..., T, N] -> [..., F, T]: the definition, for the array module `xp` and its `rfft`."""
  spectrum = rfft(frames * window)
  power = spectrum.real ** 2 + spectrum.imag ** 2  # ... T N/2+1
  return xp.log(mel @ xp.swapaxes(power, -1, -2) + np.float32(EPS))


@functools.lru_cache(maxsize=8)
def _constants(spec, sparse=False):
  """Window [N] and mel filters [F, N/2+1], float32, made once per process."""
  window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(spec.n_fft) / spec.n_fft)
  mel = mel_filters(spec)
  if sparse:
    import scipy.sparse
    mel = scipy.sparse.csr_array(mel)
  return window.astype(np.float32), mel


def mel_edges(spec: LogMel) -> np.ndarray:
  """[F+2] Hz: filter f rises from edge f to its centre, edge f+1, and falls to edge f+2; equally spaced on Slaney's mel scale.

  The scale (Slaney's Auditory Toolbox, 1998) is linear up to 1000 Hz, 3 mel for 200 Hz, and logarithmic above, 27 mel for
  a factor of 6.4.
  """
  step, corner = math.log(6.4) / 27, 15.0  # of the logarithmic part; 1000 Hz in mel

  def to_mel(hertz):
    return 3 * hertz / 200 if hertz < 1000 else corner + math.log(hertz / 1000) / step
  mels = np.linspace(to_mel(spec.f_min), to_mel(spec.f_max), spec.n_mels + 2)
  return np.where(mels < corner, mels * 200 / 3, 1000 * np.exp(step * (mels - corner)))


def mel_filters(spec: LogMel) -> np.ndarray:
  """[F, N/2+1] float32: triangles of equal area, as librosa.filters.mel(norm='slaney')."""
  edges = mel_edges(spec)
  bins = np.fft.rfftfreq(spec.n_fft, 1 / spec.sample_rate)
  rising = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
  falling = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
  triangles = np.maximum(0, np.minimum(rising, falling)).astype(np.float32)
  return (triangles * (2 / (edges[2:] - edges[:-2]))[:, None]).astype(np.float32)


def _reflected(wave, start, count):
  """wave[start:start + count], extended past its ends by reflection; a view if it does not reach the ends."""
  if start >= 0 and start + count <= len(wave):
    return wave[start:start + count]
  last = len(wave) - 1
  index = last - np.abs(last - np.abs(np.arange(start, start + count)))
  return np.take(wave, index, mode='clip')  # anything beyond one reflection only pads the last block
