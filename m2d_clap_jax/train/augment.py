"""Augmentation on the device, inside the jitted step: pure functions of a key.

Alphabet: B batch, C classes, F mel bins, T frames, N patches, K patches kept.
"""
import jax
import jax.numpy as jnp

CANVAS = 1.5  # length of the area that crops are taken from, relative to the input
SCALES = (0.6, 1.5)  # of a crop's sides, relative to the input's
CUBIC = -0.75  # the free parameter of cubic convolution, torch's value


def mixup(key: jax.Array, x: jax.Array, targets: jax.Array, alpha: float) -> tuple[jax.Array, jax.Array]:
  """Mixes each sample with another of the batch, in its own proportion by Beta(alpha, alpha) (arXiv 1710.09412).

  Args:
    x: [B, ...] waveforms, or log-mels before standardisation.
    targets: [B, C], mixed in the same proportion.
  """
  beta, partners = jax.random.split(key)
  share = jax.random.beta(beta, alpha, alpha, (len(x),))
  order = jax.random.permutation(partners, len(x))

  def mix(a):
    weight = share.reshape(-1, *[1] * (a.ndim - 1)).astype(a.dtype)
    return weight * a + (1 - weight) * a[order]
  return mix(x), mix(targets)


def spec_augment(key: jax.Array, x: jax.Array, frequency: int, time: int) -> jax.Array:
  """Sets one band of bins and one span of frames to 0, the same in the whole batch (arXiv 1904.08779).

  Args:
    x: [B, F, T] standardised log-mels, whose mean is 0.
    frequency, time: widths are uniform from 0 to these, in bins and frames; positions are uniform as well.
  """
  keys = jax.random.split(key)
  bins = _span(keys[0], x.shape[1], frequency)
  frames = _span(keys[1], x.shape[2], time)
  return jnp.where(bins[:, None] | frames, 0, x)


def _span(key, size: int, widest: int) -> jax.Array:
  """bool [size], True within a random span of at most `widest`."""
  draws = jax.random.uniform(key, 2)
  width = draws[0] * min(widest, size)
  start = jnp.floor(draws[1] * (size - width))
  place = jnp.arange(size)
  return (place >= start) & (place < start + jnp.floor(width))


def resize_crop(key: jax.Array, x: jax.Array) -> jax.Array:
  """Random resize crop of BYOL-A (arXiv 2103.06695, section III): stretches and shifts in both axes.

  The input lies in the middle of a canvas of zeros, CANVAS times as long. A crop of it, whose sides are random shares
  of the input's (the height at most all of it), is brought to the input's size by bicubic interpolation.

  Args:
    x: [B, F, T] standardised log-mels.
  """
  b, height, width = x.shape
  length = int(width * CANVAS)
  keys = jax.random.split(key)
  tops, heights = _crops(keys[0], b, height, height)
  lefts, widths = _crops(keys[1], b, width, length)
  lead = (length - width) // 2
  canvas = jnp.pad(x, ((0, 0), (0, 0), (lead, length - width - lead)))
  return jax.vmap(resized, in_axes=(0, 0, 0, 0, 0, None))(canvas, tops, heights, lefts, widths, (height, width))


def _crops(key, batch: int, size: int, room: int):
  """Starts and lengths, int [B], of crops of about `size` within `room`."""
  draws = jax.random.uniform(key, (2, batch))
  lengths = jnp.floor(size * (SCALES[0] + (SCALES[1] - SCALES[0]) * draws[0])).astype(jnp.int32)
  lengths = jnp.clip(lengths, 1, room)
  return jnp.floor(draws[1] * (room - lengths + 1)).astype(jnp.int32), lengths


def resized(image: jax.Array, top, height, left, width, shape: tuple[int, int]) -> jax.Array:
  """image[top:top + height, left:left + width] at another size, by cubic convolution; the area may be traced.

  The corners of the area become those of the result. Beyond the area its outermost values continue.
  """
  image = _resize_last(image, left, width, shape[1])
  return _resize_last(image.T, top, height, shape[0]).T


def _resize_last(x, start, length, size: int):
  places = jnp.arange(size) * ((length - 1) / max(size - 1, 1))
  first = jnp.floor(places)
  offset = places - first
  out = 0
  for tap in (-1, 0, 1, 2):
    index = jnp.clip(first.astype(jnp.int32) + tap, 0, length - 1) + start
    out += _cubic(jnp.abs(offset - tap)) * jnp.take(x, index, axis=1)
  return out


def _cubic(x):
  """Keys' kernel at distances x from 0 to 2."""
  near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
  far = ((x - 5) * x + 8) * x * CUBIC - 4 * CUBIC
  return jnp.where(x <= 1, near, far)


def patchout_counts(grid: tuple[int, int], ratio: float, u: float) -> tuple[int, int]:
  """Numbers of (rows, columns) of a grid that structured patchout drops, keeping at least one of each (EVAR).

  Args:
    u: uniform in [0, 1). Of 5 x 62 at 0.5 it picks one of 0/31, 1/19, 2/6 (probability 2/7 each) and 3/0 (1/7).
  """
  rows = min(grid[0] - 1, int(grid[0] * (ratio + 1 / grid[0]) * u))
  columns = int(grid[1] * max(ratio + 0.5 / grid[1] - rows / grid[0], 0))
  return rows, min(grid[1] - 1, columns)


def structured_patchout(key: jax.Array, batch: int, grid: tuple[int, int], drop: tuple[int, int]) -> jax.Array:
  """Drops `drop` whole (frequency rows, time columns), drawn for each sample (after PaSST, arXiv 2110.05069).

  Returns:
    int [B, K]: which patches stay, ascending, numbered frequency-major.
  """
  rows, columns = grid[0] - drop[0], grid[1] - drop[1]
  keys = jax.random.split(key)
  row = _some(keys[0], batch, grid[0], rows)
  column = _some(keys[1], batch, grid[1], columns)
  return (row[:, :, None] * grid[1] + column[:, None, :]).reshape(batch, rows * columns)


def _some(key, batch: int, size: int, count: int) -> jax.Array:
  """`count` of the numbers below `size`, ascending, for each sample: int [B, count]."""
  return jnp.sort(jnp.argsort(jax.random.uniform(key, (batch, size)), axis=1)[:, :count], axis=1)
