"""User paths: local ones, and gs:// and other stores through fsspec, all as `etils.epath.Path`.

Stores differ from disks in ways that matter here. There are no folders. A file appears complete, under its name, when
writing ends, so a temporary name would be useless, and renaming copies. Libraries that need a real file get a local
copy, or write one that is then uploaded.
"""
import contextlib
import fnmatch
import importlib.util
import io
import os
import posixpath
import re
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from m2d_clap_jax.errors import EXTRAS, UserError, install

# epath's schemes -> the package that serves each.
SCHEMES = {'gs': 'gcsfs', 's3': 's3fs', 'az': 'adlfs', 'hf': 'huggingface_hub'}
# All go through fsspec. By default epath would use TensorFlow where it is installed: a different client, with different
# settings and errors, and without s3.
os.environ.setdefault('EPATH_USE_TF', '0')
_THREADS = 16  # to overlap the latency of network disks


class StoreError(UserError):
  """A store failed; the file itself is not to blame."""


def as_path(place) -> epath.Path:
  """A user's path, with ~ expanded; UserError for an unknown scheme or one whose package is missing."""
  scheme = scheme_of(place)
  if scheme:
    if scheme not in SCHEMES:
      raise UserError(f'{place}: {scheme}:// is not a known kind of store; known: '
                      + ', '.join(f'{name}://' for name in SCHEMES) + ', and local paths')
    package = SCHEMES[scheme]
    if importlib.util.find_spec(package) is None:
      raise UserError(f'{place}: {scheme}:// needs the package {package}: '
                      + (install(package) if package in EXTRAS else f'pip install {package}'))
    _no_listings_kept(scheme)
    return epath.Path(place)
  return epath.Path(place).expanduser()


def scheme_of(place) -> str:
  """'gs' of gs://bucket/x; '' of a local path."""
  match = re.match(r'([A-Za-z][\w+.-]*)://', os.fspath(place))
  return match[1] if match else ''


def is_remote(place) -> bool:
  """Whether a path is in a store, such as gs://..."""
  return bool(scheme_of(place))


def filesystem(place):
  """fsspec's file system of a remote path. Its own path strings have no scheme."""
  as_path(place)
  return epath.backend.fsspec_backend.fs(os.fspath(place))  # the instance that epath uses, with its connections


def _no_listings_kept(scheme: str):
  """Clears fsspec's listing cache, which would hide what TensorStore or another host has written since."""
  import fsspec
  for name in {scheme, {'gs': 'gcs'}.get(scheme, scheme)}:
    fsspec.config.conf.setdefault(name, {}).setdefault('use_listings_cache', False)


def make_folder(path: epath.Path):
  """Makes a folder and its parents. Does nothing in stores, which need none and might create a misspelt bucket."""
  if not is_remote(path):
    path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def replacing(path, alone: bool = False) -> Iterator[str]:
  """Yields the name of a local file to write, which atomically becomes `path` when the block succeeds.

  Locally it is next to `path` and is synced to disk before it is renamed. A missing folder is created.

  Args:
    alone: no other process writes this file at the same time, so the next run overwrites what a killed one left.
  """
  path = as_path(path)
  if is_remote(path):
    with tempfile.TemporaryDirectory(prefix='m2d_clap_upload_') as folder:
      name = os.path.join(folder, path.name)
      yield name
      with _refusals():
        filesystem(path).put_file(name, os.fspath(path))
    return
  make_folder(path.parent)
  owner = '' if alone else f'.{socket.gethostname()}-{os.getpid()}'
  temporary = os.path.join(path.parent, f'.{path.name}{owner}.tmp')
  try:
    yield temporary
    _to_disk(temporary, os.O_RDWR)
    os.replace(temporary, path)
    _to_disk(path.parent, os.O_RDONLY)
  finally:
    with contextlib.suppress(OSError):  # already renamed, or never created
      os.unlink(temporary)


@contextlib.contextmanager
def _refusals():
  """Turns a store client's own exceptions on writing into OSError, as from a disk."""
  try:
    yield
  except OSError:
    raise
  except Exception as error:
    raise OSError(' '.join(str(error).split())[:200] or type(error).__name__) from error


def _to_disk(name, flags: int):
  descriptor = os.open(name, flags)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def write_bytes(path, data: bytes, alone: bool = False):
  """Writes a file atomically; `alone` as in `replacing`."""
  path = as_path(path)
  if is_remote(path):
    with _refusals():
      filesystem(path).pipe_file(os.fspath(path), data)
    return
  with replacing(path, alone) as temporary, open(temporary, 'wb') as file:
    file.write(data)


def write_text(path, text: str, alone: bool = False):
  """Writes UTF-8 text atomically, keeping line ends."""
  write_bytes(path, text.encode(), alone)


@contextlib.contextmanager
def local_copy(path) -> Iterator[str]:
  """Yields the name of a local file with the contents of `path`: itself, or a copy that exists during the block."""
  path = as_path(path)
  if not is_remote(path):
    yield os.fspath(path)
    return
  with tempfile.TemporaryDirectory(prefix='m2d_clap_download_') as folder:
    name = os.path.join(folder, path.name)
    filesystem(path).get_file(os.fspath(path), name)
    yield name


def read_bytes(path) -> bytes:
  """Reads a whole file, from a store in one request.

  Raises:
    OSError: a local file cannot be read; FileNotFoundError if there is none, locally or in a store.
    StoreError: the store fails for any other reason.
  """
  path = as_path(path)
  if not is_remote(path):
    return path.read_bytes()
  try:
    return filesystem(path).cat_file(os.fspath(path))
  except FileNotFoundError:
    raise
  except Exception as error:  # each client has its own exceptions, besides those of HTTP and of authentication
    raise StoreError(f'{path}: cannot be read from the store '
                     f'({" ".join(str(error).split())[:200] or type(error).__name__})'
                     ': check the network and your permissions, and repeat the command') from error


@contextlib.contextmanager
def open_text(path) -> Iterator[io.TextIOWrapper]:
  """Opens a file of UTF-8 text, with or without a byte order mark, for reading, keeping line ends."""
  with io.BytesIO(read_bytes(path)) as file, io.TextIOWrapper(file, encoding='utf-8-sig', newline='') as text:
    yield text


def fetch_folder(path, into: str, patterns: Sequence[str]):
  """Copies the files of a remote folder that match one of the patterns into the local folder `into`."""
  store = filesystem(path)
  for name in store.ls(os.fspath(path), detail=False):
    base = posixpath.basename(name)
    if any(fnmatch.fnmatch(base, pattern) for pattern in patterns):
      store.get_file(name, os.path.join(into, base))


def move(source: epath.Path, target: epath.Path):
  """Renames a file or folder. In a store, its files are copied, then deleted in the order of their names."""
  if not is_remote(source):
    source.rename(target)
    return
  store = filesystem(source)
  names = sorted(store.find(os.fspath(source)))
  start = len(store._strip_protocol(os.fspath(source)))  # pylint: disable=protected-access
  for name in names:
    store.cp_file(name, os.fspath(target) + name[start:])
  for name in names:
    store.rm_file(name)


def remove_folder(path):
  """Deletes a folder as far as possible; other processes may be doing the same."""
  if not is_remote(path):
    shutil.rmtree(path, ignore_errors=True)
    return
  with contextlib.suppress(OSError):
    filesystem(path).rm(os.fspath(path), recursive=True)


def size(path) -> int:
  """Size of a file in bytes; OSError if there is none."""
  return filesystem(path).info(os.fspath(path))['size'] if is_remote(path) else os.path.getsize(path)


def stamps(root, names: Iterable[str]) -> dict[str, tuple[int, str]]:
  """{name: (bytes, a value that changes with the file)} of files under `root`; missing ones are left out.

  In a store this takes one listing of everything under `root`, instead of one request per file.
  """
  if is_remote(root):
    listing = _listing(root)
    found = {name: listing.get(posixpath.normpath(name)) for name in names}
    return {name: (info['size'], str(next((info[key] for key in ('etag', 'ETag', 'mtime') if info.get(key)), '')))
            for name, info in found.items() if info}

  def stamp(name):
    try:
      about = os.stat(os.path.join(root, name))
      return about.st_size, str(about.st_mtime_ns)
    except OSError:
      return None
  names, root = list(names), os.path.expanduser(root)
  with ThreadPoolExecutor(_THREADS) as pool:
    return {name: about for name, about in zip(names, pool.map(stamp, names)) if about}


def files_under(folder) -> list[str]:
  """Names, relative to a folder, of all files in it and its sub-folders, links to folders followed, sorted.

  Raises:
    UserError: a folder cannot be read.
  """
  if is_remote(folder):
    return sorted(_listing(folder))

  def refuse(error):
    if not isinstance(error, FileNotFoundError):  # a missing folder has no files
      raise UserError(f'{error.filename}: cannot be read ({error.strerror}), so its files would be left out: '
                      'check its permissions')
  found, seen, folder = [], set(), os.path.expanduser(folder)
  for here, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
    real = os.path.realpath(here)
    if real in seen:  # a link to a folder above
      folders.clear()
      continue
    seen.add(real)
    inside = os.path.relpath(here, folder)
    found += files if inside == '.' else [os.path.join(inside, name) for name in files]
  return sorted(found)


def names_in(folder) -> list[str]:
  """Names of the entries of a folder, sorted; OSError if there is none."""
  if not is_remote(folder):
    return sorted(os.listdir(folder))
  try:
    return sorted(path.name for path in as_path(folder).iterdir())
  except FileNotFoundError:  # in a store, a folder exists from its first file on
    return []


def glob(pattern) -> list[str]:
  """Files that match a pattern, sorted; ** includes sub-folders."""
  if not is_remote(pattern):
    import glob as standard
    return sorted(standard.glob(os.path.expanduser(pattern), recursive=True))
  return sorted(f'{scheme_of(pattern)}://{name}' for name in filesystem(pattern).glob(os.fspath(pattern)))


def read_ranges(ranges: Sequence[tuple[str, int, int]]) -> list[bytes | Exception]:
  """[(file of one store, first byte, end)] -> their bytes, requested concurrently; an exception for each failure."""
  files, starts, ends = zip(*ranges)
  return filesystem(files[0]).cat_ranges(list(files), list(starts), list(ends), on_error='return')


def _listing(folder) -> dict[str, dict]:
  """{name relative to a remote folder: fsspec's metadata} of all files in it and its sub-folders."""
  store = filesystem(folder)
  start = len(store._strip_protocol(os.fspath(folder)).rstrip('/')) + 1  # pylint: disable=protected-access
  found = store.find(os.fspath(folder), detail=True)
  return {name[start:]: info for name, info in found.items() if len(name) > start}
