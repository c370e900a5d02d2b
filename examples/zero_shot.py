# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Zero-shot classification and search
# As a script: `python examples/zero_shot.py MODEL SOUND...`. As a notebook it uses the model and clips of the demo.

# %%
import sys

import numpy as np

import m2d_clap_jax

demo = ['runs/demo', 'data/demo/audio/test/flute-000.wav', 'data/demo/audio/test/violin-000.wav']
arguments = demo if 'ipykernel' in sys.modules else sys.argv[1:]  # ipykernel: as a notebook
if len(arguments) < 2:
  sys.exit('usage: python examples/zero_shot.py MODEL SOUND...')
model = m2d_clap_jax.load(arguments[0])
sounds = arguments[1:]
labels = ['flute', 'trumpet', 'piano', 'violin']

# %% [markdown]
# Which label is nearest to each sound? A template turns a label into a caption; embeddings of several templates are averaged.

# %%
scores = model.classify(sounds, labels=labels, template=['{} can be heard', 'the sound of {}'])
for sound, row in zip(sounds, scores):
  print(sound, ', '.join(f'{labels[i]} {row[i]:.3f}' for i in np.argsort(-row)))

# %% [markdown]
# And the other way: which sound is nearest to a sentence?

# %%
sentence = 'a flute plays softly'
nearness = model.classify(sounds, labels=[sentence], template='{}')[:, 0]
print(f'{sentence}:', ', '.join(f'{sounds[i]} {nearness[i]:.3f}' for i in np.argsort(-nearness)))
