"""Fixed two-dimensional sin-cos position tables (as in MAE and M2D)."""
import numpy as np


def sincos_1d(width: int, index: np.ndarray) -> np.ndarray:
  """Encodes positions `index` [N] as [N, width]: all sines, then all cosines, of index / 10000^(i / (width / 2))."""
  frequency = 1.0 / 10000 ** (np.arange(width // 2, dtype=np.float64) / (width / 2))
  angle = np.outer(index.astype(np.float64), frequency)
  return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def sincos_2d(width: int, grid: tuple[int, int]) -> np.ndarray:
  """Position table of a grid of patches, with a zero row in front for [CLS].

  Args:
    width: token width D, a multiple of 4.
    grid: patches along (frequency, time).

  Returns:
    float32 [1 + N, D], patches numbered frequency-major. The first half of a row encodes the time index and the
    second half the frequency index. For each frequency a longer table begins with the shorter one: cropping a table
    in time equals computing a smaller one.
  """
  if width % 4:
    raise ValueError(f'token width must be a multiple of 4 for 2-D sin-cos positions, got {width}')
  frequency, time = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing='ij')
  table = np.concatenate([sincos_1d(width // 2, time.ravel()), sincos_1d(width // 2, frequency.ravel())], axis=1)
  return np.concatenate([np.zeros((1, width)), table]).astype(np.float32)
