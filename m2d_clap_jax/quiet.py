"""Keeping other packages' notices off the terminal."""
import contextlib
import logging


@contextlib.contextmanager
def quiet(name: str):
  """The logger `name` tells errors only, meanwhile."""
  logger = logging.getLogger(name)
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    yield
  finally:
    logger.setLevel(level)
