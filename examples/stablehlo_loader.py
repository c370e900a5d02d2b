# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # An exported model, with jax alone
# `m2d-clap convert MODEL FOLDER --to stablehlo` writes a program with its weights that needs neither this package nor Flax.
# As a script: `python examples/stablehlo_loader.py FOLDER/stablehlo.npz SOUND.wav...`, recordings of 16 bits at the model's rate.
# As a notebook it uses the demo's model.

# %%
import json
import sys
import wave

import jax
import numpy as np
from jax import export


def load(path):
  """-> (about: a dict, model: function of a list of float32 waves [S] at about['sample_rate'] -> a dict of arrays)."""
  with np.load(path) as file:
    about = json.loads(str(file['about']))
    program = export.deserialize(bytearray(file['program'].tobytes()))
    parameters = jax.device_put([file[name] for name in file.files if name not in ('about', 'program')])
  call, rate = jax.jit(program.call), about['sample_rate']

  def model(waves):
    samples = np.array([len(each) for each in waves], np.int32)
    seconds = -(-samples.max() // rate)  # whole ones: few compilations
    if about['most_seconds'] and seconds > about['most_seconds']:
      raise ValueError(f'a clip of {seconds} s; this model takes {about["most_seconds"]}')
    padded = np.zeros((len(waves), seconds * rate), np.float32)
    for row, each in zip(padded, waves):
      row[:len(each)] = each
    return jax.device_get(call(parameters, padded, samples))
  return about, model


# %%
demo = ['exported/stablehlo.npz', 'data/demo/audio/test/flute-000.wav']
arguments = demo if 'ipykernel' in sys.modules else sys.argv[1:]  # ipykernel: as a notebook
if len(arguments) < 2:
  sys.exit('usage: python examples/stablehlo_loader.py FOLDER/stablehlo.npz SOUND.wav...')
about, model = load(arguments[0])
waves = []
for name in arguments[1:]:
  with wave.open(name) as sound:
    if sound.getframerate() != about['sample_rate'] or sound.getsampwidth() != 2:
      sys.exit(f'{name}: give 16 bits at {about["sample_rate"]} Hz')
    samples = np.frombuffer(sound.readframes(sound.getnframes()), '<i2').reshape(-1, sound.getnchannels())
    waves.append(samples.mean(axis=1, dtype=np.float32) / 32768)
results = model(waves)
for kind, values in results.items():
  print(kind, values.shape, values.dtype)
if about['classes']:
  for name, row in zip(arguments[1:], results['logits']):
    print(name, about['classes'][row.argmax()])
