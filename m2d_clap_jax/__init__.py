"""M2D-CLAP in JAX: one audio encoder for transfer learning and for zero-shot classification by text."""

__all__ = ['Pipeline', 'load']


def __getattr__(name):
  # Training and preparation import this package, too: they need not wait for what inference imports.
  if name in __all__:
    from m2d_clap_jax import api
    return getattr(api, name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
