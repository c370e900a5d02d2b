"""Functions for decoding processes, some of which crash or never end. Each process imports this module, and little else."""
import os
import time

import numpy as np

from m2d_clap_jax.audio import decode, readers
from m2d_clap_jax.data import worker

AWKWARD = ('segfault.wav', 'once.wav', 'exit.wav', 'loop.wav')


def stream(path, *arguments):
  """`decode.stream` with a decoder that crashes over some files: always, or the first time only (memory was short)."""
  name = os.path.basename(path)
  for block in decode.stream(path, *arguments):
    for half in np.array_split(block, 2):
      yield half
      if name == 'segfault.wav':
        os.kill(os.getpid(), 11)
      if name == 'once.wav' and not os.path.exists(f'{path}.tried'):
        open(f'{path}.tried', 'w').close()
        os.kill(os.getpid(), 9)
      if name == 'exit.wav':
        os._exit(3)
      if name == 'loop.wav':
        time.sleep(3600)


def logmel(path, *arguments):
  """`worker.from_audio` with that decoder."""
  list(stream(path, 16000))
  yield from worker.from_audio(path, *arguments)


def echo(name):
  """Late answers for early questions."""
  value = int(name)
  time.sleep(0.02 if value % 3 == 0 else 0)
  print('noise on stdout')
  if value % 5 == 0:
    raise KeyError('five')
  yield name


def small_blocks(*arguments):
  """`decode.stream` in such small blocks that damage shows when a part has been encoded already."""
  readers._BLOCK = 1000
  yield from decode.stream(*arguments)
