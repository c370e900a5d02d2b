"""Attention in one kernel for TPUs: nothing of the size of the scores leaves the chip's own memory.

The sequences of this model are short (58 to 400 tokens), so all keys and queries of a head fit there at once; a sample's
attention is computed without an online softmax, and again in the backward pass, whose only residual is the projection.

Alphabet: B batch, L tokens, D width, H heads, K head width.

A TPU works on rows of 128 numbers, wider than a head (64, or 32 in the predictor). The kernel therefore reads and writes
whole groups of 128 / K heads, in the layout [B, L, 3 D] that the projection has, and masks the rest of the
group in one factor of each product. The product of 128 columns costs what that of K would, since the unit is that wide.
"""
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

LANES = 128  # columns of a TPU's registers and matrix unit
BLOCK_BYTES = 2 ** 21  # of projections that one call of the kernel holds, besides as much again that is being fetched


def fits(width: int, heads: int) -> bool:
  """Whether the kernel takes this width: heads that fill groups of 128 columns."""
  return width % LANES == 0 and LANES % (width // heads) == 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def fused_attention(qkv: jax.Array, valid: jax.Array | None, heads: int) -> jax.Array:
  """Multi-head self-attention: projections [B, L, 3 D] (queries, keys, values) -> [B, L, D], before the output layer.

  valid: bool [B, L], the tokens that are attended to; None means all. Products take the type of `qkv`, sums and
  softmax are float32. On other devices than TPUs the kernel is interpreted, which is for tests.
  The batch may be divided over the devices of a mesh set by `jax.set_mesh`; each then computes its own samples.
  """
  return _over_batch(_forward, heads, qkv, valid)


def _fwd(qkv, valid, heads):
  return fused_attention(qkv, valid, heads), (qkv, valid)


def _bwd(heads, residuals, gradient):
  qkv, valid = residuals
  return _over_batch(_backward, heads, qkv, valid, gradient), None


fused_attention.defvjp(_fwd, _bwd)


def _over_batch(call, heads: int, qkv, valid, *more):
  """`call` for each device's part of the batch, since XLA cannot divide a kernel itself."""
  def run(*arrays):
    *arrays, valid = arrays
    return call(*arrays, valid=valid, heads=heads)
  axes = jax.sharding.get_abstract_mesh().axis_names
  if axes:
    rows = PartitionSpec(axes)
    run = jax.shard_map(run, in_specs=rows, out_specs=rows, check_vma=False)
  return run(qkv, *more, None if valid is None else valid.astype(jnp.float32)[:, None])


def _forward(qkv, *, valid, heads):
  return _call(_forward_kernel, 4, qkv, valid=valid, heads=heads, width=qkv.shape[2] // 3)


def _backward(qkv, gradient, *, valid, heads):
  return _call(_backward_kernel, 10, qkv, gradient, valid=valid, heads=heads, width=qkv.shape[2])


def _call(kernel, products: int, *arrays, valid, heads: int, width: int):
  """Runs `kernel` over blocks of samples -> [B, L, width]. `products`: FLOP of it are that many L^2 D."""
  qkv = arrays[0]
  b, l, columns = qkv.shape
  most = max(1, BLOCK_BYTES // (l * columns * qkv.dtype.itemsize))
  samples = next(n for n in range(min(most, b), 0, -1) if b % n == 0)
  arrays = arrays if valid is None else (*arrays, valid)

  def spec(x):
    return pl.BlockSpec((samples, *x.shape[1:]), lambda i: (i, 0, 0))
  out = jax.ShapeDtypeStruct((b, l, width), qkv.dtype)
  cost = pl.CostEstimate(flops=products * b * l * l * columns // 3, transcendentals=b * heads * l * l,
                         bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, out)))

  def run(*arrays, interpret):
    return pl.pallas_call(
        functools.partial(kernel, heads=heads, masked=valid is not None), out, grid=(b // samples,),
        in_specs=[spec(x) for x in arrays], out_specs=spec(out), cost_estimate=cost, interpret=interpret,
        name=kernel.__name__.strip('_'))(*arrays)
  return jax.lax.platform_dependent(*arrays, tpu=functools.partial(run, interpret=False),
                                    default=functools.partial(run, interpret=True))


def _for_each_group(body, shape, heads: int):
  """Calls body(sample, (columns of q, k and v), masks [1, 128] of the heads in them) for all groups of heads of a block of
  projections of this shape."""
  samples, _, columns = shape
  width = columns // 3
  groups, head = width // LANES, width // heads
  lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
  masks = [(lane >= start) & (lane < start + head) for start in range(0, LANES, head)]

  def step(i, carry):
    start = i % groups * LANES
    body(i // groups, [pl.ds(pl.multiple_of(part * width + start, LANES), LANES) for part in range(3)], masks)
    return carry
  jax.lax.fori_loop(0, samples * groups, step, 0)


def _softmax(scores, valid):
  """Of [L, L] over the last axis."""
  if valid is not None:
    scores = jnp.where(valid > 0, scores, jnp.finfo(scores.dtype).min)
  weights = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
  return weights / jnp.sum(weights, axis=1, keepdims=True)


def _product(a, b, over):
  return jax.lax.dot_general(a, b, (over, ((), ())), preferred_element_type=jnp.float32)


ROWS_BY_ROWS, ROWS_BY_COLUMNS, COLUMNS_BY_COLUMNS = ((1,), (1,)), ((1,), (0,)), ((0,), (0,))  # a b^T, a b, a^T b


def _forward_kernel(qkv_ref, *refs, heads, masked):
  *valid_ref, out_ref = refs
  scale = 1 / math.sqrt(qkv_ref.shape[2] // 3 // heads)

  def group(n, parts, masks):
    q, k, v = (qkv_ref[n, :, part] for part in parts)
    valid = valid_ref[0][n] if masked else None
    out = jnp.zeros(q.shape, jnp.float32)
    for mask in masks:
      weights = _softmax(_product(jnp.where(mask, q, 0), k, ROWS_BY_ROWS) * scale, valid)
      out = jnp.where(mask, _product(weights.astype(v.dtype), v, ROWS_BY_COLUMNS), out)
    out_ref[n, :, parts[0]] = out.astype(out_ref.dtype)
  _for_each_group(group, qkv_ref.shape, heads)


def _backward_kernel(qkv_ref, gradient_ref, *refs, heads, masked):
  *valid_ref, out_ref = refs
  scale = 1 / math.sqrt(qkv_ref.shape[2] // 3 // heads)

  def group(n, parts, masks):
    q, k, v = (qkv_ref[n, :, part] for part in parts)
    g = gradient_ref[n, :, parts[0]]
    valid = valid_ref[0][n] if masked else None
    dq = dk = dv = jnp.zeros(q.shape, jnp.float32)
    for mask in masks:
      weights = _softmax(_product(jnp.where(mask, q, 0), k, ROWS_BY_ROWS) * scale, valid)
      dweights = _product(jnp.where(mask, g, 0), v, ROWS_BY_ROWS)
      dscores = weights * (dweights - jnp.sum(weights * dweights, axis=1, keepdims=True)) * scale
      dscores = dscores.astype(q.dtype)
      dv = jnp.where(mask, _product(weights.astype(g.dtype), g, COLUMNS_BY_COLUMNS), dv)
      dk = jnp.where(mask, _product(dscores, q, COLUMNS_BY_COLUMNS), dk)
      dq = jnp.where(mask, _product(dscores, k, ROWS_BY_COLUMNS), dq)
    for part, x in zip(parts, (dq, dk, dv)):
      out_ref[n, :, part] = x.astype(out_ref.dtype)
  _for_each_group(group, qkv_ref.shape, heads)
