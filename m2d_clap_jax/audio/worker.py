"""The process at the other end of `audio.pool`: decoders are C code that reads untrusted files.

Imports neither jax nor TensorFlow, unless the function does.
"""
import importlib
import signal
import sys
from multiprocessing.connection import Connection

from m2d_clap_jax.audio.decode import AudioError
from m2d_clap_jax.errors import UserError


def serve(target: str, connection: Connection):
  """Answers requests until the connection is closed; `target` is 'module:function', of a generator function.

  A request is a tuple of arguments, the first of them a path. An answer is (False, result) for each result, then
  (True, None), or (True, error) with a UserError.
  """
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process ends this one
  module, name = target.split(':')
  function = getattr(importlib.import_module(module), name)
  connection.send('ready')
  while True:
    try:
      arguments = connection.recv()
    except EOFError:
      return
    end: UserError | None = None
    try:
      for result in function(*arguments):
        connection.send((False, result))
    except UserError as error:
      end = error
    except Exception as error:  # a bad file must not end a run, whatever a library raises
      end = AudioError(f'{arguments[0]}: {type(error).__name__}: {" ".join(str(error).split())[:500]}')
    connection.send((True, end))


if __name__ == '__main__':
  serve(sys.argv[1], Connection(int(sys.argv[2])))
