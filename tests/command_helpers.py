"""A small model and real recordings for the tests of commands."""
import numpy as np
import soundfile

from m2d_clap_jax.cli import main
from m2d_clap_jax.weights.portable import save_portable
from tests.small_model import arpeggio, tiny_weights


def save_model(folder, **changes):
  """A portable folder of a random model for crops of 96 frames, with MiniLM's captions -> its name."""
  return str(save_portable(tiny_weights(patch_size=(16, 16), **changes), folder))


def save_recordings(folder):
  """Four usable recordings and two useless ones, in a folder and a sub-folder -> names of the usable ones, in order."""
  (folder / 'more').mkdir(parents=True)
  usable = []
  for name, rate, channels, seconds in (('a.wav', 16000, 1, 2.1), ('b.FLAC', 44100, 2, 0.7), ('c.mp3', 16000, 1, 3),
                                        ('more/d.opus', 48000, 1, 1.2)):
    wave = np.stack([arpeggio(rate, 1 + len(usable) / 5)[:int(seconds * rate)]] * channels, 1)
    form = {'opus': dict(format='OGG', subtype='OPUS')}.get(name.rpartition('.')[2], {})
    soundfile.write(folder / name, wave, rate, **form)
    usable.append(str(folder / name))
  whole = (folder / 'b.FLAC').read_bytes()
  (folder / 'more' / 'cut.flac').write_bytes(whole[:len(whole) // 2])
  (folder / 'more' / 'text.wav').write_text('no sound')
  (folder / 'notes.txt').write_text('nobody asked for this file')
  (folder / '.hidden.wav').write_text('nor for this')
  return usable


def run(*arguments):
  """Runs `m2d-clap` -> exit code."""
  return main.main([str(argument) for argument in arguments])
