"""The evaluation tasks of the paper: how long their clips are, what is scored, and their zero-shot captions (EVAR)."""
from typing import NamedTuple

CAN_BE_HEARD = '{} can be heard'
CREMAD = {'ANG': 'angry person talking', 'DIS': 'someone talking in disgust',
          'FEA': 'someone talking with a sense of fear', 'HAP': 'someone talking happily and joyfully',
          'NEU': 'someone talking calmly', 'SAD': 'someone talking sadly'}


class Settings(NamedTuple):
  """Of a task. seconds: of a clip, None where that is not known; metric: 'accuracy' (one label a clip) or 'mAP'
  (several), None where the labels decide; template: makes a caption of what is heard, which is the label unless `heard`
  says otherwise."""
  seconds: float | None
  metric: str | None = 'accuracy'
  template: str = CAN_BE_HEARD
  heard: dict[str, str] = {}


TASKS = {
    'esc50': Settings(5.0),
    'us8k': Settings(4.0),
    'spcv2': Settings(1.0),
    'vc1': Settings(8.2),
    'voxforge': Settings(5.8),
    'cremad': Settings(2.5, heard=CREMAD),
    'gtzan': Settings(30.0, template='{} music can be heard'),
    'nsynth': Settings(4.0, template='the musical instrument sound of {} can be heard'),
    'surge': Settings(4.0),
    'fsd50k': Settings(7.6358, 'mAP'),
    'as20k': Settings(10.0, 'mAP'),
    'as': Settings(10.0, 'mAP'),
    'audiocaps': Settings(10.0, None),
    'clotho': Settings(30.0, None),
}

# Task -> the published data set that it is (tables.layouts).
PUBLISHED = {'esc50': 'esc50', 'us8k': 'urbansound8k', 'fsd50k': 'fsd50k', 'gtzan': 'gtzan', 'spcv2': 'speech_commands',
             'audiocaps': 'audiocaps', 'clotho': 'clotho'}


class Source(NamedTuple):
  """Where TensorFlow Datasets' catalogue has a task's data.

  builder: name in the catalogue; label: where an example has its class; splits: the catalogue's name -> ours, or '' where
  there are no official parts; rate: Hz.
  """
  builder: str
  label: tuple[str, ...] = ('label',)
  splits: dict[str, str] = {'train': 'train', 'validation': 'valid', 'test': 'test'}
  rate: int = 16000


NSYNTH = {name: name for name in ('train', 'valid', 'test')}
CATALOGUE = {
    'gtzan': Source('gtzan', splits={'train': ''}, rate=22050),
    'speech_commands': Source('speech_commands'),
    'nsynth': Source('nsynth/full', ('instrument', 'family'), NSYNTH),
    'nsynth_gansynth': Source('nsynth/gansynth_subset', ('instrument', 'family'), NSYNTH),
    'cremad': Source('crema_d'),
    'voxforge': Source('voxforge'),
    'vc1': Source('voxceleb'),
}

# Percent, of M2D-CLAP/0.7 (M2D-CLAP, tables 1 to 3).
PAPER = {
    'linear': {'esc50': 96.3, 'us8k': 88.8, 'spcv2': 95.8, 'vc1': 70.3, 'voxforge': 98.3, 'cremad': 73.4, 'gtzan': 84.1,
               'nsynth': 78.0, 'surge': 42.4},
    'finetune': {'as': 48.5, 'as20k': 41.8, 'esc50': 97.4, 'spcv2': 98.3, 'vc1': 95.5},
    'zeroshot': {'as': 27.24, 'fsd50k': 40.82, 'esc50': 75.45, 'us8k': 72.40, 'cremad': 17.73, 'gtzan': 75.17,
                 'nsynth': 23.39},
}
