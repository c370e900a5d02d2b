"""`m2d-clap prepare`: audio and captions in, a folder of TFRecord shards out (see data.write and data.schema)."""
import contextlib
import dataclasses
import functools
import os
import sys

from m2d_clap_jax import paths
from m2d_clap_jax.audio.logmel import LogMel
from m2d_clap_jax.audio.pool import Pool
from m2d_clap_jax.data import authors, captions, embeddings, manifest as manifests, schema, worker, write
from m2d_clap_jax.data.vectors import Vectors
from m2d_clap_jax.errors import UserError, install
from m2d_clap_jax.locks import HeldError, locked
from m2d_clap_jax.progress import Progress
from m2d_clap_jax.startup import cores


@dataclasses.dataclass(frozen=True)
class Source:
  """Where the log-mels of rows come from: a worker's function, the folder of its files, and what else it takes."""
  target: str
  root: str
  logmel: LogMel
  max_seconds: float

  def tasks(self, rows):
    """The function's arguments for each row that is not rejected already."""
    return ((os.path.join(self.root, row.file_name), self.logmel, self.max_seconds) for row in rows if not row.reason)


def prepare(manifest, audio_root, out, *, text_encoder='thenlper/gte-base', sample_rate=16000, split=None,
            num_shards=None, workers=None, max_seconds=30.0, embedding_dtype='float16', task=None,
            beam=None, columns=None, like='', caption_embeddings=()):
  """Manifest and audio files -> data folder `out`; returns prepare.json's dict, None while tasks are unfinished.

  Args:
    manifest: CSV, JSON lines or JSON, or a published data set (see data.manifest).
    audio_root: folder that the manifest's file names are relative to.
    out: folder to write. Shards of an interrupted run with the same manifest and settings are kept.
    text_encoder: name, folder, 'minilm', None or 'none' (no embeddings), or an object like text.TextEncoder.
    sample_rate: 16000 or 32000, Hz; audio of any rate is resampled to it.
    split: prepare this split only.
    num_shards: shards of each split; by default one for 512 files.
    workers: decoding processes; by default one for each core. Has no effect on the result.
    max_seconds: longer clips are cut, and counted as truncated.
    embedding_dtype: 'float16' or 'float32'.
    task: (i, n) writes every n-th shard, from the i-th, beside n - 1 others with the same arguments, on one machine or
      many that share `out`. Whichever ends last completes the folder. The result is that of one run.
    beam: options of Apache Beam, '' for its defaults, makes the shards in a Beam pipeline. The result is the same.
    columns: {ours: (theirs, ...)} where the manifest's columns have other names.
    like: the published data set that the manifest is of, a key of tables.layouts.LAYOUTS; '' for none.
    caption_embeddings: files of captions and vectors (see data.vectors), which take the place of the text encoder. Clips
      with a caption that has none are rejected; such captions are listed in `out`/missing_captions.txt.

  Raises:
    UserError: for what rejecting a file cannot solve; finished shards stay.
  """
  _check_arguments(num_shards, workers, max_seconds, embedding_dtype, task, beam)
  audio_root, vector_files = os.fspath(paths.as_path(audio_root)), [_absolute(file) for file in caption_embeddings]
  if beam is not None:
    audio_root, out = _absolute(audio_root), _absolute(out)
  logmel = LogMel.for_rate(sample_rate)
  rows = read_rows(manifest, audio_root, columns=columns, like=like, split=split)
  if text_encoder == 'none':
    text_encoder = None
  for row in rows:
    if (text_encoder is not None or vector_files) and not row.captions and not row.reason:
      row.reason = 'no caption and no label'
  load = functools.partial(Vectors, vector_files) if vector_files else functools.partial(_encoder, _everywhere(text_encoder))
  with _folder(out, task) as out:
    encoder = Vectors(vector_files, all_captions(rows)) if vector_files else _encoder(text_encoder)
    settings = _settings(logmel, max_seconds, encoder, embedding_dtype)
    jobs = write.plan(rows, settings, num_shards, _stamps(audio_root, rows))
    if isinstance(encoder, Vectors):
      stamps = encoder.stamps()
      jobs = [dataclasses.replace(job, stamps=job.stamps | stamps) for job in jobs]
      encoder.mark_missing(rows, os.path.join(out, 'missing_captions.txt'))  # not in the plan: it can be mended
    done = write.finished(out, jobs)
    todo = [job for job in _own(jobs, task) if job.name not in done]
    bank = None
    source = Source(worker.AUDIO, audio_root, logmel, max_seconds)
    if encoder and todo:
      bank = embeddings.CaptionBank(out, all_captions(rows), encoder, embedding_dtype)
    if todo and beam is not None:
      make_block = bank and functools.partial(embeddings.make_block, bank.folder, bank.dtype)
      _pipeline().run(out, todo, source, bank, beam, make_block, load)
      return _complete(out, jobs, task)
    if bank:
      with write.writing(out):
        bank.embed([row for job in todo for row in job.rows], Progress('captions'), task)
    return _write(out, jobs, done, source, bank, workers, task)


def read_rows(manifest, audio_root, *, columns=None, like='', split=None):
  """A manifest's rows, with captions made from labels where there are no others; arguments and errors as of `prepare`."""
  rows = _select(manifests.read_manifest(manifest, audio_root, columns, like), split, manifest)
  _check_root(rows, audio_root)
  for row in rows:
    if not row.captions and row.labels:
      row.captions = [captions.label_caption(row.labels)]
  return rows


def all_captions(rows):
  """The captions of the rows that are not rejected: without repetitions, in their order."""
  return list(dict.fromkeys(text for row in rows if not row.reason for text in row.captions))


def prepare_logmels(logmels, caption_embeddings, out, *, text_encoder=None, sample_rate=16000, split=None,
                    num_shards=None, workers=None, max_seconds=30.0, embedding_dtype='float16', task=None,
                    beam=None):
  """The authors' folders -> data folder `out`; returns prepare.json's dict, None while tasks are unfinished.

  Args:
    logmels: folder of `.npy` files [F, T] or [1, F, T], sub-folders too.
    caption_embeddings: paths or patterns of `np.save`d dictionaries {id: [E] or [n, E]}; captions of all are joined.
      An id is a file's stem, the stem without a leading 'Y', or the first 11 characters of these.
    text_encoder: 'none' allows an empty list of dictionaries (for training without captions); else not used.
    sample_rate: the rate that the log-mels were computed at, Hz.
    split: the split's name; 'train' by default.
    others: as in `prepare`.
  """
  _check_arguments(num_shards, workers, max_seconds, embedding_dtype, task, beam)
  logmels = os.fspath(paths.as_path(logmels))
  if beam is not None:
    logmels, out = _absolute(logmels), _absolute(out)
  logmel = LogMel.for_rate(sample_rate)
  if not caption_embeddings and text_encoder != 'none':
    raise UserError('--logmels needs --caption_embeddings=capemb_*.npy, or --text_encoder=none '
                    'to train without captions')
  rows = authors.list_logmels(logmels, split or 'train')
  bank = authors.Dictionaries(caption_embeddings, embedding_dtype) if caption_embeddings else None
  if bank:
    bank.mark_missing(rows)
  with _folder(out, task) as out:
    jobs = write.plan(rows, _settings(logmel, max_seconds, bank, embedding_dtype), num_shards, _stamps(logmels, rows))
    done = write.finished(out, jobs)
    source = Source(worker.NPY, logmels, logmel, max_seconds)
    todo = [job for job in jobs if job.name not in done]
    if todo and beam is not None:
      _pipeline().run(out, todo, source, bank, beam)
      return _complete(out, jobs, task)
    return _write(out, jobs, done, source, bank, workers, task)


def summary(meta, out):
  """What was written, in a few lines."""
  lines = [f'{out}: mean {meta["mean"]:.4f}, std {meta["std"]:.4f}']
  for split, n in meta['splits'].items():
    lines.append(f'  {split}: {n["clips"]} clips of {n["files"]} files '
                 f'({n["rejected"]} rejected, {n["truncated"]} truncated), '
                 f'{n["captions"]} captions, {n["seconds"] / 3600:.2f} hours, {n["shards"]} shards; '
                 f'rows: {n["rows"]} = {n["rows"] - n["rejected_rows"]} written + {n["rejected_rows"]} rejected')
  if any(n['rejected_rows'] for n in meta['splits'].values()):
    lines.append(f'  why files were rejected: {os.path.join(os.fspath(out), "rejected.csv")} '
                 '(once they are fixed, the same command writes their shards again)')
  return '\n'.join(lines)


def _own(jobs, task):
  """The shards that a task writes."""
  return jobs if task is None else jobs[task[0]::task[1]]


def _write(out, jobs, done, source, bank, workers, task):
  """Writes the task's shards that are not done, then, if no other is missing, the metadata."""
  todo = [job for job in _own(jobs, task) if job.name not in done]
  if todo:
    if done:
      print(f'{out}: {len(done)} of {len(jobs)} shards are there already', file=sys.stderr)
    files = [row for job in todo for row in job.rows]
    progress = Progress('files', len(files))
    count = workers or cores()
    with Pool(source.target, min(count, len(files))) as pool, contextlib.closing(progress):
      results = pool.map(source.tasks(files))
      for job in todo:
        write.write_shard(out, job, results, bank, progress.step)
  return _complete(out, jobs, task)


def _complete(out, jobs, task):
  """The metadata, unless shards of other tasks are missing."""
  missing = len(jobs) - len(write.finished(out, jobs))
  if missing and task:
    print(f'{out}: {missing} of {len(jobs)} shards belong to tasks that are not done; the last one completes the folder',
          file=sys.stderr)
    return None
  meta = write.write_metadata(out, alone=task is None)
  embeddings.remove_blocks(out)
  return meta


def _pipeline():
  """The module of Beam, which is an extra."""
  try:
    from m2d_clap_jax.data import beam
  except ImportError as error:
    raise UserError(f'--beam needs Apache Beam ({error}): {install("apache_beam")}') from error
  return beam


def _absolute(place):
  """A path that means the same to workers, which start in other folders."""
  return place if paths.is_remote(place) else os.path.abspath(paths.as_path(place))


def _everywhere(text_encoder):
  """The text encoder for workers: a folder by its whole path, a name or an object as it is."""
  if isinstance(text_encoder, str | os.PathLike) and paths.as_path(text_encoder).is_dir():
    return _absolute(text_encoder)
  return text_encoder


def _settings(logmel, max_seconds, encoder, embedding_dtype):
  """What a shard's bytes depend on, apart from manifest and audio."""
  described = encoder and {'name': str(encoder.name), 'hash': encoder.weights_hash, 'width': int(encoder.width)}
  return {'schema': schema.VERSION, 'logmel': dataclasses.asdict(logmel), 'max_seconds': float(max_seconds),
          'text_encoder': described, 'embedding_dtype': embedding_dtype}


def _stamps(root, rows):
  """Sizes and times of the rows' files, by which a later preparation sees which of them have changed."""
  return paths.stamps(root, [row.file_name for row in rows if not row.reason])


def _encoder(text_encoder):
  if isinstance(text_encoder, str | os.PathLike):
    from m2d_clap_jax.text import TextEncoder
    return TextEncoder(os.fspath(text_encoder))
  return text_encoder


def _select(rows, split, manifest):
  if split is None:
    return rows
  kept = [row for row in rows if row.split == split]
  if not kept:
    splits = ', '.join(sorted({row.split for row in rows}))
    raise UserError(f'{manifest}: has no split {split!r}, only {splits}: check --split')
  return kept


def _check_root(rows, root):
  """A wrong root is told at once, rather than after two million rejections."""
  if not paths.as_path(root).is_dir():
    raise UserError(f'{root}: no such folder: check --audio_root')
  usable = [row.file_name for row in rows if not row.reason]
  first = usable[:20 if paths.is_remote(root) else 1000]  # a store takes its time over each
  if usable and not any(paths.as_path(os.path.join(root, name)).exists() for name in first):
    raise UserError(f'{root}: holds none of the files that the manifest names first, such as {usable[0]}: '
                    'check --audio_root')


def _check_arguments(num_shards, workers, max_seconds, embedding_dtype, task, beam):
  if beam is not None and (workers or task):
    raise UserError('--beam divides the work itself: leave out --workers and --task')
  for name, value in (('num_shards', num_shards), ('workers', workers)):
    if value is not None and not 1 <= value <= 99999:
      raise UserError(f'--{name}={value}: must be from 1 to 99999')
  if not 0 < max_seconds < float('inf'):
    raise UserError(f'--max_seconds={max_seconds}: must be more than 0')
  if embedding_dtype not in ('float16', 'float32'):
    raise UserError(f'--embedding_dtype={embedding_dtype}: must be float16 or float32')


@contextlib.contextmanager
def _folder(out, task=None):
  """Makes `out` and keeps a second run, or a second run of the same task, out of it; yields its path as a string."""
  out = os.fspath(paths.as_path(out))
  if paths.is_remote(out):  # which cannot be locked; two runs would write the same bytes
    yield out
    return
  locks = {'.lock': bool(task)}  # name -> whether it is shared
  if task:
    locks[f'.lock-{task[0]}-of-{task[1]}'] = False
  with contextlib.ExitStack() as stack:
    for name, shared in locks.items():
      with write.writing(out):
        os.makedirs(out, exist_ok=True)
        try:
          stack.enter_context(locked(os.path.join(out, name), shared=shared))
        except HeldError as e:
          raise UserError(f'{out}: another preparation is writing here ({e}): wait for it, or choose another --out') from e
    yield out
