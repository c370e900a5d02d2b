"""A zip from the network, continued where it was cut off, and its unpacking, which trusts nothing in it."""
import os
import pathlib
import re
import shutil
import stat
import time
import zipfile
import zlib
from collections.abc import Callable

from m2d_clap_jax.errors import UserError
from m2d_clap_jax.progress import quiet

MOST_BYTES = 8 << 30  # unpacked; the largest released model has 1.4 GB
# Weights hardly compress: what unpacks to more than this many times its size, above some room for small files, is a bomb.
MOST_RATIO, ROOM = 50, 256 << 20
PAUSE = 1.0  # seconds until a connection that broke off is tried again
TIMEOUT = 10, 60  # seconds: to connect; between two blocks
BLOCK = 1 << 16  # bytes; of the last one before a connection breaks off nothing is had


def download(url: str, file: pathlib.Path, home: pathlib.Path):
  """Fetches url -> file, which appears when it is complete. Until then FILE.part holds what has come; it is continued.

  Raises:
    UserError: the server does not give it, now or ever.
    OSError: it cannot be written.
  """
  import pooch
  with quiet(pooch.get_logger()):  # it would tell the hash
    pooch.retrieve(url, None, fname=file.name, path=file.parent, downloader=_Continuing(file, home))


class _Continuing:
  """Downloader for pooch, whose own begin anew each time."""

  def __init__(self, file: pathlib.Path, home: pathlib.Path):
    self._name, self._home = file.stem, home
    self._part = file.with_name(file.name + '.part')

  def __call__(self, url: str, output_file, _pooch, check_only: bool = False):
    from requests import RequestException
    while True:
      before = self._have()
      try:
        self._receive(url)
        break
      except RequestException as error:
        if self._have() <= before:
          raise UserError(self._advice(url, _reason(error))) from None
        time.sleep(PAUSE)
    os.replace(self._part, output_file)

  def _have(self) -> int:
    return self._part.stat().st_size if self._part.exists() else 0

  def _receive(self, url: str):
    """Appends to the part what it lacks; RequestException where that does not all come."""
    import requests
    from tqdm import tqdm
    have = self._have()
    # Compressed on its way, bytes could not be counted.
    headers = {'Accept-Encoding': 'identity'} | ({'Range': f'bytes={have}-'} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
      if response.status_code == 416:  # nothing lies behind the part
        if response.headers.get('Content-Range') == f'bytes */{have}':
          return
        self._part.unlink()  # of a file that has become another
        raise requests.ConnectionError('the file has changed; the same command begins anew')
      response.raise_for_status()
      if 'text/html' in response.headers.get('Content-Type', ''):
        raise UserError(self._advice(url, 'the answer is a web page, as of a proxy or a login'))
      if not re.match(rf'bytes {have}-', response.headers.get('Content-Range', '')):
        have = 0  # a server that sends whole files only
      length = response.headers.get('Content-Length')
      total = have + int(length) if length else None
      with open(self._part, 'ab' if have else 'wb') as out, tqdm(
          total=total, initial=have, desc=self._name, unit='B', unit_scale=True, disable=None) as bar:
        for block in response.iter_content(BLOCK):
          out.write(block)
          bar.update(len(block))
    if total is not None and self._have() < total:
      raise requests.ConnectionError(f'cut off after {self._have()} of {total} bytes')

  def _advice(self, url: str, reason: str) -> str:
    kept = f' (the {self._have()} bytes that have come are kept; the same command continues)' if self._have() else ''
    return (f'{self._name}: cannot be fetched: {reason}{kept}; to do it by hand, put {url} or the folder in it into '
            f'{self._home}')


def _reason(error) -> str:
  if error.response is not None:
    return f'HTTP {error.response.status_code} {error.response.reason}'
  cause = getattr(error.args[0], 'reason', error) if error.args else error  # urllib3's, without its repetitions
  return ' '.join(str(cause).split())[:200] or type(error).__name__


def unpack(archive: pathlib.Path, folder: pathlib.Path, accepts: Callable[[str], bool]):
  """Unpacks the folder of a zip in which a checkpoint is -> folder, which appears when it is complete.

  Args:
    accepts: whether a folder of that name in the zip may hold the model.

  Raises:
    UserError: damaged, no zip, without a checkpoint, of another model, too large, or with members that lead elsewhere.
    OSError: it cannot be written.
  """
  temporary = folder.with_name(f'.{folder.name}.unpacking')
  shutil.rmtree(temporary, ignore_errors=True)  # of a killed run
  try:
    with zipfile.ZipFile(archive) as content:
      members = _members(content, archive, accepts)
      temporary.mkdir()
      for name, member in members.items():
        with content.open(member) as source, open(temporary / name, 'wb') as out:
          shutil.copyfileobj(source, out, BLOCK)  # no more than the member's size, which has been counted
          out.flush()
          os.fsync(out.fileno())
    os.replace(temporary, folder)
  except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError, zlib.error) as error:
    raise UserError(f'{archive}: no readable zip ({" ".join(str(error).split())[:160]}), as of a web page or a cut-off '
                    'copy: fetch it again') from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _members(content: zipfile.ZipFile, archive: pathlib.Path, accepts: Callable[[str], bool]) -> dict[str, zipfile.ZipInfo]:
  """{file name: member} of the folder that holds the checkpoint."""
  size, most = 0, min(MOST_BYTES, ROOM + MOST_RATIO * archive.stat().st_size)
  files = {}
  for member in content.infolist():
    parts = pathlib.PurePosixPath(member.filename.replace('\\', '/')).parts
    kind = stat.S_IFMT(member.external_attr >> 16)
    if '..' in parts or parts[:1] == ('/',) or ':' in member.filename or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
      raise UserError(f'{archive}: not unpacked: its member {member.filename!r} is a link or leads out of the folder')
    if member.header_offset < 0:
      raise zipfile.BadZipFile('a member begins before the file')
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
      raise UserError(f'{archive}: not unpacked: its member {member.filename!r} is packed in an unusual way')
    size += member.file_size
    if not member.is_dir():
      files[parts] = member
  if size > most:
    raise UserError(f'{archive}: not unpacked: would take {size / 1e9:.1f} GB, more than the {most / 1e9:.1f} GB of a model '
                    'in a zip of this size')
  inside = next((parts[:-1] for parts in sorted(files) if parts[-1].endswith('.pth')), None)
  if inside is None:
    raise UserError(f'{archive}: holds no checkpoint (.pth) but {", ".join("/".join(parts) for parts in sorted(files)[:3])}'
                    ': not the zip of a model')
  if inside and not accepts(inside[-1]):
    raise UserError(f'{archive}: holds the model {inside[-1]} instead: give the zip its name, or fetch the right one')
  return {parts[-1]: member for parts, member in files.items() if parts[:-1] == inside}

