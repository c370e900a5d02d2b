"""Reads the sounds in files: with libsndfile where possible, otherwise with FFmpeg (through PyAV).

Alphabet: S samples of a channel, C channels.
"""
import io
from collections.abc import Iterator

import av
import numpy as np
import soundfile

from m2d_clap_jax.audio import integrity
from m2d_clap_jax.audio.integrity import Damaged

_BLOCK = 1 << 18  # samples of a channel decoded at a time, so that an hour of surround sound is never in memory at once
# Formats allowed to FFmpeg. Playlists are excluded: they name other files and addresses, which it would open.
_FFMPEG_FORMATS = ('aac,ac3,aiff,amr,ape,asf,au,avi,caf,dsf,dts,eac3,flac,flv,iff,loas,matroska,mov,mp3,mpc,mpc8,mpeg,mpegts,'
                   'ogg,tak,tta,voc,w64,wav,wv')


def open_sounds(file) -> Iterator['LibsndfileSound | FFmpegSound']:
  """Yields the consecutive sounds of an open, seekable file: one, except for chained Ogg streams.

  Raises:
    Damaged: no reader can read the file.
  """
  links = integrity.ogg_links(file)
  for start, stop in links:
    part = file if len(links) == 1 else _Part(file, start, stop)
    yield _open(part)


def _open(file):
  try:
    return LibsndfileSound(file)
  except _Unsure as reason:
    file.seek(0)
    try:
      return FFmpegSound(file)
    except av.FFmpegError:
      raise Damaged(str(reason)) from None


class _Unsure(Exception):
  """libsndfile cannot read a file, or not all of it, but FFmpeg may; the message is the reason."""


class _ForwardSoundFile(soundfile.SoundFile):
  """Read from start to end. A `SoundFile` that is seekable seeks after each block, upon which an mp3 loses the bits that its
  frames keep in earlier ones: some hundred samples are wrong, by up to 0.3."""

  def seekable(self) -> bool:
    return False


class LibsndfileSound:
  """rate in Hz; `blocks(wanted)` yields float32 [S, C] until `wanted` samples or the end, and raises Damaged."""

  def __init__(self, file):
    self._file = file
    try:
      self._sound = _ForwardSoundFile(file)
    except soundfile.LibsndfileError as error:
      raise _Unsure(f'is not readable as audio ({_reason(error)})') from None
    if not self._sound.frames:  # or only its header says so, as after recording to a pipe
      raise _Unsure('contains no samples')
    if not integrity.states_length(file, self._sound):  # libsndfile would stop at an estimated end
      raise _Unsure('does not state its length')
    self.rate = self._sound.samplerate
    integrity.check_rate(self.rate)
    integrity.check_header(file, self._sound)

  def blocks(self, wanted: float) -> Iterator[np.ndarray]:
    count, ended = 0, False
    with self._sound as sound:
      while count < wanted and not ended:
        asked = int(min(_BLOCK, wanted - count))
        try:
          block = sound.read(min(asked, sound.frames - count), dtype='float32', always_2d=True)  # FLAC would read past its end
        except soundfile.LibsndfileError as error:
          raise Damaged(f'is cut off or corrupt after {count / self.rate:.2f} s ({_reason(error)})') from None
        ended = len(block) < asked  # the end, or a hole: reading past a hole would join unrelated samples
        if len(block):
          count += len(block)
          yield block
      integrity.check_count(self._file, sound, count, ended)


def _reason(error: soundfile.LibsndfileError) -> str:
  text = error.error_string.strip().rstrip('.')
  return 'its header is damaged' if 'internal' in text.lower() else text.removeprefix('Error : ')


class FFmpegSound:
  """Like `LibsndfileSound`, for the first audio stream of any FFmpeg format: m4a, webm, wma, amr and others."""

  def __init__(self, file):
    self._file = file
    self._container = av.open(file, metadata_errors='ignore', options={'format_whitelist': _FFMPEG_FORMATS})
    if not self._container.streams.audio:
      raise Damaged('has no audio track')
    self._stream = self._container.streams.audio[0]
    if not self._stream.codec_context or not self._stream.rate:
      raise Damaged('has an audio track of an unknown kind')
    self.rate = self._stream.rate
    integrity.check_rate(self.rate)
    if self._stream.codec_context.name == 'alac':  # whose last frame knows its length: FFmpeg would cut it a second time
      self._stream.codec_context.flags2 |= av.codec.context.Flags2.skip_manual

  def blocks(self, wanted: float) -> Iterator[np.ndarray]:
    count = 0
    first: int | None = None
    end: int | None = None
    last: np.ndarray = np.zeros((0, 1), np.float32)  # yielded when the next is there, or cut where the file says it ends
    resampler = av.AudioResampler(format='fltp')  # to float32, one row per channel; rate and channels unchanged
    with self._container as container:
      stated = integrity.stated_seconds(container, self._stream)
      try:
        for packet in container.demux(self._stream):
          if packet.pts is not None and packet.duration:
            end = packet.pts + packet.duration
          for frame in packet.decode():
            if frame.sample_rate != self.rate:
              raise Damaged(f'changes its sample rate from {self.rate} to {frame.sample_rate} Hz')
            first = frame.pts if first is None else first
            for part in resampler.resample(frame):
              if len(last):
                yield last
              last = np.asarray(part.to_ndarray(), np.float32).T
              count += len(last)
          if count >= wanted:
            yield last
            return
      except av.FFmpegError as error:
        raise Damaged(f'is cut off or corrupt after {count / self.rate:.2f} s ({error.strerror})') from None
      integrity.check_decoded(self._file, count / self.rate, stated)
      yield last[:len(last) - self._padding(count, len(last), first, end)]

  def _padding(self, count: int, size: int, first: int | None, end: int | None) -> int:
    """Samples by which an encoder filled its last frame, of `size` samples, where times are in samples, as in m4a; else 0."""
    tick = self._stream.time_base
    if first is None or end is None or tick is None or tick * self.rate != 1:
      return 0
    padding = count - (end - first)
    return padding if 0 < padding < size else 0


class _Part(io.RawIOBase):
  """The bytes from `start` to `stop` of an open file, as a file."""

  def __init__(self, file, start: int, stop: int):
    self._file, self._start, self._size, self._place = file, start, stop - start, 0

  def readable(self):
    return True

  def seekable(self):
    return True

  def tell(self):
    return self._place

  def seek(self, offset, whence=io.SEEK_SET):
    self._place = max(0, offset + (0, self._place, self._size)[whence])
    return self._place

  def readinto(self, buffer):
    self._file.seek(self._start + self._place)
    data = self._file.read(max(0, min(len(buffer), self._size - self._place)))
    buffer[:len(data)] = data
    self._place += len(data)
    return len(data)
