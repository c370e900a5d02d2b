"""The exception whose message is written for the user rather than for a debugger."""


class UserError(Exception):
  """A mistake that the user can fix; `main.py` and `m2d-clap` print it as one line and exit with code 2.

  The message states what is wrong, where (file, key or value) and how to fix it.
  """
