# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # A linear probe on frozen features
# As a script: `python examples/linear_probe.py MODEL FOLDER`; FOLDER has the sounds of each class in a sub-folder. As a notebook
# it uses the demo's model, and its test clips of eight instruments.

# %%
import pathlib
import sys

import numpy as np

import m2d_clap_jax
from m2d_clap_jax.audio.files import find
from m2d_clap_jax.eval import class_plots
from m2d_clap_jax.eval.logistic_probe import logistic_probe

demo = ['runs/demo', 'sounds']
arguments = demo if 'ipykernel' in sys.modules else sys.argv[1:]  # ipykernel: as a notebook
if len(arguments) != 2:
  sys.exit('usage: python examples/linear_probe.py MODEL FOLDER')
model = m2d_clap_jax.load(arguments[0])
files = [pathlib.Path(name) for name in find([arguments[1]])]  # audio files only, without hidden ones
classes = sorted({path.parent.name for path in files})
labels = np.array([classes.index(path.parent.name) for path in files])
if len(classes) < 2 or np.bincount(labels).min() < 4:
  sys.exit(f'{arguments[1]}: needs two or more sub-folders with at least four sounds each')

# %% [markdown]
# Every fourth sound of a class is a test sound; the encoder is not trained.

# %%
features = model.embed(files)
rank = np.array([np.sum(labels[:i] == labels[i]) for i in range(len(files))])
test = rank % 4 == 3
found = logistic_probe(features[~test], labels[~test], features[test], labels[test])
print(f'{100 * found["accuracy"]:.1f}% of {test.sum()} test sounds, {len(classes)} classes')
class_plots.embedding_map(features, labels, classes, 'embeddings.png', title='clip embeddings (t-SNE)')
