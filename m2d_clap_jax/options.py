"""Checks keyword options from the user: an error names a misspelt key and the nearest valid one."""
import difflib
import functools
import inspect
from collections.abc import Callable, Mapping

from m2d_clap_jax.errors import UserError


def at_least_one(where: str, **values: int):
  """Raises UserError for a number below 1. where: prefix of the keys in the message, e.g. 'config.checkpoints'."""
  for key, value in values.items():
    if value < 1:
      raise UserError(f'{where}.{key}={value}: must be at least 1')


def bind(function: Callable, options: Mapping, where: str, given: tuple[str, ...] = ()) -> Callable:
  """functools.partial(function, **options), after checking that the function takes each option.

  Args:
    where: prefix of the options in the message, e.g. 'config.optim'.
    given: parameters that the caller passes itself; they are neither valid nor required as options.

  Raises:
    UserError: an unknown option, or a missing required one.
  """
  parameters = {name: p for name, p in inspect.signature(function).parameters.items()
                if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and name not in given + ('parent', 'name')}
  for key in options:
    if key not in parameters:
      nearest = difflib.get_close_matches(key, parameters, n=1)
      hint = f'did you mean {nearest[0]!r}?' if nearest else f'known keys: {", ".join(parameters)}'
      raise UserError(f'{where}.{key}: unknown key; {hint}')
  missing = [name for name, p in parameters.items() if p.default is p.empty and name not in options]
  if missing:
    raise UserError(f'{where}: missing {", ".join(missing)}')
  return functools.partial(function, **options)
