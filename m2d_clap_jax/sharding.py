"""Placing arrays on devices: one mesh, and rules that say which axis of which parameter is divided over it.

The mesh has two axes. The batch is divided over both. Parameters, the target network and the optimizer state are
replicated over `data` and divided over `fsdp` (fully sharded data parallelism): each device keeps its part and gathers
the rest of a layer to compute it. With fsdp=1 this is plain data parallelism.
"""
import pickle
import re
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from m2d_clap_jax.errors import UserError

# The first pattern that matches a parameter's path determines which of its axes is divided over `fsdp`. A kernel is
# [in, out], and its wider axis is divided; vectors, tokens and scalars are too small to be worth it.
RULES = (
    (r'(qkv|fc1|patch_embed|embed|pred)/kernel$', PartitionSpec(None, 'fsdp')),
    (r'kernel$', PartitionSpec('fsdp', None)),
    (r'', PartitionSpec()),
)
COPIES = 4  # of the parameters, in float32: themselves, two moments, and the target network (of the encoder)
SHARE = 0.3  # of a device's memory that the state may take before it is divided; activations need the rest


def make_mesh(devices=None, fsdp: int = 1) -> Mesh:
  """All devices (of all processes) as a mesh of (devices / fsdp) x fsdp; UserError if fsdp does not divide them."""
  devices = np.asarray(jax.devices() if devices is None else devices)
  if fsdp < 1 or devices.size % fsdp:
    raise UserError(f'config.mesh.fsdp={fsdp} does not divide the {devices.size} devices: choose one of '
                    f'{[n for n in range(1, devices.size + 1) if devices.size % n == 0]}')
  return Mesh(devices.reshape(-1, fsdp), ('data', 'fsdp'))


def mesh_for(parameters: int, *, fsdp: int | None = None) -> Mesh:
  """The mesh for a run with this number of parameters; fsdp=None lets `choose_fsdp` decide."""
  return make_mesh(fsdp=fsdp or choose_fsdp(parameters))


def count_elements(tree) -> int:
  """The number of elements of a tree's arrays, or of their shapes."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def choose_fsdp(parameters: int, devices=None, memory: int | None = None) -> int:
  """The number of devices to divide the state over so that it takes at most SHARE of a device's memory.

  Args:
    parameters: their number.
    memory: bytes of a device; None queries the device; if it does not report this (a CPU), nothing is divided.
  """
  devices = jax.devices() if devices is None else devices
  memory = memory or device_memory()
  if not memory:
    return 1
  divisors = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
  return next((n for n in divisors if 4 * COPIES * parameters / n <= SHARE * memory), divisors[-1])


def device_memory() -> int | None:
  """Bytes of this process's first device, as only local devices can be queried; None where it does not report them."""
  return (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit')


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
  """Divides the first axis over all devices."""
  return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))


def of_state(shapes, mesh: Mesh):
  """Shapes of a train state (or any tree of parameters) -> the same tree of shardings, by RULES.

  An axis that `fsdp` does not divide evenly stays whole.
  """
  def place(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    spec = next(spec for pattern, spec in RULES if re.search(pattern, name))
    even = len(spec) <= len(leaf.shape) and all(
        axis is None or size % mesh.shape[axis] == 0 for size, axis in zip(leaf.shape, spec))
    return NamedSharding(mesh, spec if even else PartitionSpec())
  return jax.tree_util.tree_map_with_path(place, shapes)


def platform(mesh: Mesh) -> str:
  """The kind of the mesh's devices: 'cpu', 'gpu' or 'tpu'. `M2DCLAP.platform` is set to it."""
  return mesh.devices.flat[0].platform


class Jitted:
  """`jax.jit` of a function on arrays divided over the mesh.

  While it is traced the mesh is known to kernels, which XLA cannot divide: each device runs them on its own samples.
  """

  def __init__(self, function: Callable, mesh: Mesh, **options):
    self._function, self._mesh = jax.jit(function, **options), mesh

  def __call__(self, *args, **kwargs):
    with jax.set_mesh(self._mesh):
      return self._function(*args, **kwargs)

  def lower(self, *args, **kwargs):
    with jax.set_mesh(self._mesh):
      return self._function.lower(*args, **kwargs)


def gather(mesh: Mesh):
  """A function for `pretrain_step` that gathers divided parameters where they are used, or None if none are divided.

  Without it XLA may divide the computation instead, and exchange activations.
  """
  if mesh.shape['fsdp'] == 1:
    return None
  return lambda tree: jax.lax.with_sharding_constraint(tree, replicated(mesh))


def on_one_device(mesh: Mesh, tree):
  """Arrays that are divided over the mesh, or on all of it -> whole, on the first device of this process."""
  return jax.tree.map(lambda x: x.addressable_data(0), jax.device_put(tree, replicated(mesh)))


def jit_update(step: Callable, shapes, mesh: Mesh) -> Jitted:
  """`Jitted` of an update `step(state, batch) -> (state, metrics)`, which reuses the memory of the state that it is given.

  shapes: of the state, or the state itself.
  """
  return Jitted(step, mesh, donate_argnums=0, out_shardings=(of_state(shapes, mesh), replicated(mesh)))


def size_of(tree) -> int:
  """Bytes of all arrays of a tree, or of its shapes."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def table(shapes, mesh: Mesh) -> str:
  """A table of the state: one line per part, with values, bytes on each device, and how it is divided."""
  lines = [f'{"part":<24}{"values":>10}{"MB/device":>13}  divided over']
  for part, tree in _parts(shapes):
    leaves = list(zip(jax.tree.leaves(tree), jax.tree.leaves(of_state(tree, mesh))))
    count = sum(int(np.prod(x.shape)) for x, _ in leaves)
    size = sum(int(np.prod(sharding.shard_shape(x.shape))) * x.dtype.itemsize for x, sharding in leaves)
    divided = sum(int(np.prod(x.shape)) for x, sharding in leaves if sharding.spec)
    over = f'fsdp={mesh.shape["fsdp"]} ({100 * divided / count:.0f}% of it)'
    over = over if divided and mesh.shape['fsdp'] > 1 else 'nothing'
    lines.append(f'{part:<24}{_count(count):>10}{size / 2 ** 20:>13.1f}  {over}')
  return '\n'.join(lines)


def _parts(state):
  for name in ('encoder', 'predictor', 'text_encoder'):
    if name in state.params:
      yield name, {name: state.params[name]}
  rest = {name: tree for name, tree in state.params.items() if name not in ('encoder', 'predictor', 'text_encoder')}
  yield 'heads and embedding', rest
  for part in ('target_params', 'frozen'):
    if getattr(state, part, None):
      yield part.removesuffix('_params'), getattr(state, part)
  yield 'optimizer', state.opt_state


def _count(n: int) -> str:
  return f'{n / 1e6:.1f} M' if n >= 1e5 else str(n)


def to_devices(mesh: Mesh, batch):
  """Joins the processes' parts of a batch (a tree of numpy arrays) into global arrays divided over the mesh."""
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(over_batch(mesh), x), batch)


def rows_on_devices(mesh: Mesh, shape: tuple[int, ...], read: Callable[[int, int], np.ndarray]) -> jax.Array:
  """A global array divided over the mesh by rows from `read(start, stop)`; only rows of local devices are read."""
  return jax.make_array_from_callback(shape, over_batch(mesh), lambda index: read(*index[0].indices(shape[0])[:2]))


def join(items: dict) -> dict:
  """Merges the dictionaries of all processes, with sorted keys; values must be picklable."""
  if jax.process_count() == 1:
    return dict(sorted(items.items()))
  data = np.frombuffer(pickle.dumps(items), np.uint8)
  sizes = multihost_utils.process_allgather(np.int64(data.size))
  every = multihost_utils.process_allgather(np.pad(data, (0, int(sizes.max()) - data.size)))
  joined = {}
  for row, size in zip(every, sizes):
    joined |= pickle.loads(row[:size].tobytes())
  return dict(sorted(joined.items()))


def own_part(x: np.ndarray) -> np.ndarray:
  """This process's equal part of the rows of a global batch."""
  return np.split(x, jax.process_count())[jax.process_index()]


def check_batch(batch_size: int, mesh: Mesh, accumulate: int = 1):
  """Raises UserError unless the batch can be divided over devices and accumulation parts."""
  parts = mesh.size * accumulate
  if batch_size % parts:
    raise UserError(
        f'batch_size={batch_size} cannot be divided over {mesh.size} devices x accumulate={accumulate}: '
        f'use a multiple of {parts}, e.g. {max(parts, round(batch_size / parts) * parts)}')
