"""What the JSON files of a data folder may say: `prepare.json` and the sidecar of each shard."""

from m2d_clap_jax import fields, paths
from m2d_clap_jax.data import schema
from m2d_clap_jax.data.tfrecord import FOOTER, HEADER
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.fields import Nullable, Optional, number, text, version, whole

_ADVICE = 'delete it and prepare the data again'
_SECONDS = number(0, 1e12)
_SETTINGS = {
    'schema': version(schema.VERSION), 'max_seconds': number(0, 1e9), 'embedding_dtype': text(('float16', 'float32')),
    'logmel': {'sample_rate': whole(1000, 1_000_000), 'n_fft': whole(1, 1 << 20), 'hop': whole(1, 1 << 20),
               'n_mels': whole(1, 65536), 'f_min': number(0, 1e6), 'f_max': number(0, 1e6)},
    'text_encoder': Nullable({'name': text(), 'hash': Nullable(text()), 'width': whole(1, 65536)})}
_COUNTS = {name: whole() for name in ('rows', 'files', 'clips', 'captions', 'rejected', 'rejected_rows', 'truncated')}
_SHARDS = whole(1, 99999)
PREPARED = _SETTINGS | {'mean': number(-1e4, 1e4), 'std': number(1e-3, 1e4),
                        'splits': {str: _COUNTS | {'shards': _SHARDS, 'seconds': _SECONDS}}}
SIDECAR = _COUNTS | {
    'settings': _SETTINGS | {'num_shards': _SHARDS, 'manifest': text()}, 'bytes': whole(), 'offsets': [whole()],
    'rejected_files': [(text(), text(), whole(1))], 'seconds': _SECONDS, 'elements': whole(), 'sum': number(),
    'sumsq': number(0), 'stamps': Optional({str: (whole(), text())})}


def read_prepared(path) -> dict:
  """prepare.json -> its dict; UserError where it cannot be read or says what cannot be."""
  return _read(path, PREPARED)


def read_sidecar(path) -> dict:
  """The same of a sidecar, whose records follow each other."""
  sidecar = _read(path, SIDECAR)
  offsets, end = sidecar['offsets'], sidecar['bytes']
  if len(offsets) != sidecar['clips'] or offsets[:1] not in ([], [0]) or any(
      after - before < HEADER + FOOTER for before, after in zip(offsets, [*offsets[1:], end])):
    raise UserError(f'{path}: offsets: {len(offsets)} of {sidecar["clips"]} clips in {end} bytes, which do not follow each '
                    f'other; {_ADVICE}')
  return sidecar


def _read(path, known) -> dict:
  try:
    content = paths.read_bytes(path)
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror or error}): {_ADVICE}') from error
  return fields.parse(content, known, path, _ADVICE)
