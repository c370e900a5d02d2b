"""FLOP of the method, and of a compiler's products."""
import math
import re

from m2d_clap_jax.models import M2DCLAP
from m2d_clap_jax.models.masking import num_visible


def block_flops(tokens: int, width: int, wanted: int | None = None) -> float:
  """Forward FLOP of one transformer block whose MLP is four times as wide: qkv of all tokens; the two products of attention,
  projection and MLP of `wanted` of them, or of all."""
  wanted = tokens if wanted is None else wanted
  return 2 * width * width * (3 * tokens + (1 + 2 * 4) * wanted) + 4 * tokens * wanted * width


def sample_flops(model: M2DCLAP) -> dict[str, float]:
  """FLOP of one sample by the method's arithmetic, matrix products only: forward parts and a whole step.

  Trained parts count three times (forward, gradients of inputs and of weights), the target encoder once. Excludes
  recomputation, optimizer and EMA, and the B x B logits, which depend on the batch.
  """
  patches, pixels = model.num_patches, model.patch_size[0] * model.patch_size[1]
  visible = num_visible(patches, model.mask_ratio)
  width, narrow = model.width, model.predictor_width
  out_width = pixels if model.predict == 'pixels' else width
  encoder = model.depth * block_flops(1 + visible, width)
  target = 0 if model.predict == 'pixels' else model.depth * block_flops(1 + patches - visible, width)
  predictor = ((model.predictor_depth - 1) * block_flops(1 + patches, narrow)
               + block_flops(1 + patches, narrow, wanted=patches - visible) + 2 * (1 + visible) * width * narrow
               + 2 * (patches - visible) * narrow * out_width)
  other = 2 * patches * pixels * width
  if model.text_width is not None:
    other += 4 * width * width + (0 if model.text_width == width else 2 * model.text_width * width)
  return {'encoder': encoder, 'target': target, 'predictor': predictor,
          'step': 3 * (encoder + predictor + other) + target}


def convolution_flops(left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...], attributes: str) -> float:
  """FLOP of a `dot` or `convolution` as compilers write them: TPUs state every matrix product as a convolution.

  Batch axes of a product then are spatial axes, dilated so that each position meets one of the other side: only pairs
  that exist are counted, as by XLA's own analysis.
  """
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', attributes)
  if not labels:
    contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', attributes)
    axes = [int(axis) for axis in contracted[1].split(',') if axis] if contracted else []
    return 2.0 * math.prod(out) * math.prod(left[axis] for axis in axes)
  size_of_left, size_of_right, size_of_out = (dict(zip(names, shape)) for names, shape in zip(
      labels.groups(), (left, right, out)))
  pairs = 1
  for axis in (name for name in labels[3] if name.isdigit()):
    i = int(axis)
    stride, dilate, inner = (_window(attributes, name, i, '1') for name in ('stride', 'lhs_dilate', 'rhs_dilate'))
    low = _window(attributes, 'pad', i, '0_0').partition('_')[0]
    pairs *= _pairs(size_of_left[axis], size_of_right[axis], size_of_out[axis], *map(int, (stride, low, dilate, inner)))
  groups = re.search(r'batch_group_count=(\d+)', attributes)
  return (2.0 * size_of_left['b'] / (int(groups[1]) if groups else 1) * size_of_right['i'] * size_of_right['o'] * pairs)


def _window(attributes: str, name: str, axis: int, default: str) -> str:
  found = re.search(rf'window=\{{[^}}]*\b{name}=([\d_x\-]+)', attributes)
  return found[1].split('x')[axis] if found else default


def _pairs(inputs: int, kernel: int, outputs: int, stride: int, low: int, dilate: int, inner: int) -> int:
  """Along one axis, the pairs of an output and a kernel position that meet an input."""
  count = 0
  for position in range(kernel):
    at = [out * stride - low + position * inner for out in range(outputs)]
    count += sum(1 for x in at if 0 <= x < (inputs - 1) * dilate + 1 and x % dilate == 0)
  return count
