"""Writes a run's scalars to TensorBoard files, in the background."""
from concurrent import futures


class Events:
  """TensorBoard files, written by clu in a thread of their own.

  clu imports TensorFlow, which takes several seconds. So that the first update does not wait for it, rows of step 0 are held
  back until the next row or `close`; a run killed before then has them in metrics.jsonl only.

  Args:
    folder: of the files; a local one, since for stores TensorFlow would use a client of its own.
  """

  def __init__(self, folder):
    self._folder, self._writer = folder, None
    self._waiting, self._sent = [], []
    self._thread = futures.ThreadPoolExecutor(1, 'events')

  def write_scalars(self, step: int, scalars: dict[str, float]):
    """Hands a row to the thread. Raises the error of an earlier row, if there was one."""
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
    """Returns when every row that was handed to the thread is in the files; raises the first error that no call has raised."""
    sent, self._sent = self._sent, []
    for each in sent:
      each.result()
    if self._writer:
      self._writer.flush()

  def close(self):
    """Writes what is left and closes the files; raises as `flush`."""
    try:
      self._send()
      self.flush()
    finally:
      self._thread.shutdown(cancel_futures=True)
      if self._writer:
        self._writer.close()
