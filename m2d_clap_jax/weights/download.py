"""Downloads a zip, resuming interrupted downloads, and unpacks it without trusting its contents."""
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
# Weights hardly compress: a zip that unpacks to more than this many times its size, plus an allowance for small files, is
# a zip bomb.
MOST_RATIO, ROOM = 50, 256 << 20
PAUSE = 1.0  # seconds before a dropped connection is retried
TIMEOUT = 10, 60  # seconds: to connect; between two blocks
BLOCK = 1 << 16  # bytes; an incomplete last block is lost when a connection drops


def download(url: str, file: pathlib.Path, home: pathlib.Path):
  """Downloads url -> file, which appears when it is complete. Until then FILE.part holds the data, and is resumed.

  Raises:
    UserError: the server does not deliver it.
    OSError: it cannot be written.
  """
  import pooch
  with quiet(pooch.get_logger()):  # it would print the hash
    pooch.retrieve(url, None, fname=file.name, path=file.parent, downloader=_Continuing(file, home))


class _Continuing:
  """Downloader for pooch that resumes; pooch's own downloaders start over each time."""

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
    """Appends the missing bytes to the part; RequestException if the download is incomplete."""
    import requests
    from tqdm import tqdm
    have = self._have()
    # Compressed on its way, bytes could not be counted.
    headers = {'Accept-Encoding': 'identity'} | ({'Range': f'bytes={have}-'} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
      if response.status_code == 416:  # there are no bytes after the part
        if response.headers.get('Content-Range') == f'bytes */{have}':
          return
        self._part.unlink()  # the file has changed on the server
        raise requests.ConnectionError('the file has changed; the same command starts over')
      response.raise_for_status()
      if 'text/html' in response.headers.get('Content-Type', ''):
        raise UserError(self._advice(url, 'the answer is a web page, as from a proxy or a login'))
      if not re.match(rf'bytes {have}-', response.headers.get('Content-Range', '')):
        have = 0  # the server does not support ranges
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
    kept = f' (the {self._have()} bytes downloaded are kept; the same command continues)' if self._have() else ''
    return (f'{self._name}: cannot be downloaded: {reason}{kept}; to do it by hand, put {url} or the folder in it into '
            f'{self._home}')


def _reason(error) -> str:
  if error.response is not None:
    return f'HTTP {error.response.status_code} {error.response.reason}'
  cause = getattr(error.args[0], 'reason', error) if error.args else error  # urllib3's reason, without its repetitions
  return ' '.join(str(cause).split())[:200] or type(error).__name__


def unpack(archive: pathlib.Path, folder: pathlib.Path, accepts: Callable[[str], bool]):
  """Unpacks the folder of a zip that contains a checkpoint -> folder, which appears when it is complete.

  Args:
    accepts: whether a folder of that name in the zip may hold the model.

  Raises:
    UserError: damaged, not a zip, without a checkpoint, of another model, too large, or with members that lead elsewhere.
    OSError: it cannot be written.
  """
  temporary = folder.with_name(f'.{folder.name}.unpacking')
  shutil.rmtree(temporary, ignore_errors=True)  # left by a killed run
  try:
    with zipfile.ZipFile(archive) as content:
      members = _members(content, archive, accepts)
      temporary.mkdir()
      for name, member in members.items():
        with content.open(member) as source, open(temporary / name, 'wb') as out:
          shutil.copyfileobj(source, out, BLOCK)  # at most the member's size, which has been checked
          out.flush()
          os.fsync(out.fileno())
    os.replace(temporary, folder)
  except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError, zlib.error) as error:
    raise UserError(f'{archive}: not a readable zip ({" ".join(str(error).split())[:160]}), perhaps a web page or a '
                    'truncated copy: download it again') from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _members(content: zipfile.ZipFile, archive: pathlib.Path, accepts: Callable[[str], bool]) -> dict[str, zipfile.ZipInfo]:
  """{file name: member} of the folder that contains the checkpoint."""
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
      raise UserError(f'{archive}: not unpacked: its member {member.filename!r} has an unsupported compression')
    size += member.file_size
    if not member.is_dir():
      files[parts] = member
  if size > most:
    raise UserError(f'{archive}: not unpacked: would take {size / 1e9:.1f} GB, more than the {most / 1e9:.1f} GB of a model '
                    'in a zip of this size')
  inside = next((parts[:-1] for parts in sorted(files) if parts[-1].endswith('.pth')), None)
  if inside is None:
    raise UserError(f'{archive}: contains no checkpoint (.pth) but {", ".join("/".join(parts) for parts in sorted(files)[:3])}'
                    ': not the zip of a model')
  if inside and not accepts(inside[-1]):
    raise UserError(f'{archive}: contains the model {inside[-1]} instead: rename the zip, or download the right one')
  return {parts[-1]: member for parts, member in files.items() if parts[:-1] == inside}

