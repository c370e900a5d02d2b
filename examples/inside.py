# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Looking inside: mask, attention, frames
# As a script: `python examples/inside.py MODEL SOUND`, which writes the figures into the current folder. As a notebook it uses the
# model and a clip of the demo.

# %%
import os
import sys

import jax
import numpy as np

import m2d_clap_jax
from m2d_clap_jax.eval import plots
from m2d_clap_jax.eval.attention import cls_attention
from m2d_clap_jax.models.masking import as_bool, num_visible, random_mask

demo = ['runs/demo', 'data/demo/audio/test/flute-000.wav']
arguments = demo if 'ipykernel' in sys.modules else sys.argv[1:]  # ipykernel: as a notebook
if len(arguments) != 2:
  sys.exit('usage: python examples/inside.py MODEL SOUND')
model, sound = m2d_clap_jax.load(arguments[0]), arguments[1]
captions = ['a flute plays a melody', 'a trumpet plays a long note', 'someone plays a chord on a piano']

# %% [markdown]
# What the online encoder sees in pre-training, with the captions ordered by similarity.

# %%
logmel, attention = cls_attention(model, sound)
grid = attention.shape[2:]
patches = grid[0] * grid[1]
mask = as_bool(random_mask(jax.random.uniform(jax.random.key(0), (1, patches)),
                           num_visible(patches, model.network.mask_ratio)))[0]
scores = model.classify(sound, labels=captions, template='{}')[0]
order = np.argsort(-scores)
plots.masked_clip(logmel, mask, grid, model.network.patch_size, 'mask.png', spec=model.logmel, title=os.path.basename(sound),
                  captions=[captions[i] for i in order], scores=scores[order])

# %% [markdown]
# What [CLS] attends to in the last block, head by head.

# %%
maps = {f'head {i + 1}': heads for i, heads in enumerate(attention[-1][:4])}
plots.attention_maps(logmel, maps, 'attention.png', spec=model.logmel, title=os.path.basename(sound))

# %% [markdown]
# Similarity of the sound's frames: blocks along the diagonal are stretches that sound alike.

# %%
frames, times = model.encode_frames(sound)
unit = frames[0] / np.linalg.norm(frames[0], axis=1, keepdims=True)
seconds = (times[0][-1] + times[0][1]) / 1000  # the stamps are those of the frames' beginnings
print(f'{patches} patches, {mask.sum()} masked; {len(unit)} frames; nearest caption: {captions[order[0]]}')
plots.frame_similarity(unit @ unit.T, seconds, 'frames.png', title='similarity of frames')
