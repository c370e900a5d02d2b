"""The comparison of stages: scores of models as they are opened, over the runs of a pattern."""
import json

import numpy as np
import soundfile

from benchmarks import stage_scores
from m2d_clap_jax import api
from m2d_clap_jax.data.prepare import prepare
from tests.command_helpers import save_model
from tests.prepare_helpers import RATE, noise, write_manifest

KINDS = 'bell', 'horn', 'wind'


def test_scores_are_those_of_each_model_on_the_start_of_the_test_clips(tmp_path, capsys):
  sounds = tmp_path / 'sounds'
  sounds.mkdir()
  rows = [(f'{i}.wav', f'{KINDS[i % 3]} number {i}', KINDS[i % 3], 'test' if i < 9 else 'train') for i in range(18)]
  waves = {name: noise(0.3 + 0.1 * i, seed=i) for i, (name, *_) in enumerate(rows)}  # of 0.96 s the model sees
  for name, wave in waves.items():
    soundfile.write(sounds / name, wave, RATE, subtype='FLOAT')
  write_manifest(sounds / 'kinds.csv', [(name, label, split) for name, _, label, split in rows], ('file_name', 'label', 'split'))
  captions = write_manifest(tmp_path / 'captions.csv', rows)
  prepare(captions, sounds, tmp_path / 'data', text_encoder='none', workers=1)
  for seed in '01':
    save_model(tmp_path / 'runs' / seed, semantic_depth=1, **({'audio_projector': 'semantic'} if seed == '1' else {}))
  stage_scores.main(['--corpus', str(sounds), '--tasks', 'kinds.csv', '--captions', str(tmp_path / 'data'), '--stages',
                     f'one={tmp_path}/runs/0', f'both={tmp_path}/runs/*', '--out', str(tmp_path / 'scores.json')])
  scores = json.loads((tmp_path / 'scores.json').read_text())['scores']
  assert scores['one'] == scores['both'][:1] and len(scores['both']) == 2
  for seed in (0, 1):
    model, found = api.load(tmp_path / 'runs' / str(seed)), []
    for name, _, label, _ in rows[:9]:
      wave = np.pad(waves[name], (0, RATE))[:95 * 160]
      found.append(model.classify(wave[None], labels=KINDS)[0].argmax() == KINDS.index(label))
    assert scores['both'][seed]['zero-shot kinds'] == np.mean(found)
  assert {'linear kinds', 'retrieval text to audio/R@1', 'retrieval audio to text/R@10'} <= set(scores['one'][0])
  both = [100 * score['zero-shot kinds'] for score in scores['both']]
  assert f'| {np.mean(both):.1f} ({min(both):.1f} to {max(both):.1f}) |' in capsys.readouterr().out
