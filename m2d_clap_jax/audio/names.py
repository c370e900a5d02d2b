"""Names of audio files: which endings they have, and how they read. Imports no decoder."""
import os

# Files to use from a folder; a file that is named explicitly may have any ending.
ENDINGS = ('.wav', '.flac', '.ogg', '.oga', '.opus', '.mp3', '.aif', '.aiff', '.aifc', '.au', '.caf', '.w64', '.rf64',
           '.m4a', '.m4b', '.mp4', '.mov', '.3gp', '.aac', '.webm', '.mka', '.mkv', '.wma', '.mp2', '.amr', '.ac3', '.ape',
           '.wv', '.tta')
# Audio-related files that cannot be decoded; they are counted, so that none is skipped silently.
NOT_DECODED = ('.mid', '.midi', '.ra', '.rm', '.dss', '.ds2', '.vox', '.m4p', '.aax', '.aup3', '.mod', '.xm', '.sf2', '.spx')


def printable(name: str) -> str:
  r"""A file's name as valid Unicode. Bytes that are no UTF-8 are spelled out, as in 'caf\xe9.wav', so that two names stay two."""
  return os.fsencode(name).decode('utf-8', 'backslashreplace')
