"""Detects damaged recordings.

Decoders silently read what is left of a truncated file, or the first of two concatenated ones, so an interrupted download
would become a wrong training example. Each container reveals the damage differently.
"""
import io
import re

LOWEST_RATE, HIGHEST_RATE = 250, 2_000_000  # Hz: from loggers of whales to those of bats

# Recorders that write to a pipe put this or more in the length field: the length is unknown, nothing is missing.
_UNKNOWN_LENGTH = 0x7FF00000
# libsndfile's report of a header that states a size other than the real one.
_SIZES = re.compile(r'(\d+) \(?should be (\d+)', re.MULTILINE)
_FRAMES = re.compile(r'^\s*Frames\s*: (\d+)', re.MULTILINE)
_NIST_FRAMES = re.compile(rb'sample_count -i (\d+)')
_MAT5_BLOCK = re.compile(r'^\s*Type : 9\s+Size : (\d+)', re.MULTILINE)
_MP3_SLACK = 2 * 1152  # samples: encoder delay and padding make the length of an mp3 uncertain by about a frame
_SECONDS_SLACK = 0.25  # for FFmpeg: encoder delay, and rounded durations

# The first bytes of recordings, enough of them not to occur by chance.
_HEADS = [re.compile(head, re.DOTALL) for head in (
    rb'RIFF....WAVE', rb'RF64....WAVE', rb'FORM....AIF[FC]', rb'FORM....(?:8SVX|16SV)', rb'\.snd\x00\x00.{6}\x00\x00',
    rb'caff\x00\x01\x00\x00desc', rb'fLaC[\x00\x80]\x00\x00\x22', rb'riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb',
    rb'\x1aE\xdf\xa3.{1,8}\x42\x86', rb'\x30\x26\xb2\x75\x8e\x66\xcf\x11', rb'\x00..[\x00-\x40]ftyp[ -~]{4}')]
# Containers of frames alone, whose length FFmpeg estimates.
_WITHOUT_LENGTH = {'mp3', 'aac', 'ac3', 'eac3', 'dts', 'loas', 'amr', 'mpeg', 'mpegts'}
_CHUNK = 1 << 20


class Damaged(Exception):
  """A recording is damaged; the message is a predicate to follow the file's name."""


class Empty(Damaged):
  """A recording has no samples."""


def check_rate(rate: int):
  """Raises Damaged for an implausible sample rate."""
  if not LOWEST_RATE <= rate <= HIGHEST_RATE:
    raise Damaged(f'its header is damaged (sample rate {rate} Hz)')


def states_length(file, sound) -> bool:
  """Whether libsndfile knows, and does not estimate, how long an open `soundfile.SoundFile` is."""
  if sound.format in ('MP3', 'MPEG'):
    here = file.tell()
    stated = _mp3_layout(file)[1] is not None
    file.seek(here)  # libsndfile continues from there
    return stated
  return sound.frames < 1 << 40


def check_header(file, sound):
  """Raises Damaged if an open `soundfile.SoundFile` has fewer samples than its header states."""
  report = sound.extra_info
  size = _size(file)
  for stated, actual in (map(int, sizes) for sizes in _SIZES.findall(report)):
    if actual < stated < _UNKNOWN_LENGTH:
      raise Damaged(f'is cut off ({actual} of {stated} bytes of samples)')
  frames = [int(text) for text in _FRAMES.findall(report)]
  if sound.format == 'NIST':
    frames += [int(text) for text in _NIST_FRAMES.findall(_head(file, 1024))]
  for stated in frames:
    if sound.frames < stated < _UNKNOWN_LENGTH:
      raise Damaged(f'is cut off ({sound.frames} of {stated} samples)')
  if 'truncated' in report or any(int(text) > size for text in _MAT5_BLOCK.findall(report)):
    raise Damaged('is cut off (it contains less than its header states)')


def check_count(file, sound, count: int, ended: bool):
  """Raises Damaged if a decoder stopped early or another recording follows. count: samples per channel decoded; ended:
  whether the decoder reached the end."""
  if not count:
    raise Empty('contains no samples that can be decoded')
  if not ended:
    return
  slack = _MP3_SLACK if sound.format in ('MP3', 'MPEG') else 0
  if count + slack < sound.frames:
    raise Damaged(f'is cut off or corrupt ({count} of {sound.frames} samples can be decoded)')
  if slack:
    _check_mp3_alone(file)
  elif sound.format != 'OGG':  # chained Ogg streams are read one by one
    start = _head(file, 16)
    _check_alone(file, _known_head(start) or re.compile(re.escape(start), re.DOTALL))


def _check_mp3_alone(file):
  """Raises Damaged if more frames follow the stated bytes of frames of an mp3, where only tags and pictures may be."""
  start, size = _mp3_layout(file)
  if not size:
    return
  file.seek(start)
  first = file.read(2)
  file.seek(_skip_id3(file, start + size))
  if file.read(2) == first:
    raise Damaged(_joined(start + size))


def _mp3_layout(file) -> tuple[int, int | None]:
  """-> offset of the first frame, and the bytes of frames that its Xing or Info header states: 0 if it does not state
  them, None without such a header."""
  start = _skip_id3(file, 0)
  file.seek(start)
  frame = file.read(400)
  place = max(frame.find(b'Xing'), frame.find(b'Info'))
  if place < 0:
    return start, None
  flags = int.from_bytes(frame[place + 4:place + 8], 'big')
  offset = place + 8 + 4 * (flags & 1)
  return start, int.from_bytes(frame[offset:offset + 4], 'big') if flags & 2 else 0


def _skip_id3(file, start: int) -> int:
  """Offset of the end of a tag that begins at `start`; `start` itself without a tag."""
  file.seek(start)
  head = file.read(10)
  if head[:3] != b'ID3' or len(head) < 10:
    return start
  return start + 10 + sum((byte & 127) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0)))


def stated_seconds(container, stream) -> float | None:
  """The length of a stream that an open PyAV container states; None if it states none."""
  if _WITHOUT_LENGTH & set(container.format.name.split(',')):
    return None
  if stream.duration:
    return float(stream.duration * stream.time_base)
  return container.duration / 1e6 if container.duration and len(container.streams) == 1 else None


def check_decoded(file, seconds: float, stated: float | None):
  """Raises Damaged if FFmpeg decoded nothing, the first of several recordings, or less than is stated."""
  if not seconds:
    raise Empty('contains no samples that can be decoded')
  start = _head(file, 16)
  if head := _known_head(start):
    _check_alone(file, head)
  if start.startswith(b'caff'):
    _check_caf(file)
  if stated and seconds + _SECONDS_SLACK < stated:
    raise Damaged(f'is cut off or corrupt ({seconds:.2f} of {stated:.2f} s can be decoded)')


def _known_head(start: bytes) -> re.Pattern | None:
  return next((head for head in _HEADS if head.match(start)), None)


def _check_alone(file, head: re.Pattern):
  """Raises Damaged if a second header follows, as after `cat a.wav b.wav`."""
  start = _head(file, 8)
  literal = start[4:] if start[4:] == b'ftyp' else start[:4]  # looked for first: ten times as fast as the pattern
  file.seek(0)
  place, before = 0, b''
  while chunk := file.read(_CHUNK):
    window = before + chunk
    for match in head.finditer(window) if window.find(literal, 0 if before else 5) >= 0 else ():
      if at := place - len(before) + match.start():
        raise Damaged(_joined(at))
    place += len(chunk)
    before = window[-16:]


def _check_caf(file):
  """Raises Damaged if a chunk of a CAF file is longer than the file."""
  place, size = 8, _size(file)
  while place + 12 <= size:
    file.seek(place + 4)
    length = int.from_bytes(file.read(8), 'big', signed=True)
    if length < 0:  # unknown: the last chunk, written to a pipe
      return
    place += 12 + length
  if place > size:
    raise Damaged(f'is cut off ({size} of {place} bytes)')


def _joined(byte: int) -> str:
  return f'contains more than one recording (another begins at byte {byte}; split the file)'


def ogg_links(file) -> list[tuple[int, int]]:
  """Start and end of each stream of a chained Ogg file (as written by recorders and radio captures), or of the whole
  file otherwise. Leaves the file at its start.

  Raises:
    Damaged: the file ends in the middle of a page.
  """
  size, starts, place, in_head = _size(file), [0], 0, True
  file.seek(0)
  if file.read(4) != b'OggS':
    file.seek(0)
    return [(0, size)]
  while place < size:
    file.seek(place)
    page = file.read(27 + 255)
    if page[:4] != b'OggS':  # a hole, or trailing data: left to the decoder
      break
    count = page[26] if len(page) > 26 else 255
    if len(page) < 27 + count or place + 27 + count + sum(page[27:27 + count]) > size:
      raise Damaged('is cut off (its last page is incomplete)')
    first = bool(page[5] & 2)  # of a logical stream
    if first and not in_head:
      starts.append(place)
    in_head = first
    place += 27 + count + sum(page[27:27 + count])
  file.seek(0)
  return list(zip(starts, [*starts[1:], size]))


def _size(file) -> int:
  here = file.tell()
  size = file.seek(0, io.SEEK_END)
  file.seek(here)
  return size


def _head(file, count: int) -> bytes:
  here = file.tell()
  file.seek(0)
  head = file.read(count)
  file.seek(here)
  return head
