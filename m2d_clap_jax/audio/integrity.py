"""Tell a damaged recording from a whole one.

libsndfile reads what is left of a file that was cut off and says nothing; a download that broke would then become a
training example of the wrong sound. Each container gives it away differently.
"""

import io
import re

# What recorders that write to a pipe put where the length would stand: the length is unknown, nothing is missing.
_UNKNOWN_LENGTH = 0x7FF00000
# libsndfile's own report on a wav or aiff file whose header promises more bytes than there are.
_SHORT_DATA = re.compile(r'^\s*(?:data|SSND)\s*:\s*(\d+) \(should be (\d+)\)', re.MULTILINE)
_MP3_SLACK = 2 * 1152  # samples: encoder delay and padding make the length of an mp3 uncertain by about a frame
_MP3_READ = 0.9  # part of an mp3 file that must have been read at its supposed end; tags may follow
_OGG_PAGE = 27 + 255 + 255 * 255  # bytes of the longest page of an Ogg file


class Damaged(Exception):
  """What is wrong with the recording, as the end of a sentence that begins with its name."""


def cut_off(file):
  """The reason if an open Ogg file ends in the middle of a page, else None; leaves the file at its start."""
  head = file.read(4)
  size = file.seek(0, io.SEEK_END)
  reason = None
  if head == b'OggS':
    file.seek(max(0, size - _OGG_PAGE))
    tail = file.read()
    page = tail[tail.rfind(b'OggS'):]
    lengths = page[27:27 + page[26]] if len(page) > 26 else b''
    if len(page) < 27 or len(lengths) < page[26] or len(page) < 27 + page[26] + sum(lengths):
      reason = 'is cut off (its last page is incomplete)'
  file.seek(0)
  return reason


def check_header(sound):
  """Raises Damaged if an open `soundfile.SoundFile` has no samples, or fewer bytes of them than its header promises."""
  if not sound.frames:
    raise Damaged('holds no samples')
  found = _SHORT_DATA.search(sound.extra_info)
  if found:
    promised, there = map(int, found.groups())
    if there < promised < _UNKNOWN_LENGTH:
      raise Damaged(f'is cut off ({there} of {promised} bytes of samples)')


def check_count(file, sound, count, ended):
  """Raises Damaged if a decoder stopped early: `count` samples per channel came, and `ended` if then no more."""
  if not count:
    raise Damaged('holds no samples that can be decoded')
  if not ended:
    return
  slack = 0
  if sound.format in ('MP3', 'MPEG'):
    here, size = file.tell(), file.seek(0, io.SEEK_END)
    if not _mp3_states_length(file):  # libsndfile estimates the length from the first frame, and stops there
      if here < _MP3_READ * size:
        raise Damaged('is an mp3 of varying bit rate that does not state its length; convert it to wav or flac')
      return
    slack = _MP3_SLACK
  if count + slack < sound.frames < 1 << 40:  # a decoder that does not know the length reports an enormous one
    raise Damaged(f'is cut off or corrupt ({count} of {sound.frames} samples can be decoded)')


def _mp3_states_length(file):
  """Whether an mp3 opens with a Xing or Info frame, which counts the frames."""
  file.seek(0)
  head = file.read(10)
  start = 0
  if head[:3] == b'ID3':  # the tag's length: four bytes of seven bits
    start = 10 + sum((byte & 127) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0)))
  file.seek(start)
  frame = file.read(400)
  return b'Xing' in frame or b'Info' in frame
