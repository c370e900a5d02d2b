"""Keyword options that come from people: a misspelt key is named, with the nearest valid one."""
import difflib
import functools
import inspect
from collections.abc import Callable, Mapping

from m2d_clap_jax.errors import UserError


def at_least_one(where: str, **values: int):
  """Raises UserError for a number below 1. where: what the values belong to, e.g. 'config.checkpoints'."""
  for key, value in values.items():
    if value < 1:
      raise UserError(f'{where}.{key}={value}: must be at least 1')


def bind(function: Callable, options: Mapping, where: str, given: tuple[str, ...] = ()) -> Callable:
  """functools.partial(function, **options), after checking that the function takes each option.

  Args:
    where: what to call the options in the message, e.g. 'config.optim'.
    given: parameters that the caller passes itself; they are neither valid nor required as options.

  Raises:
    UserError: an option that the function does not have, or a required one that is missing.
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
