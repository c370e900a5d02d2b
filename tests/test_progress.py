"""The progress of a command on a terminal and in a log file."""
import io
import sys

from m2d_clap_jax import progress


class Terminal(io.StringIO):

  def isatty(self):
    return True


def test_lines_do_not_tear_the_bar_of_a_terminal(monkeypatch):
  monkeypatch.setattr(sys, 'stderr', screen := Terminal())
  bar = progress.Progress('files', 3)
  bar.step()
  bar.write('a line', screen)
  bar.step()
  bar.close()
  before, after = screen.getvalue().split('a line\n')
  assert '0/3' in before and before.endswith('\r'), 'the bar is wiped away, and the cursor at the left'
  assert '1/3' in after and '2/3' in after, 'it is drawn again'


def test_a_log_file_gets_a_line_every_half_minute_with_the_time_left(monkeypatch, capsys):
  now = [0.0]
  monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
  log = progress.Progress('files', 100)
  for now[0] in range(6, 67, 6):
    log.step()
  assert capsys.readouterr().err.splitlines() == ['files: 6 of 100, 9 min left']
