"""Preparation as an Apache Beam pipeline: many machines write the same shards as `data.prepare`, byte for byte.

All workers must see the audio, the text encoder and the output folder: a bucket, or a shared disk. Their tasks are
stored in files there (`.beam/`), and the pipeline contains only the file names: two million captions are hundreds of MB,
and Dataflow limits a graph to 10 MB. The files contain arrays and JSON, nothing that could run code when it is read.
"""
import dataclasses
import io
import json
import os
import re
import shlex
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

from m2d_clap_jax import paths
from m2d_clap_jax.audio.pool import Pool
from m2d_clap_jax.data import write
from m2d_clap_jax.data.embeddings import CaptionBank, Lookup
from m2d_clap_jax.data.manifest import Row
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.progress import Progress

POLL = 5.0  # seconds between two progress updates
# Beam's default, DirectRunner, first tries to download another runner, a separate program.
THIS_MACHINE = 'apache_beam.runners.portability.fn_api_runner.FnApiRunner'
_LEFT = re.compile(r'\.\w+-\d{5}-of-\d{5}\.tfrecord.*\.tmp')  # left by a killed worker


class _Embed(beam.DoFn):
  """Reads a file of (block number, captions) and writes the block. `encoder` returns the text encoder."""

  def __init__(self, make_block: Callable, encoder: Callable):
    self._make_block, self._encoder = make_block, encoder

  def setup(self):
    self._loaded = self._encoder()  # once per worker, because it takes seconds

  def process(self, name):
    about, _ = _read(name)
    self._make_block(about['number'], about['captions'], self._loaded)
    beam.metrics.Metrics.counter('m2d_clap', 'caption blocks').inc()


class _Write(beam.DoFn):
  """Reads a file of a Shard and its caption embeddings (see `_shard_file`); writes the shard and its sidecar."""

  def __init__(self, out: str, source):
    self._out, self._source = out, source

  def setup(self):
    self._blocks = {}  # of caption embeddings; a shard needs a few rows of nearly every block
    self._pool = Pool(self._source.target, 1)  # a separate process, because a decoder may crash on a file

  def teardown(self):
    self._pool.__exit__()

  def process(self, name):
    about, arrays = _read(name)
    rows = [Row(**row) for row in about['rows']]
    embeddings = None
    if about['captions']:
      embeddings = Lookup(about['captions']['folder'], about['captions']['places'], self._blocks)
    elif arrays:
      embeddings = lambda row: arrays[row.file_name]
    write.write_shard(self._out, write.Shard(about['name'], rows, about['settings'], about['stamps']),
                      self._pool.map(self._source.tasks(rows)), embeddings,
                      beam.metrics.Metrics.counter('m2d_clap', 'files').inc,
                      alone=False)  # a runner may retry a shard while a worker that it gave up on is still writing it


def run(out: str, jobs: list[write.Shard], source, bank: Callable | None, options: str,
        make_block: Callable | None = None, encoder: Callable | None = None):
  """Runs the pipeline and waits for it.

  Args:
    out: folder of the shards.
    jobs: list[Shard] to write.
    source: `prepare.Source`.
    bank: function of a Row -> its caption embeddings, or None. The missing blocks of a CaptionBank are made first.
    options: of Beam, as on its command line ('--runner=DataflowRunner --project=...'); '' runs on this machine.
    make_block, encoder: picklable functions that write one block of a CaptionBank, and that return the text encoder.

  Raises:
    UserError: unknown options of Beam, or a failure of the pipeline.
  """
  beam_options = _options(options)
  work = os.path.join(out, '.beam')
  try:
    with _watched(out, len(jobs)):
      blocks = bank.missing([row for job in jobs for row in job.rows]) if isinstance(bank, CaptionBank) else []
      if blocks:  # a separate pipeline, because shards need all blocks
        files = [({'number': i, 'captions': texts}, {}) for i, texts in blocks]
        _over(beam_options, _kept(work, 'block', files), _Embed(make_block, encoder))
      _over(beam_options, _kept(work, 'shard', (_shard_file(job, bank) for job in jobs)), _Write(out, source))
    _clean(out, work)
  except Exception as error:  # runners raise their own exceptions, with the worker's traceback as the message
    raise _as_user_error(error) from error


def _over(options: PipelineOptions, names: list[str], function: beam.DoFn):
  with beam.Pipeline(options=options) as pipeline:
    _ = pipeline | beam.Create(names) | beam.Reshuffle() | beam.ParDo(function)


def _shard_file(job: write.Shard, bank) -> tuple[dict, dict[str, np.ndarray]]:
  """A worker's description of a shard, as JSON data and arrays: the places of its captions, or their embeddings."""
  usable = [row for row in job.rows if not row.reason]
  about = {'name': job.name, 'settings': job.settings, 'rows': [dataclasses.asdict(row) for row in job.rows],
           'stamps': job.stamps, 'captions': None}
  if isinstance(bank, CaptionBank):
    about['captions'] = {'folder': bank.folder,
                         'places': {text: bank.places[text] for row in usable for text in row.captions}}
    return about, {}
  return about, {row.file_name: bank(row) for row in usable} if bank else {}


def _kept(folder: str, kind: str, elements: Iterable[tuple[dict, dict]]) -> list[str]:
  """Writes each element to a separate file; returns the files' names."""
  def keep(numbered):
    number, (about, arrays) = numbered
    name = os.path.join(folder, f'{kind}-{number:05d}.npz')
    # Arrays by number: file names may contain characters that names in a zip file may not.
    data = io.BytesIO()
    np.savez(data, about=json.dumps(about), names=json.dumps(list(arrays)),
             **{str(i): array for i, array in enumerate(arrays.values())})
    paths.write_bytes(name, data.getvalue(), alone=True)
    return name
  with ThreadPoolExecutor(16) as pool:  # to overlap the latency of a store
    return list(pool.map(keep, enumerate(elements)))


def _read(name: str) -> tuple[dict, dict[str, np.ndarray]]:
  with np.load(io.BytesIO(paths.read_bytes(name))) as content:
    arrays = {key: content[str(i)] for i, key in enumerate(json.loads(str(content['names'])))}
    return json.loads(str(content['about'])), arrays


def _clean(out: str, work: str):
  """Called only after success: workers of a pipeline that was interrupted here may still be reading."""
  paths.remove_folder(work)
  for name in paths.names_in(out):
    if _LEFT.fullmatch(name):
      paths.as_path(os.path.join(out, name)).unlink(missing_ok=True)


def _options(text: str) -> PipelineOptions:
  try:
    words = shlex.split(text)
    known = PipelineOptions(words)
    unknown = known.get_all_options(retain_unknown_options=True).keys() - known.get_all_options().keys()
  except (ValueError, SystemExit) as error:  # argparse exits on errors
    raise UserError(f'--beam={text}: not options of Beam ({error}), such as --beam="--runner=DataflowRunner '
                    '--project=PROJECT --region=REGION --temp_location=gs://BUCKET/tmp"') from error
  standard = known.view_as(StandardOptions)
  if standard.runner is None:
    if unknown:  # other runners may define further options; the default runner does not
      raise UserError(f'--beam={text}: Beam has no option --{min(unknown)}: check its spelling')
    standard.runner = THIS_MACHINE
  return known


def _as_user_error(error: Exception) -> UserError:
  """Extracts a worker's error from the traceback in a runner's exception."""
  text = str(error).strip()
  messages = re.findall(r'(?:User|Store)Error: (.*)', text) or text.splitlines()[-1:] or [type(error).__name__]
  reason = messages[-1].split(' [while running')[0][:500]
  return UserError(f'the Beam pipeline ended: {reason}; finished shards are kept, the same command continues')


class _watched:
  """Shows the number of finished shards while it is entered: runners have no common progress report."""

  def __init__(self, out: str, total: int):
    self._out, self._total, self._end = out, total, threading.Event()

  def __enter__(self):
    self._before = self._count()
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()

  def __exit__(self, *_):
    self._end.set()
    self._thread.join()

  def _watch(self):
    progress = Progress('shards', self._total)
    while not self._end.wait(POLL):
      progress(min(self._total, self._count() - self._before), self._total)
    progress.close()

  def _count(self) -> int:
    try:
      return sum(bool(write.SIDECAR.fullmatch(name)) for name in paths.names_in(self._out))
    except OSError:
      return 0
