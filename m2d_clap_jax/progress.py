"""Progress on standard error, and silencing of other packages' notices."""
import contextlib
import logging
import sys
import time


class Progress:
  """A progress line with the remaining time on a terminal; elsewhere (log files) one line every half minute."""

  def __init__(self, name, total=None):
    self.name, self.done, self.total = name, 0, total
    self.start = self.last_printed = time.monotonic()
    self.bar = None

  def step(self):
    """Counts one more file, written or rejected."""
    self(self.done + 1, self.total)

  def __call__(self, done, total):
    self.done, self.total = done, total
    if sys.stderr.isatty():
      if self.bar is None:
        import tqdm
        self.bar = tqdm.tqdm(total=total, desc=self.name, unit=' ' + self.name, dynamic_ncols=True)
      self.bar.update(done - self.bar.n)
      if done >= total:
        self.close()
      return
    now = time.monotonic()
    if now - self.last_printed > 30:
      self.last_printed = now
      left = (now - self.start) / done * (total - done) if done else 0
      print(f'{self.name}: {done} of {total}, {left / 60:.0f} min left', file=sys.stderr, flush=True)

  def write(self, line, file):
    """Prints a line without tearing the bar, which may be on the same terminal."""
    if self.bar is not None:
      self.bar.clear()
    print(line, file=file, flush=True)
    if self.bar is not None:
      self.bar.refresh()

  def close(self):
    """Ends the line."""
    if self.bar is not None:
      self.bar.close()
      self.bar = None


@contextlib.contextmanager
def quiet(logger: str | logging.Logger):
  """Limits a logger, given itself or by name, to errors within the block."""
  logger = logging.getLogger(logger) if isinstance(logger, str) else logger
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    yield
  finally:
    logger.setLevel(level)
