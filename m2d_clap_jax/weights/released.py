"""The authors' released models by name: downloaded once, verified, and kept in a cache folder.

The cache is $M2D_CLAP_HOME, or this package's folder in the user's cache folder. In it NAME/ contains the checkpoint, and
NAME.json the SHA-256 of the zip and of the checkpoint at the first download: the authors publish no hashes, so later files
are compared with the first. A NAME.zip or a folder NAME that was put there by hand counts as downloaded.
"""
import contextlib
import hashlib
import importlib.util
import json
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import NamedTuple

from m2d_clap_jax import paths
from m2d_clap_jax.errors import UserError, install
from m2d_clap_jax.locks import HeldError, locked
from m2d_clap_jax.weights.public import name_fields

ADDRESS = 'https://github.com/nttcslab/m2d/releases/download'
LICENCE = "the authors' own, for evaluation only (LICENSE in https://github.com/nttcslab/m2d)"
HOME = 'M2D_CLAP_HOME'
GTE, BERT = 'GTE-base', 'BERT-base, inside the file'


class Released(NamedTuple):
  """A released model. text: the encoder of its captions; gigabytes: size of the download, if known."""
  tag: str
  about: str
  frames: int
  sample_rate: int = 16000
  text: str | None = None
  gigabytes: float | None = None

  @property
  def seconds(self) -> float:
    """Length of a training crop: a frame is 10 ms at either rate."""
    return self.frames / 100


RELEASED = {
    'm2d_clap_vit_base-80x608p16x16-240128': Released('v0.1.0', 'M2D-CLAP, complete', 608, text=GTE, gigabytes=1.4),
    'm2d_as_vit_base-80x608p16x16-240213': Released('v0.1.0', 'M2D-AS, complete', 608, gigabytes=1.4),
    'm2d_vit_base-80x608p16x16-221006-mr7': Released('v0.1.0', 'M2D/0.7, complete', 608, gigabytes=1.4),
    'm2d_vit_base-80x608p16x16-221006-mr6': Released('v0.1.0', 'M2D/0.6, complete', 608, gigabytes=1.4),
    'm2d_vit_base-80x200p16x4-230529': Released('v0.1.0', 'M2D, patches of 40 ms, complete', 200, gigabytes=1.4),
    'm2d_vit_base-80x608p16x16-221006-mr7_enconly': Released('v0.1.0', 'M2D/0.7, encoder only', 608),
    'm2d_vit_base-80x608p16x16-220930-mr7_enconly': Released('v0.1.0', 'M2D/0.7, encoder only', 608),
    'm2d_as_vit_base-80x608p16x16p32k-240413_enconly': Released('v0.1.0', 'M2D-AS, encoder only', 608, 32000),
    'm2d_s_vit_base-80x608p80x2-230220': Released('v0.2.0', 'M2D-S for speech, complete', 608, gigabytes=1.4),
    'm2d_s_vit_base-80x512p80x2-230301': Released('v0.2.0', 'M2D-S for speech, complete', 512, gigabytes=1.4),
    'm2d_s_vit_base-80x400p80x2-230201': Released('v0.2.0', 'M2D-S for speech, complete', 400, gigabytes=1.4),
    'm2d_clap_vit_base-80x1001p16x16-240128_AS-FT_enconly':
        Released('v0.3.0', 'M2D-CLAP, fine-tuned on AudioSet', 1001, text=GTE),
    'm2d_as_vit_base-80x1001p16x16-240213_AS-FT_enconly': Released('v0.3.0', 'M2D-AS, fine-tuned on AudioSet', 1001),
    'm2d_vit_base-80x1001p16x16-221006-mr7_as_46ab246d': Released('v0.3.0', 'M2D/0.7, fine-tuned on AudioSet', 1001),
    'm2d_as_vit_base-80x1001p16x16p32k-240413_AS-FT_enconly':
        Released('v0.3.0', 'M2D-AS, fine-tuned on AudioSet', 1001, 32000),
    'm2d_clap_vit_base-80x1001p16x16p16kpBpTI-2025': Released('v0.5.0', 'M2D-CLAP of 2025', 1001, text=BERT),
    'm2d_clap_vit_base-80x1001p80x2p16kpBpTI-2025':
        Released('v0.5.0', 'M2D-CLAP of 2025, patches of 20 ms', 1001, text=BERT),
}


def is_name(path) -> bool:
  """Whether it is the name of a released model."""
  return os.fspath(path) in RELEASED


def url(name: str) -> str:
  """Where the authors publish a model."""
  return f'{ADDRESS}/{RELEASED[name].tag}/{name}.zip'


def home() -> pathlib.Path:
  """The cache folder, which need not exist. UserError if $M2D_CLAP_HOME is in a store."""
  place = os.environ.get(HOME)
  if not place:
    import pooch
    return pathlib.Path(pooch.os_cache('m2d_clap_jax'))
  if paths.is_remote(place):
    raise UserError(f'{HOME}={place}: the cache must be on a disk; name a local folder')
  return pathlib.Path(place).expanduser()


def cached(name: str) -> pathlib.Path | None:
  """The cached checkpoint of a model, unverified; None if it is not cached."""
  files = _checkpoints(home() / name)
  return files[0] if len(files) == 1 else None


def fetch(name: str) -> pathlib.Path:
  """A released model's checkpoint, NAME/FILE.pth in the cache, downloaded if it is not there.

  Raises:
    UserError: it cannot be downloaded, unpacked or written, or differs from the first download; PyTorch is missing.
  """
  with _disk_failures(name):
    checkpoint = _unchanged(name)
    if checkpoint is None:
      with _alone(name):
        checkpoint = _unchanged(name) or _take(name)  # another process may have fetched it meanwhile
  return checkpoint


def _take(name: str) -> pathlib.Path:
  """Unpacks and records the zip, put here by hand or else downloaded -> the checkpoint."""
  from m2d_clap_jax.weights import download
  if importlib.util.find_spec('torch') is None:  # report this before downloading a gigabyte
    raise UserError(f'{name}: is a .pth file, which PyTorch reads: {install("torch")}')
  folder, archive, known = home() / name, home() / f'{name}.zip', _record(name)
  print(f'notice: {name}: its licence is {LICENCE}', file=sys.stderr)
  by_hand = folder.is_dir() or archive.exists()
  if not by_hand:
    download.download(url(name), archive, home())
  digest = _sha256(archive) if archive.exists() else known.get('zip_sha256')
  try:
    _compare(name, archive, digest, known.get('zip_sha256'))
    if not folder.is_dir():
      download.unpack(archive, folder, lambda inside: _may_hold(inside, name))
  except UserError:
    if not by_hand:
      archive.unlink()
    raise
  checkpoint = _checkpoint(folder)
  own = _sha256(checkpoint)
  _compare(name, checkpoint, own, known.get('sha256'))
  _save_record(name, {'url': url(name), 'zip_sha256': digest, 'file': checkpoint.name, 'sha256': own,
                      'stamp': _stamp(checkpoint)})
  archive.unlink(missing_ok=True)  # as large as its contents
  return checkpoint


def _may_hold(folder: str, name: str) -> bool:
  """Whether a folder in the zip may be the model's: not the name of another, nor of other input, patches or rate."""
  fields = name_fields(folder)
  return folder == name or folder not in RELEASED and (not fields or fields == name_fields(name))


def _unchanged(name: str) -> pathlib.Path | None:
  """The recorded checkpoint, None without one. It is hashed again only if its size or date has changed."""
  known = _record(name)
  checkpoint = home() / name / known.get('file', '')
  if not known or not checkpoint.is_file():
    return None
  if known['stamp'] != _stamp(checkpoint):
    _compare(name, checkpoint, _sha256(checkpoint), known['sha256'])
    with contextlib.suppress(OSError):  # a read-only cache: then it is hashed each time
      _save_record(name, known | {'stamp': _stamp(checkpoint)})
  return checkpoint


def _compare(name: str, file: pathlib.Path, digest: str | None, known: str | None):
  if known not in (None, digest):
    whole = file if file.suffix == '.zip' else file.parent
    raise UserError(f'{file}: has changed since the first download: its SHA-256 is {digest}, the recorded one {known}; delete '
                    f'{whole} to download it again, or {_record_file(name)} to accept the new file')


def _record_file(name: str) -> pathlib.Path:
  return home() / f'{name}.json'


def _record(name: str) -> dict:
  """The recorded hashes; {} before the first download."""
  try:
    known = json.loads(_record_file(name).read_text(encoding='utf-8'))
  except (FileNotFoundError, NotADirectoryError):
    return {}
  except (OSError, ValueError) as error:
    raise UserError(f'{_record_file(name)}: cannot be read ({error}); delete it to record the hashes again') from None
  if not isinstance(known, dict) or not {'file', 'sha256', 'stamp', 'zip_sha256'} <= known.keys():
    raise UserError(f'{_record_file(name)}: is not a record of a downloaded model; delete it to record the hashes again')
  return known


def _save_record(name: str, record: dict):
  paths.write_text(_record_file(name), json.dumps(record, indent=2) + '\n')


def _stamp(file: pathlib.Path) -> list[int]:
  about = file.stat()
  return [about.st_size, about.st_mtime_ns]


def _sha256(file: pathlib.Path) -> str:
  with open(file, 'rb') as content:
    return hashlib.file_digest(content, 'sha256').hexdigest()


def _checkpoints(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(folder.glob('*.pth'))


def _checkpoint(folder: pathlib.Path) -> pathlib.Path:
  files = _checkpoints(folder)
  if len(files) != 1:
    raise UserError(f'{folder}: contains {len(files)} checkpoints (.pth) where one is expected: '
                    + ('open one by its path' if files else 'put it there, or delete the folder to download it again'))
  return files[0]


@contextlib.contextmanager
def _alone(name: str) -> Iterator[None]:
  """Prevents other processes from fetching the same model; waits for one that does."""
  home().mkdir(parents=True, exist_ok=True)
  lock = home() / f'.{name}.lock'
  with contextlib.ExitStack() as stack:
    try:
      stack.enter_context(locked(lock))
    except HeldError:
      print(f'notice: {name}: another process is fetching it; waiting', file=sys.stderr)
      stack.enter_context(locked(lock, wait=True))
    yield


@contextlib.contextmanager
def _disk_failures(name: str) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise UserError(f'{name}: {error.filename or home()} cannot be read or written ({error.strerror or error}): free space, or '
                    f'name another cache folder with {HOME}; what has been downloaded is kept') from error
