"""A pre-trained encoder with a linear classifier on top, for fine-tuning.

Alphabet: B batch, C classes, F mel bins, T frames, N patches, K patches kept, D width, H features of the head.
"""
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from m2d_clap_jax.models.m2d_clap import M2DCLAP
from m2d_clap_jax.models.posemb import sincos_2d

EPSILON = 1e-5
MOMENTUM = 0.1  # weight of a batch in the running statistics


class BatchNorm(nn.Module):
  """Batch normalisation of features [B, H] without scale and offset, as torch.nn.BatchNorm1d(affine=False).

  The statistics are those of the whole batch, also if it is divided over devices. Running statistics are kept in
  'batch_stats': mean [H] and var [H], unbiased.
  """

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    running_mean = self.variable('batch_stats', 'mean', jnp.zeros, x.shape[-1])
    running_var = self.variable('batch_stats', 'var', jnp.ones, x.shape[-1])
    if not train:
      return (x - running_mean.value) * jax.lax.rsqrt(running_var.value + EPSILON)
    mean = jnp.mean(x, axis=0)
    var = jnp.mean(jnp.square(x - mean), axis=0)
    if not self.is_initializing():
      unbiased = var * len(x) / max(len(x) - 1, 1)
      running_mean.value += MOMENTUM * (mean - running_mean.value)
      running_var.value += MOMENTUM * (unbiased - running_var.value)
    return (x - mean) * jax.lax.rsqrt(var + EPSILON)


class Classifier(nn.Module):
  """Encoder, mean over time, batch norm, linear layer.

  Variables: 'params' {'network': M2DCLAP's tree without predictor and CLAP head, 'head': {kernel, bias}}, 'batch_stats'
  {'head_norm': {mean, var}}, and 'tables' {'network': {'pos_embed'}}, see `position_table`.

  Attributes:
    pretrained: the encoder's model. Its norm_stats are not used here: log-mels are already standardised.
    num_classes: C.
    flat: the head's input is the mean patch (H = D), as structured patchout requires, instead of the mean frame with
      the embeddings of a time column's patches side by side (H = F / PF * D).
  """
  pretrained: M2DCLAP
  num_classes: int
  flat: bool = False

  def setup(self):
    self.network = self.pretrained.clone(norm_stats=(0.0, 1.0), text_width=None)
    self.head_norm = BatchNorm()
    self.head = nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01))

  @nn.nowrap
  def on(self, platform: str) -> 'Classifier':
    """The same, arranged for devices of this kind (see `models.vit`)."""
    return self.clone(pretrained=self.pretrained.clone(platform=platform))

  def __call__(self, logmel: jax.Array, keep: jax.Array | None = None, train: bool = False) -> jax.Array:
    """Standardised log-mels [B, F, T] -> logits [B, C], float32; frames beyond the last whole patch are dropped.

    keep: int [B, K], patches that the encoder sees (structured patchout); None: all.
    train: normalise by the batch and update the running statistics, which must be mutable then.
    """
    return self.head(self.head_norm(self.features(logmel, keep), train))

  def features(self, logmel: jax.Array, keep: jax.Array | None = None) -> jax.Array:
    """-> the head's input, before the batch norm: [B, H], float32."""
    if keep is not None and not self.flat:
      raise ValueError('without whole time columns there are no frames: structured patchout needs flat=True')
    z = self.network.encode(logmel, keep=keep)
    return jnp.mean(z if self.flat else self.network.frames(z), axis=1)


def position_table(network: M2DCLAP, columns: int, table: np.ndarray | None = None) -> np.ndarray:
  """The position table of a pre-trained model, adapted to inputs of another length -> [1, 1 + rows * columns, D].

  Cropped for a shorter input; stretched in time by bicubic interpolation for a longer one, so that no position is
  beyond those that the encoder has learned. The interpolation is timm's, that is torch's with antialias=True, which
  differs also when it enlarges a table: Keys' kernel with a = -0.5 instead of -0.75.

  Args:
    columns: patches of the new input along time.
    table: [1, 1 + N, D] stored with the weights; None: sin-cos.
  """
  rows, trained = network.grid
  table = sincos_2d(network.width, network.grid)[None] if table is None else np.asarray(table, np.float32)
  patches = table[0, 1:].reshape(rows, trained, network.width)
  if columns <= trained:
    patches = patches[:, :columns]
  else:
    with jax.default_matmul_precision('highest'):
      patches = np.asarray(jax.image.resize(patches, (rows, columns, network.width), 'cubic'))
  return np.concatenate([table[:, :1], patches.reshape(1, rows * columns, -1)], axis=1)
