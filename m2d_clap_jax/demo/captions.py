"""The words of the demo corpus: several natural captions for a clip whose every property is known.

Each caption names only one or two properties. That keeps them natural, and keeps the number of different sentences
at a few thousand, so that embedding them stays a small part of the demo's time.
"""

import dataclasses

import numpy as np

# Each group gives one caption a clip. {a} is the instrument with its article, {family} its family; {plays}, {its}
# and the like agree with it.
PLAIN = (
  'the sound of {a}', '{a} {is} playing', 'someone plays the {instrument}', '{a} can be heard',
  'a recording of {a}', 'the {instrument} {plays}',
)
MANNER = (
  '{a} played {loudness} in the {register} register',
  'the {instrument}, {loudness} played, in {its} {register} register',
  'the {instrument} {plays} {loudness}, {register} in {its} range',
  '{register} {notes} on the {instrument}, played {loudness}',
)
PATTERN = (
  '{pattern} on the {instrument}', '{a} {plays} {pattern}', '{pattern} played by {a}',
  '{pattern} can be heard from {a}',
)
FAMILY = (
  '{a}, one of the {family} instruments', '{article} {family} instrument is playing: {a}',
  '{family} instruments can be heard', '{article} {family} instrument plays {pattern}',
  '{article} {family} instrument played {loudness} in the {register} register',
  'the sound of {article} {family} instrument',
)
GROUPS = (PLAIN, MANNER, PATTERN, FAMILY)


@dataclasses.dataclass(frozen=True)
class Sound:
  """What is known of a clip. `pattern` is a phrase ('a rising run of notes'), `loudness` an adverb ('softly')."""
  instrument: str
  family: str
  register: str
  loudness: str
  pattern: str
  single: bool


def captions(sound: Sound, rng: np.random.Generator) -> list[str]:
  """One caption from each group of templates -> 4 different sentences."""
  plural = is_plural(sound.instrument)
  words = dataclasses.asdict(sound) | {
    'a': sound.instrument if plural else f'{article(sound.instrument)} {sound.instrument}',
    'plays': 'play' if plural else 'plays', 'is': 'are' if plural else 'is', 'its': 'their' if plural else 'its',
    'article': article(sound.family), 'notes': 'note' if sound.single else 'notes',
  }
  return [group[rng.integers(len(group))].format(**words) for group in GROUPS]


def is_plural(name: str) -> bool:
  """'tubular bells', but not 'double bass'."""
  return name.endswith('s') and not name.endswith('ss')


def article(name: str) -> str:
  """'an' for an oboe, 'a' for a flute."""
  return 'an' if name[0] in 'aeiou' else 'a'
