"""The one exception that is meant for people rather than for debuggers."""


class UserError(Exception):
  """A mistake that the user can mend; `main.py` and `m2d-clap` print it as one line and exit with code 2.

  The message says what was wrong, where (file, key or value) and what to do about it.
  """
