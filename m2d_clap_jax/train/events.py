"""Writes a run's scalars to TensorBoard files, in the background."""
from concurrent import futures


class Events:
  """TensorBoard files, written by clu in a thread of their own.

  clu imports TensorFlow, several seconds that the first update does not wait for: rows of step 0 are written with the next.
  An error of the thread is raised by a later call.
  """

  def __init__(self, folder):
    self._folder, self._writer = folder, None
    self._waiting, self._sent = [], []
    self._thread = futures.ThreadPoolExecutor(1, 'events')

  def write_scalars(self, step: int, scalars: dict[str, float]):
    self._waiting.append((step, scalars))
    if step:
      self._send()

  def _send(self):
    for each in [each for each in self._sent if each.done()]:
      self._sent.remove(each)
      each.result()
    self._sent += [self._thread.submit(self._write, *row) for row in self._waiting]
    self._waiting = []

  def _write(self, step: int, scalars: dict[str, float]):
    if self._writer is None:
      from clu import metric_writers
      self._writer = metric_writers.SummaryWriter(str(self._folder))
    self._writer.write_scalars(step, scalars)

  def flush(self):
    """Returns when every row is in the files."""
    self._send()
    sent, self._sent = self._sent, []
    for each in sent:
      each.result()
    if self._writer:
      self._writer.flush()

  def close(self):
    try:
      self.flush()
    finally:
      self._thread.shutdown(cancel_futures=True)
      if self._writer:
        self._writer.close()
