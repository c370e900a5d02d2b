"""Writing shards: which row belongs to which, one shard with its sidecar, and the folder's metadata.

A shard is `{split}-00000-of-00007.tfrecord`; its sidecar, the same name with `.json` added, is written last and marks
it finished. Sidecars carry the settings and the counts, so shards do not depend on each other or on any shared file.
"""
import collections
import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import re
import sys

from m2d_clap_jax import fields, paths
from m2d_clap_jax.data import description, schema
from m2d_clap_jax.data.tfrecord import frame
from m2d_clap_jax.errors import UserError

FILES_PER_SHARD = 512  # 80 MB of 10-s clips: half a minute of work lost at most when a run is killed
SIDECAR = re.compile(r'(\w+)-(\d{5})-of-(\d{5})\.tfrecord\.json')


@dataclasses.dataclass(frozen=True)
class Shard:
  """One shard to write.

  Attributes:
    name: its file name without suffix.
    rows: in the order of the records.
    settings: of the run.
    stamps: {file name: (bytes, what changes when the file does)} of the rows' files, as `paths.stamps` gives them.
  """
  name: str
  rows: list
  settings: dict
  stamps: dict = dataclasses.field(default_factory=dict)


def plan(rows, settings, num_shards=None, stamps=None):
  """Rows of all splits -> list[Shard]. A pure function of its arguments, so that shards can be written anywhere.

  The rows of a split are ordered by the hash of their names, which makes shards alike, and cut into equal parts.
  """
  stamps = stamps or {}
  splits = collections.defaultdict(list)
  for row in rows:
    splits[row.split].append(row)
  shards = []
  for split, members in sorted(splits.items()):
    members.sort(key=lambda row: (hashlib.sha256(row.file_name.encode()).digest(), row.reason))
    count = min(num_shards or math.ceil(len(members) / FILES_PER_SHARD), len(members))
    own = dict(settings, num_shards=count, manifest=_fingerprint(members))
    for i in range(count):
      part = members[i * len(members) // count:(i + 1) * len(members) // count]
      shards.append(Shard(f'{split}-{i:05d}-of-{count:05d}', part, own,
                          {row.file_name: stamps[row.file_name] for row in part if row.file_name in stamps}))
  return shards


def _fingerprint(rows):
  digest = hashlib.sha256()
  for row in rows:
    digest.update(json.dumps([row.file_name, row.captions, row.labels, row.rows, row.reason]).encode())
  return digest.hexdigest()[:16]


def write_shard(out, shard, results, embeddings, on_file, alone=True):
  """Writes one shard and its sidecar; returns the sidecar's dict.

  Args:
    out: folder (str), local or remote.
    shard: Shard.
    results: iterator of (ok, worker's result or reason), one for each row without a reason, in order (`Pool.map`).
    embeddings: function of a Row -> [n, E] in the stored dtype, or None for none.
    on_file: called after each file.
    alone: False if another process may be writing the same shard; whoever ends last puts the same bytes there.
  """
  counts = collections.Counter(dict.fromkeys(
      ('rows', 'files', 'clips', 'captions', 'rejected', 'rejected_rows', 'truncated'), 0))
  sums = {'seconds': 0.0, 'elements': 0, 'sum': 0.0, 'sumsq': 0.0}
  offsets, rejected, position = [], [], 0
  final = os.path.join(out, f'{shard.name}.tfrecord')
  with writing(final), paths.replacing(final, alone) as temporary:
    with open(temporary, 'wb') as file:
      for row in shard.rows:
        ok, result = (False, row.reason) if row.reason else next(results)
        counts.update(rows=row.rows, files=row.files)
        if ok:
          vectors = embeddings(row) if embeddings else None
          data = schema.encode(schema.Record(row.file_name, result['logmel'], row.captions, vectors, row.labels))
          offsets.append(position)
          position += file.write(frame(data))
          counts.update(clips=1, captions=len(row.captions) if vectors is None else len(vectors),
                        truncated=int(result['truncated']))
          sums['elements'] += result['logmel'].size
          for name in ('seconds', 'sum', 'sumsq'):
            sums[name] += result[name]
        else:
          counts.update(rejected=row.files, rejected_rows=row.rows)
          rejected.append([row.file_name, result, row.rows])
        on_file()
    if os.path.getsize(temporary) != position:
      raise OSError(f'{os.path.getsize(temporary)} of {position} bytes were written')
  sidecar = dict(settings=shard.settings, bytes=position, offsets=offsets, rejected_files=rejected, stamps=shard.stamps,
                 **counts, **sums)
  write_text(os.path.join(out, f'{shard.name}.tfrecord.json'), json.dumps(fields.sealed(sidecar)), alone)
  return sidecar


def finished(out, shards):
  """Sidecars of the shards that need not be written: {name: dict}; the others of which files have changed are told.

  Raises:
    UserError: the folder was made otherwise.
  """
  stamps, changed = {shard.name: shard.stamps for shard in shards}, {}
  settings = {shard.name.rsplit('-', 3)[0]: shard.settings for shard in shards}
  found = {}
  there = paths.names_in(out)
  sizes = paths.stamps(out, [name for name in there if name.endswith('.tfrecord')])
  for name in there:
    match = SIDECAR.fullmatch(name)
    if not match:
      continue
    sidecar = description.read_sidecar(os.path.join(out, name))
    _check_settings(out, sidecar['settings'], settings.get(match[1], shards[0].settings), match[1] in settings)
    stem = name.removesuffix('.tfrecord.json')
    size, _ = sizes.get(f'{stem}.tfrecord', (None, None))
    if stem in stamps and size == sidecar['bytes']:
      new = _changed(sidecar.get('stamps'), stamps[stem])
      changed |= dict.fromkeys(new)
      if not new:
        found[stem] = sidecar
  if changed:
    print(f'note: {out}: {len(changed)} files are not those that were prepared, such as {next(iter(changed))}: their shards are '
          'written again', file=sys.stderr)
  return found


def _changed(before, now):
  """Names of files that a shard was made of and that are others now. What was made of files that are gone is kept."""
  if before is None:  # made by a version that did not keep them
    return []
  return [name for name, stamp in now.items() if list(before.get(name, ())) != list(stamp)]


def _check_settings(out, theirs, ours, same_split):
  """UserError that names what differs between a finished shard and this run."""
  def flat(settings):
    encoder = settings['text_encoder']
    flat = dict(settings, **settings['logmel'], text_encoder=encoder and [encoder['hash'], encoder['width']])
    del flat['logmel']
    if not same_split:  # another split may have other shards
      del flat['manifest'], flat['num_shards']
    return flat

  a, b = flat(theirs), flat(ours)
  differ = [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
  if 'manifest' in differ and 'num_shards' in differ:
    differ.remove('num_shards')  # follows from the manifest
  if not differ:
    return
  words = []
  for name in differ:
    if name == 'manifest':
      words.append('another manifest (its files, captions or labels differ)')
    elif name == 'text_encoder':
      names = [s['text_encoder']['name'] if s['text_encoder'] else 'none' for s in (theirs, ours)]
      words.append('text_encoder={}, not {}'.format(*names if names[0] != names[1] else (names[0], 'these weights')))
    else:
      words.append(f'{name}={a.get(name)}, not {b.get(name)}')
  raise UserError(f'{out}: was prepared with {"; ".join(words)}: choose another --out, or delete this folder')


@contextlib.contextmanager
def writing(path):
  """Turns failures to write into one-line errors."""
  try:
    yield
  except Exception as e:
    tensorflow = sys.modules.get('tensorflow')  # TFDS writes remote folders through it
    if not isinstance(e, (OSError, tensorflow.errors.OpError) if tensorflow else OSError):
      raise
    reason = e.strerror if isinstance(e, OSError) and e.strerror else getattr(e, 'message', str(e))
    raise UserError(f'{path}: cannot be written ({" ".join(str(reason).split())[:200]}): '
                    'make room or choose another --out; finished shards are kept, the same command continues') from e


def write_text(path, text, alone):
  """Writes a small file at once or not at all; `alone` as in `paths.replacing`."""
  with writing(path):
    paths.write_text(path, text, alone)


def write_metadata(out, alone=True):
  """Merges all sidecars of the folder into prepare.json (returned), rejected.csv and TFDS' metadata.

  alone: as in `paths.replacing`; tasks may end at the same time.
  """
  splits = collections.defaultdict(dict)
  total = {}
  for name in paths.names_in(out):
    match = SIDECAR.fullmatch(name)
    if match:
      splits[match[1]][int(match[2])] = description.read_sidecar(os.path.join(out, name))
      total[match[1]] = int(match[3])
  for split, sidecars in splits.items():
    if len(sidecars) < total[split]:
      raise UserError(f'{out}: {len(sidecars)} of {total[split]} shards of split {split!r} are there: '
                      f'prepare it too (--split={split}), then the folder is complete')
    if not any(s['clips'] for s in sidecars.values()):
      _all_rejected(out, split, sidecars.values(), total[split])
  meta = _merge(splits)
  if meta['std'] < 1e-3:
    raise UserError(f'{out}: all clips are digital silence: check the audio files')
  _write_rejected(out, splits, alone)
  with writing(os.path.join(out, 'dataset_info.json')):
    _write_tfds(out, meta, splits)
  write_text(os.path.join(out, 'prepare.json'), json.dumps(fields.sealed(meta), indent=2) + '\n', alone)
  return meta


def _merge(splits):
  first = next(iter(splits.values()))[0]['settings']
  meta = {name: value for name, value in first.items() if name not in ('num_shards', 'manifest')}
  counted = splits['train'].values() if 'train' in splits else [s for split in splits.values() for s in split.values()]
  counted = list(counted)
  elements = sum(s['elements'] for s in counted)
  meta['mean'] = math.fsum(s['sum'] for s in counted) / elements
  meta['std'] = math.sqrt(max(0.0, math.fsum(s['sumsq'] for s in counted) / elements - meta['mean'] ** 2))
  meta['splits'] = {}
  names = ('rows', 'files', 'clips', 'captions', 'rejected', 'rejected_rows', 'truncated', 'seconds')
  for split, sidecars in sorted(splits.items()):
    meta['splits'][split] = {'shards': len(sidecars), **{n: sum(s[n] for s in sidecars.values()) for n in names}}
  return meta


def _all_rejected(out, split, sidecars, count):
  """Takes the useless shards away, so that the same command can be tried again, and tells why."""
  reasons = collections.Counter(reason for s in sidecars for _, reason, _ in s['rejected_files'])
  most = max(reasons, key=reasons.get)
  example = next(f'{name}: {why}' for s in sidecars for name, why, _ in s['rejected_files'] if why == most)
  for i in range(count):
    for suffix in ('tfrecord.json', 'tfrecord'):
      paths.as_path(os.path.join(out, f'{split}-{i:05d}-of-{count:05d}.{suffix}')).unlink(missing_ok=True)
  raise UserError(f'{out}: every file of split {split!r} was rejected, most often ({reasons[most]} of '
                  f'{sum(reasons.values())}) as in {example}')


def _write_rejected(out, splits, alone):
  text = io.StringIO()
  table = csv.writer(text, lineterminator='\n')
  table.writerow(['file', 'reason', 'split', 'rows'])
  for split, sidecars in sorted(splits.items()):
    rows = [(name, reason, split, rows) for s in sidecars.values() for name, reason, rows in s['rejected_files']]
    table.writerows(sorted(rows))
  write_text(os.path.join(out, 'rejected.csv'), text.getvalue(), alone)


def _write_tfds(out, meta, splits):
  import tensorflow_datasets as tfds
  template = tfds.core.ShardedFileTemplate(
      data_dir=out, template='{SPLIT}-{SHARD_X_OF_Y}.{FILEFORMAT}', filetype_suffix='tfrecord')
  infos = [tfds.core.SplitInfo(name=split, shard_lengths=[s['clips'] for _, s in sorted(sidecars.items())],
                               num_bytes=sum(s['bytes'] for s in sidecars.values()),
                               filename_template=template.replace(split=split))
           for split, sidecars in sorted(splits.items())]
  tfds.folder_dataset.write_metadata(data_dir=out, features=schema.tfds_features(meta), split_infos=infos,
                                     filename_template=template, check_data=False,
                                     description='Log-mels and caption embeddings, written by m2d-clap prepare.')
