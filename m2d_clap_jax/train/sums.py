"""Sums of arrays' bits, by which damage is found that decompresses well: storage formats of arrays have no checksums."""
import jax
import jax.numpy as jnp
import numpy as np


def bit_sums(tree) -> dict[str, int]:
  """{path of an array: the sum of its elements' bits as whole numbers, modulo 2 ** 32}, wherever the arrays are.

  Sums of whole numbers do not depend on their order, so that any number of devices and processes gives the same. With
  several processes all must call it. Arrays in the memory of this host are summed by numpy, which compiles nothing.
  """
  leaves = {jax.tree_util.keystr(path, simple=True, separator='/'): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
  on_devices = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, jax.Array) and not _on_host(leaf)}
  sums = {name: _of_numpy(leaf) for name, leaf in leaves.items() if name not in on_devices}
  return sums | {name: int(value) for name, value in jax.device_get(_of_jax(on_devices)).items()}


def _on_host(x: jax.Array) -> bool:
  return x.is_fully_addressable and all(device.platform == 'cpu' for device in x.devices())


@jax.jit
def _of_jax(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
  return {name: jnp.sum(_bits(leaf), dtype=jnp.uint32) for name, leaf in leaves.items()}


def _bits(x: jax.Array) -> jax.Array:
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if x.dtype == bool:
    return x.astype(jnp.uint32)
  return jax.lax.bitcast_convert_type(x, f'uint{8 * x.dtype.itemsize}').astype(jnp.uint32)


def _of_numpy(x: jax.Array | np.ndarray) -> int:
  x = np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
  return int(np.ascontiguousarray(x).view(f'u{x.dtype.itemsize}').sum(dtype=np.uint64)) % 2 ** 32
