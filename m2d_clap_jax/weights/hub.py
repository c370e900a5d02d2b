"""Models on the Hugging Face Hub: the portable folder as a repository, hf://ORGANISATION/NAME or ...NAME@REVISION.

A longer path, such as hf://ORGANISATION/NAME/FILE, is a file in a store (see `paths`), not the address of a model.
"""
import os
import re

from m2d_clap_jax import huggingface
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.paths import as_path
from m2d_clap_jax.weights.portable import CARD, CONFIG, TENSORS, TEXT, read_portable, save_card

SCHEME = 'hf://'
FILES = CONFIG, TENSORS, CARD, f'{TEXT}/*'
_NAME = re.compile(r'([\w.-]+/[\w.-]+)(?:@([\w./-]+))?')


def is_address(text) -> bool:
  """Whether a text is hf://ORGANISATION/NAME[@REVISION]."""
  text = os.fspath(text)
  return text.startswith(SCHEME) and _parts(text) is not None


def _parts(text: str) -> tuple[str, str | None] | None:
  """(repository, revision) by the Hub's rules for names, with or without hf://; None if it is not a name."""
  match = _NAME.fullmatch(text.removeprefix(SCHEME))
  if not match or len(match[1]) > 96 or '--' in match[1] or '..' in match[1]:
    return None
  if any(part[0] in '.-' or part[-1] in '.-' for part in match[1].split('/')):
    return None
  return match[1], match[2]


def download(name: str, folder=None) -> str:
  """Downloads a model into the Hub's cache, or into a folder -> its path.

  The cached copy is used if HF_HUB_OFFLINE=1 or the Hub cannot be reached.

  Raises:
    UserError: there is no such repository or revision, it needs a token, contains no portable model, or is neither in
      the cache nor reachable.
  """
  from huggingface_hub import errors, snapshot_download
  repository, revision = _split(name)
  try:
    place = snapshot_download(repository, revision=revision, allow_patterns=list(FILES), local_files_only=huggingface.is_silent(),
                              local_dir=None if folder is None else os.fspath(folder))
  except errors.GatedRepoError as error:
    raise UserError(f'{name}: needs its owner\'s permission: request it at https://huggingface.co/{repository}, and log in '
                    'with `hf auth login`') from error
  except errors.RevisionNotFoundError as error:
    raise UserError(f'{name}: the Hub has no revision {revision!r} of {repository}') from error
  except errors.RepositoryNotFoundError as error:
    raise UserError(f'{name}: the Hub has no such model, or it is private: check the name, or log in with '
                    '`hf auth login`') from error
  except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
    raise UserError(f'{name}: is not in the cache, and the Hub cannot be reached ({_reason(error)})') from error
  if not all(os.path.exists(os.path.join(place, file)) for file in (CONFIG, TENSORS)):
    raise UserError(f'{name}: contains no model of this package ({CONFIG} and {TENSORS}); open the authors\' files '
                    'by their names (m2d-clap models) or from a local path')
  return place


def upload(folder, name: str, *, private: bool = False) -> str:
  """Uploads a portable folder, creating the repository if necessary -> its address.

  A model card (README.md) is first written into a folder without one, so that it can be reviewed and is uploaded too.

  Raises:
    UserError: the folder is not a portable model, there is no token that may write there, or the Hub cannot be reached.
  """
  from huggingface_hub import HfApi, errors
  repository, revision = _split(name)
  missing = [file for file in (CONFIG, TENSORS) if not os.path.exists(os.path.join(folder, file))]
  if missing:
    raise UserError(f'{folder}: has no {" and no ".join(missing)}: make a portable folder of the model with '
                    '`m2d-clap convert MODEL FOLDER`')
  if not os.path.exists(os.path.join(folder, CARD)):
    save_card(read_portable(as_path(folder), {}), folder)
  api = HfApi()
  try:
    address = api.create_repo(repository, private=private, exist_ok=True)
    if revision:
      api.create_branch(repository, branch=revision, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=os.fspath(folder), allow_patterns=list(FILES), revision=revision,
                      commit_message='Portable model, by m2d-clap push')
  except (errors.HfHubHTTPError, errors.LocalTokenNotFoundError, OSError) as error:
    code = getattr(getattr(error, 'response', None), 'status_code', None)
    advice = 'log in with `hf auth login` with a token that may write there' if code in (401, 403) else 'try again later'
    raise UserError(f'{name}: cannot be written ({_reason(error)}): {advice}') from error
  return str(address)


def _split(name: str) -> tuple[str, str | None]:
  parts = _parts(name)
  if not parts:
    raise UserError(f'{name}: is not the name of a model on the Hub, hf://ORGANISATION/NAME or ...NAME@REVISION')
  return parts


def _reason(error: Exception) -> str:
  return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
