"""The training objectives: arrays in, scalars out, always in float32.

Every mean runs over the global batch. Under jit with a sharded batch this gives the true global-batch loss and gradient
without any axis name; `clip_loss` compares this with the authors' multi-GPU runs.
"""
import jax
import jax.numpy as jnp


def normalize(x: jax.Array, epsilon: float = 1e-12) -> jax.Array:
  """Scales the last axis to unit length; a zero vector stays zero (and gets a zero gradient, not NaN)."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), epsilon**2))


def standardize(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
  """(x - mean) / sqrt(var + eps) over the last axis, with the unbiased variance (ddof 1)."""
  x = x.astype(jnp.float32)
  centred = x - jnp.mean(x, axis=-1, keepdims=True)
  variance = jnp.sum(centred * centred, axis=-1, keepdims=True) / (x.shape[-1] - 1)
  return centred * jax.lax.rsqrt(variance + epsilon)


def m2d_loss(prediction: jax.Array, target: jax.Array) -> jax.Array:
  """Mean of 2 - 2 cos(prediction, standardised target) over masked tokens (M2D, section 3.1).

  Args:
    prediction: [B, M, D] output of the predictor at the masked places.
    target: [B, M, D] output of the target encoder at the same places; no gradient flows into it.
  """
  target = jax.lax.stop_gradient(standardize(target))
  return jnp.mean(2 - 2 * jnp.sum(normalize(prediction) * normalize(target), axis=-1))


def pixel_loss(prediction: jax.Array, patches: jax.Array) -> jax.Array:
  """Mean squared error to per-patch standardised log-mel values, both [B, M, P] (MSM-MAE)."""
  return jnp.mean(jnp.square(prediction.astype(jnp.float32) - standardize(patches)))


def clip_loss(audio: jax.Array, text: jax.Array, logit_scale: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Symmetric contrastive loss between paired embeddings (M2D-CLAP, section 2.2).

  Args:
    audio, text: [B, E], row i of one belongs to row i of the other; not normalised.
    logit_scale: scalar s; cosines are multiplied by exp(s).

  Returns:
    the mean of the two cross-entropies, and the logits [B, B] (rows audio, columns text).

  The gradient is that of the whole batch. The authors' DistributedDataParallel runs on G GPUs gather the other ranks'
  features without gradient and then average gradients, so encoder and projectors receive 1/G of it: their
  `loss_off 0.01` on 4 GPUs corresponds to a weight of 0.0025 here.
  """
  # The default precision of accelerators is bfloat16 or TF32: errors of up to 0.4 in logits at a scale of 100.
  logits = jnp.exp(logit_scale) * jnp.matmul(normalize(audio), normalize(text).T, precision='highest')
  to_text, to_audio = cross_entropies(logits)
  return 0.5 * (jnp.mean(to_text) + jnp.mean(to_audio)), logits


def cross_entropies(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Logits [B, B], rows audio and columns text -> each clip's loss among the texts, each text's among the clips, [B]."""
  matching = jnp.diagonal(logits)
  return jax.nn.logsumexp(logits, axis=1) - matching, jax.nn.logsumexp(logits, axis=0) - matching
