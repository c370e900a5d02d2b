"""TensorBoard files in the background: what is written when, and errors of the thread."""
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from m2d_clap_jax.train.events import Events


def steps(folder):
  """Those of the loss in the files of a folder; [] without files."""
  if not list(folder.glob('*tfevents*')):
    return []
  found = EventAccumulator(str(folder))
  found.Reload()
  return [each.step for each in found.Tensors('loss')] if 'loss' in found.Tags()['tensors'] else []


def test_rows_of_step_0_wait_for_the_next_or_the_end(tmp_path):
  events = Events(tmp_path / 'a')
  events.write_scalars(0, {'loss': 2.0})
  events.flush()
  assert steps(tmp_path / 'a') == [], 'or the first update would wait for TensorFlow'
  events.write_scalars(3, {'loss': 1.0})
  events.flush()
  assert steps(tmp_path / 'a') == [0, 3]
  events.close()
  events = Events(tmp_path / 'b')
  events.write_scalars(0, {'loss': 2.0})
  events.close()
  assert steps(tmp_path / 'b') == [0]


@pytest.mark.parametrize('call', [lambda events: events.write_scalars(2, {'loss': 1.0}), Events.flush, Events.close])
def test_an_error_of_the_thread_is_raised_by_the_next_call(call, tmp_path):
  (tmp_path / 'file').write_text('no folder')
  events = Events(tmp_path / 'file')
  events.write_scalars(1, {'loss': 1.0})
  with pytest.raises(Exception, match='Not a directory'):
    events._thread.submit(int).result()  # the row before has been tried
    call(events)


def test_closing_ends_the_thread_after_an_error_too(tmp_path):
  (tmp_path / 'file').write_text('no folder')
  events = Events(tmp_path / 'file')
  events.write_scalars(1, {'loss': 1.0})
  with pytest.raises(Exception, match='Not a directory'):
    events.close()
  assert events._thread._shutdown
