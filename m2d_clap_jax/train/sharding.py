"""Placing arrays on devices: one mesh with a `data` axis; parameters on every device, the batch divided."""
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from m2d_clap_jax.errors import UserError


def make_mesh(devices=None) -> Mesh:
  """All devices (of all processes) along one axis, 'data'."""
  return Mesh(np.asarray(jax.devices() if devices is None else devices), ('data',))


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
  """Divides the first axis over the devices."""
  return NamedSharding(mesh, PartitionSpec('data'))


def to_devices(mesh: Mesh, batch):
  """Joins each process' own part of a batch (a tree of numpy arrays) into global arrays divided over the mesh."""
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(over_batch(mesh), x), batch)


def own_part(x: np.ndarray) -> np.ndarray:
  """This process' equal part of the rows of a global batch."""
  return np.split(x, jax.process_count())[jax.process_index()]


def check_batch(batch_size: int, mesh: Mesh, accumulate: int = 1):
  """Raises UserError unless the batch can be divided over devices and accumulation parts."""
  parts = mesh.size * accumulate
  if batch_size % parts:
    raise UserError(
        f'batch_size={batch_size} cannot be divided over {mesh.size} devices x accumulate={accumulate}: '
        f'take a multiple of {parts}, e.g. {max(parts, round(batch_size / parts) * parts)}')
