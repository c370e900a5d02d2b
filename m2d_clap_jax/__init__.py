"""M2D-CLAP in JAX: one audio encoder for transfer learning and for zero-shot classification by text."""

__all__ = ['Pipeline', 'load', '__version__']


def __getattr__(name):
  # Training and preparation import this package, too: they need not wait for what inference imports.
  if name == '__version__':
    return _version()
  if name in __all__:
    from m2d_clap_jax import api
    return getattr(api, name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
  return sorted({*globals(), *__all__})


def _version() -> str:
  """What setup.cfg says: as it was installed, or, in a checkout that is not installed, as it stands there."""
  import configparser
  import importlib.metadata
  import pathlib
  try:
    return importlib.metadata.version('m2d-clap-jax')
  except importlib.metadata.PackageNotFoundError:
    parser = configparser.ConfigParser()
    parser.read(pathlib.Path(__file__).parent.parent / 'setup.cfg')
    return parser.get('metadata', 'version', fallback='unknown')
