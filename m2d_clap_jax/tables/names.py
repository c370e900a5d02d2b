"""File names in tables and on disks: which file a name means."""
import os
import posixpath
import re
import unicodedata
from collections.abc import Sequence

from m2d_clap_jax.audio.names import ENDINGS, printable
from m2d_clap_jax.paths import as_path, files_under, is_remote, names_in

_WINDING = re.compile(r'(?:^|/)\.{0,2}(?:/|$)')  # a part that is empty, '.' or '..'


def relative_to(name: str, root: str) -> str | None:
  """File name -> normalised path relative to `root`, or None if it leads out of it (links are not followed)."""
  name = name.replace('\\', '/') if os.sep == '\\' else name
  if not _WINDING.search(name):  # nearly all: the rest takes ten times as long
    return name
  if is_remote(root):  # a file's name begins with the root's, or is relative to it
    name = name.removeprefix(root.rstrip('/') + '/')
    root = '.'
  root = posixpath.normpath(root)
  full = posixpath.normpath(posixpath.join(root, name))
  relative = posixpath.relpath(full, root)
  return None if relative == '..' or relative.startswith('../') or relative == '.' else relative


class Files:
  """The files under a root, whose folders are listed when they are first needed.

  Attributes:
    respelled: {name in the table: name on the disk} where they differ in Unicode normalisation alone.
  """

  def __init__(self, root):
    self.root = os.fspath(as_path(root))
    self.respelled: dict[str, str] = {}
    self._folders: dict[str, dict[str, list[str]]] = {}
    self._stems: dict[str, list[str]] | None = None

  def spelled(self, name: str) -> str:
    """A relative name as the disk spells it; as it is where the disk has no such file, or needs no look.

    'é' is one character or two (NFC and NFD), which look alike to people and differ on disk. A file of exactly this name
    is always preferred, so that two files stay two.
    """
    return name if name.isascii() else self.find(name) or name

  def find(self, name: str) -> str | None:
    """The same, or None where the disk has no such file."""
    found = ''
    for part in name.split('/'):
      alike = self._listing(found).get(unicodedata.normalize('NFC', part), [])
      if part not in alike:
        if len(alike) != 1:
          return None
        part = alike[0]
      found = posixpath.join(found, part)
    if found != name:
      self.respelled[name] = found
    return found

  def exact(self, name: str) -> bool:
    """Whether the disk has this very name."""
    folder, base = posixpath.split(name)
    return base in self._listing(folder).get(unicodedata.normalize('NFC', base), [])

  def of_stem(self, stem: str, own: Sequence[str] = (), foreign: Sequence[str] = ()) -> list[str]:
    """Recordings anywhere under the root whose name without its ending is `stem`.

    Args:
      own: names of folders; if any file lies in such a one, only those count.
      foreign: names of folders whose files do not count.
    """
    if self._stems is None:
      self._stems = {}
      for name in files_under(self.root):
        base, ending = posixpath.splitext(posixpath.basename(name))
        if ending.lower() in ENDINGS and not base.startswith('.'):
          self._stems.setdefault(unicodedata.normalize('NFC', base), []).append(name)
    found = [name for name in self._stems.get(unicodedata.normalize('NFC', stem), []) if not _within(name, foreign)]
    return [name for name in found if _within(name, own)] or found

  def _listing(self, folder: str) -> dict[str, list[str]]:
    if folder not in self._folders:
      listing: dict[str, list[str]] = {}
      try:
        for name in names_in(os.path.join(self.root, folder)):
          listing.setdefault(unicodedata.normalize('NFC', name), []).append(name)
      except (OSError, ValueError):  # no such folder, or no possible name of one
        pass
      self._folders[folder] = listing
    return self._folders[folder]


def as_text(name: str) -> tuple[str, str]:
  """A file's name, which is bytes, as text -> (the name, and ''), or (one with its bytes spelled out, why it cannot be used)."""
  text = printable(name)
  return text, '' if text == name else 'its name is not valid UTF-8'


def account_of(folder, everything: Sequence[str], used: Sequence[str], what: str) -> str:
  """Files of a folder that are used and that are not, in words; both add up to what is there."""
  others = sorted(printable(name) for name in set(everything) - set(used))
  some = f', {len(others):,} others ({", ".join(others[:3])}{", ..." if len(others) > 3 else ""})' if others else ''
  return f'{folder}: {len(everything):,} files: {len(used):,} {what}{some}'


def _within(name: str, folders: Sequence[str]) -> bool:
  """Whether a file is in a folder of such a name, or of one that only adds to it ('train_wav', 'FreeSound_flac')."""
  return any(re.match(rf'{re.escape(folder)}(?![A-Za-z0-9])', part, re.IGNORECASE)
             for part in name.split('/')[:-1] for folder in folders)
