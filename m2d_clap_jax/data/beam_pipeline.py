"""Preparation as an Apache Beam pipeline: the shards of `data.prepare`, byte for byte, made by many machines.

All workers must see the audio, the manifest's text encoder and the output folder: a bucket, or a shared disk.
"""
import re
import shlex
import threading
from collections.abc import Callable, Iterable

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from m2d_clap_jax import paths
from m2d_clap_jax.data import shards
from m2d_clap_jax.data.pool import Pool
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.progress import Progress

POLL = 5.0  # seconds between two looks at what is done


class _Embed(beam.DoFn):
  """(block number, captions) -> nothing; the block is written. `encoder` is a function that gives the text encoder."""

  def __init__(self, make_block: Callable, encoder: Callable):
    self._make_block, self._encoder = make_block, encoder

  def setup(self):
    self._loaded = self._encoder()  # once a worker: it takes seconds

  def process(self, element):
    self._make_block(*element, self._loaded)
    beam.metrics.Metrics.counter('m2d_clap', 'caption blocks').inc()


class _Write(beam.DoFn):
  """(Shard, its part of the caption embeddings) -> nothing; the shard and its sidecar are written."""

  def __init__(self, out: str, source):
    self._out, self._source = out, source

  def setup(self):
    self._pool = Pool(self._source.target, 1)  # a process of its own: a decoder may crash over a file

  def teardown(self):
    self._pool.__exit__()

  def process(self, element):
    job, embeddings = element
    shards.write_shard(self._out, job, self._pool.map(self._source.tasks(job.rows)), embeddings,
                       beam.metrics.Metrics.counter('m2d_clap', 'files').inc)


def run(out: str, jobs: list, source, parts: Iterable, options: str, blocks: Iterable = (),
        make_block: Callable | None = None, encoder: Callable | None = None):
  """Runs the pipeline and waits for it.

  Args:
    out: folder of the shards.
    jobs: list[Shard] to write.
    source: `prepare.Source`.
    parts: for each job a picklable function of a Row -> its caption embeddings, or None.
    options: of Beam, as on its command line ('--runner=DataflowRunner --project=...'); '' runs on this machine.
    blocks, make_block, encoder: (number, captions) of the blocks of caption embeddings to make before all shards.

  Raises:
    UserError: options that Beam does not know, or whatever ended the pipeline.
  """
  told = _options(options)
  try:
    with _watched(out, len(jobs)):
      blocks = list(blocks)
      if blocks:  # a pipeline of its own: no shard may begin before all are there
        with beam.Pipeline(options=told) as pipeline:
          _ = (pipeline | beam.Create(blocks) | beam.Reshuffle() | beam.ParDo(_Embed(make_block, encoder)))
      with beam.Pipeline(options=told) as pipeline:
        _ = (pipeline | beam.Create(list(zip(jobs, parts))) | beam.Reshuffle() | beam.ParDo(_Write(out, source)))
  except Exception as error:  # runners raise their own kinds, with the worker's traceback for a message
    raise _as_user_error(error) from error


def _options(text: str) -> PipelineOptions:
  try:
    words = shlex.split(text)
    known = PipelineOptions(words)
    known.get_all_options()
  except (ValueError, SystemExit) as error:  # argparse's way of refusing
    raise UserError(f'--beam={text}: not options of Beam ({error}), such as --beam="--runner=DataflowRunner '
                    '--project=PROJECT --region=REGION --temp_location=gs://BUCKET/tmp"') from error
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
      return sum(bool(shards.SIDECAR.fullmatch(name)) for name in paths.names_in(self._out))
    except OSError:
      return 0
