"""Weights and their description, from every kind of source: `read` opens them."""
import os

from m2d_clap_jax.errors import UserError
from m2d_clap_jax.paths import as_path
from m2d_clap_jax.weights.core import Weights, check, expected_shapes, family, overridden

__all__ = ['Weights', 'check', 'expected_shapes', 'family', 'read']


def read(path, **overrides) -> Weights:
  """Opens a run's workdir, a portable folder, a .pth or a .safetensors file, local or remote, or a model of the Hub.

  Args:
    overrides: what a public file does not tell, or tells wrongly: `sample_rate`, `text_encoder` (name or folder) and
      fields of `M2DCLAP` such as `input_size` or `heads`.

  Raises:
    UserError: nothing usable there, or tensors that are not those of one model.
  """
  from m2d_clap_jax.weights import hub
  from m2d_clap_jax.weights.portable import CONFIG, read_portable
  place = as_path(path)
  if (place / CONFIG).is_file():
    return read_portable(place, overrides)
  if (place / 'checkpoints').is_dir():
    from m2d_clap_jax.weights.run import read_run
    return overridden(read_run(place), overrides)
  if not place.exists() and hub.is_name(path):
    try:
      return read_portable(as_path(hub.download(os.fspath(path))), overrides)
    except UserError as error:
      raise UserError(f'{place}: no such file or folder; on the Hugging Face Hub: {error}') from error
  if place.is_dir():
    files = sorted([*place.glob('*.pth'), *place.glob('*.safetensors')])
    if len(files) != 1:
      raise UserError(f'{place}: holds {len(files)} checkpoint files and is neither a portable folder ({CONFIG}) nor a '
                      "run's workdir (checkpoints/): name one file")
    place = files[0]
  from m2d_clap_jax.weights.public import read_public
  return read_public(place, overrides)
