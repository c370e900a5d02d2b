"""Preparation as an Apache Beam pipeline: the shards of `data.prepare`, byte for byte, made by many machines.

All workers must see the audio, the text encoder and the output folder: a bucket, or a shared disk. What they are to
do lies in files there (`.beam/`), and the pipeline has the names alone: two million captions are hundreds of MB, and
Dataflow takes a graph of 10 MB. The files hold arrays and JSON, nothing that could run code when it is read.
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
from m2d_clap_jax.data import write
from m2d_clap_jax.data.decoding import Pool
from m2d_clap_jax.data.embeddings import CaptionBank, Lookup
from m2d_clap_jax.data.manifest import Row
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.progress import Progress

POLL = 5.0  # seconds between two looks at what is done
# Beam's own choice, DirectRunner, first tries to download another runner, which is a program of its own.
THIS_MACHINE = 'apache_beam.runners.portability.fn_api_runner.FnApiRunner'
_LEFT = re.compile(r'\.\w+-\d{5}-of-\d{5}\.tfrecord.*\.tmp')  # of a worker that was killed


class _Embed(beam.DoFn):
  """File of (block number, captions) -> nothing; the block is written. `encoder` gives the text encoder."""

  def __init__(self, make_block: Callable, encoder: Callable):
    self._make_block, self._encoder = make_block, encoder

  def setup(self):
    self._loaded = self._encoder()  # once a worker: it takes seconds

  def process(self, name):
    about, _ = _read(name)
    self._make_block(about['number'], about['captions'], self._loaded)
    beam.metrics.Metrics.counter('m2d_clap', 'caption blocks').inc()


class _Write(beam.DoFn):
  """File of a Shard and its caption embeddings (see `_shard_file`) -> nothing; the shard and its sidecar are written."""

  def __init__(self, out: str, source):
    self._out, self._source = out, source

  def setup(self):
    self._blocks = {}  # of caption embeddings: a shard needs a few rows of nearly all
    self._pool = Pool(self._source.target, 1)  # a process of its own: a decoder may crash over a file

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
                      alone=False)  # a runner may try a shard again while a worker that it gave up is still at it


def run(out: str, jobs: list[write.Shard], source, bank: Callable | None, options: str,
        make_block: Callable | None = None, encoder: Callable | None = None):
  """Runs the pipeline and waits for it.

  Args:
    out: folder of the shards.
    jobs: list[Shard] to write.
    source: `prepare.Source`.
    bank: function of a Row -> its caption embeddings, or None. Of a CaptionBank the missing blocks are made first.
    options: of Beam, as on its command line ('--runner=DataflowRunner --project=...'); '' runs on this machine.
    make_block, encoder: picklable functions that write one block of a CaptionBank, and that give the text encoder.

  Raises:
    UserError: options that Beam does not know, or whatever ended the pipeline.
  """
  told = _options(options)
  work = os.path.join(out, '.beam')
  try:
    with _watched(out, len(jobs)):
      blocks = bank.missing([row for job in jobs for row in job.rows]) if isinstance(bank, CaptionBank) else []
      if blocks:  # a pipeline of its own: no shard may begin before all are there
        files = [({'number': i, 'captions': texts}, {}) for i, texts in blocks]
        _over(told, _kept(work, 'block', files), _Embed(make_block, encoder))
      _over(told, _kept(work, 'shard', (_shard_file(job, bank) for job in jobs)), _Write(out, source))
    _clean(out, work)
  except Exception as error:  # runners raise their own kinds, with the worker's traceback for a message
    raise _as_user_error(error) from error


def _over(options: PipelineOptions, names: list[str], function: beam.DoFn):
  with beam.Pipeline(options=options) as pipeline:
    _ = pipeline | beam.Create(names) | beam.Reshuffle() | beam.ParDo(function)


def _shard_file(job: write.Shard, bank) -> tuple[dict, dict[str, np.ndarray]]:
  """What a worker must know of a shard, as JSON data and arrays: where its captions are, or their embeddings."""
  usable = [row for row in job.rows if not row.reason]
  about = {'name': job.name, 'settings': job.settings, 'rows': [dataclasses.asdict(row) for row in job.rows],
           'stamps': job.stamps, 'captions': None}
  if isinstance(bank, CaptionBank):
    about['captions'] = {'folder': bank.folder,
                         'places': {text: bank.places[text] for row in usable for text in row.captions}}
    return about, {}
  return about, {row.file_name: bank(row) for row in usable} if bank else {}


def _kept(folder: str, kind: str, elements: Iterable[tuple[dict, dict]]) -> list[str]:
  """Writes each element to a file of its own; returns the files' names."""
  def keep(numbered):
    number, (about, arrays) = numbered
    name = os.path.join(folder, f'{kind}-{number:05d}.npz')
    # Arrays by number: file names may hold what the names of a zip file's members may not.
    data = io.BytesIO()
    np.savez(data, about=json.dumps(about), names=json.dumps(list(arrays)),
             **{str(i): array for i, array in enumerate(arrays.values())})
    paths.write_bytes(name, data.getvalue(), alone=True)
    return name
  with ThreadPoolExecutor(16) as pool:  # a store takes its time over each
    return list(pool.map(keep, enumerate(elements)))


def _read(name: str) -> tuple[dict, dict[str, np.ndarray]]:
  with np.load(io.BytesIO(paths.read_bytes(name))) as content:
    arrays = {key: content[str(i)] for i, key in enumerate(json.loads(str(content['names'])))}
    return json.loads(str(content['about'])), arrays


def _clean(out: str, work: str):
  """After success only: the workers of a pipeline whose start was broken off here may be reading still."""
  paths.remove_folder(work)
  for name in paths.names_in(out):
    if _LEFT.fullmatch(name):
      paths.as_path(os.path.join(out, name)).unlink(missing_ok=True)


def _options(text: str) -> PipelineOptions:
  try:
    words = shlex.split(text)
    known = PipelineOptions(words)
    unknown = known.get_all_options(retain_unknown_options=True).keys() - known.get_all_options().keys()
  except (ValueError, SystemExit) as error:  # argparse's way of refusing
    raise UserError(f'--beam={text}: not options of Beam ({error}), such as --beam="--runner=DataflowRunner '
                    '--project=PROJECT --region=REGION --temp_location=gs://BUCKET/tmp"') from error
  standard = known.view_as(StandardOptions)
  if standard.runner is None:
    if unknown:  # other runners may have options that Beam learns of later; this one does the work here, unasked
      raise UserError(f'--beam={text}: Beam has no option --{min(unknown)}: check its spelling')
    standard.runner = THIS_MACHINE
  return known


def _as_user_error(error: Exception) -> UserError:
  """What a worker raised, out of the traceback that a runner makes of it."""
  text = str(error).strip()
  found = re.findall(r'UserError: (.*)', text) or text.splitlines()[-1:] or [type(error).__name__]
  reason = found[-1].split(' [while running')[0][:500]
  return UserError(f'the Beam pipeline ended: {reason}; finished shards are kept, the same command continues')


class _watched:
  """Shows how many shards are there, as long as it is entered: runners tell nothing of that sort in common."""

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
