"""Keeping other packages' notices off the terminal."""
import contextlib
import logging


@contextlib.contextmanager
def quiet(logger: str | logging.Logger):
  """A logger, or the one of that name, tells errors only, meanwhile."""
  logger = logging.getLogger(logger) if isinstance(logger, str) else logger
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    yield
  finally:
    logger.setLevel(level)
