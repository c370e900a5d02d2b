"""Weights and their description, from every kind of source: `read` opens them."""
import difflib
import os
import pathlib

from m2d_clap_jax.errors import UserError
from m2d_clap_jax.paths import as_path, is_remote
from m2d_clap_jax.weights.core import Weights, check, expected_shapes, family, overridden

__all__ = ['Weights', 'check', 'expected_shapes', 'family', 'read']


def read(path, **overrides) -> Weights:
  """Opens a run's workdir, a portable folder, a .pth or a .safetensors file, local or in a store, a released model by its
  name (`weights.released`), or a portable model of the Hugging Face Hub as hf://ORGANISATION/NAME[@REVISION].

  What exists here under a released model's name is taken before the cache or the network.

  Args:
    overrides: what a public file does not tell, or tells wrongly: `sample_rate`, `text_encoder` (name or folder) and
      fields of `M2DCLAP` such as `input_size`.

  Raises:
    UserError: nothing usable there, or tensors that are not those of one model.
  """
  from m2d_clap_jax.weights import hub, released
  from m2d_clap_jax.weights.portable import CONFIG, read_portable
  if hub.is_address(path):
    return read_portable(as_path(hub.download(os.fspath(path))), overrides)
  place = as_path(path)
  if not is_remote(place) and not place.exists():
    if not released.is_name(path):
      raise UserError(not_found(os.fspath(path)))
    place = as_path(released.fetch(os.fspath(path)))
  if (place / CONFIG).is_file():
    return read_portable(place, overrides)
  if (place / 'checkpoints').is_dir():
    from m2d_clap_jax.weights.run import read_run
    return overridden(read_run(place), overrides)
  if place.is_dir():
    files = sorted([*place.glob('*.pth'), *place.glob('*.safetensors')])
    if (best := place / 'run0' / 'best').is_dir():
      raise UserError(f'{place}: holds the runs of a fine-tuning: name the classifier of one, such as {best}')
    if len(files) != 1:
      raise UserError(f'{place}: holds {len(files)} checkpoint files and is neither a portable folder ({CONFIG}) nor a '
                      "run's workdir (checkpoints/): name one file")
    place = files[0]
  from m2d_clap_jax.weights.public import read_public
  return read_public(place, overrides)


def not_found(path: str) -> str:
  """The message about a local path that is not there and no released model's name, with what may have been meant."""
  from m2d_clap_jax.weights import hub, released
  place = pathlib.Path(path).expanduser()
  missing = place
  while not missing.parent.exists():
    missing = missing.parent
  try:
    here = os.listdir(missing.parent)
  except OSError:  # a file, or nothing that may be looked at
    here = []
  meant = [os.fspath(missing.parent / name) for name in difflib.get_close_matches(missing.name, here, 1)]
  meant += difflib.get_close_matches(missing.name, released.RELEASED, 1)
  if hub.is_address(hub.SCHEME + path):
    meant.append(f'{hub.SCHEME}{path} on the Hugging Face Hub')
  return (f'{path}: no such file or folder' + (', perhaps ' + ' or '.join(meant) if meant else '')
          + '; `m2d-clap models` lists the models that are opened by their names')
