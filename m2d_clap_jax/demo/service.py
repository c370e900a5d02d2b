"""The page's answers to programs: a recording is posted, JSON comes back. docs/inference.md describes both."""
import asyncio
import json
import urllib.parse

from m2d_clap_jax.demo import limits
from m2d_clap_jax.errors import UserError

UPLOAD_SECONDS = 120  # that a recording may take to arrive
AT_ONCE = 4  # recordings in memory; further requests wait


class Refused(Exception):
  """(HTTP status, reason)."""


def routes(demo) -> list:
  """Routes of Starlette, on which gradio is built, for a `page.Demo`."""
  from starlette.concurrency import run_in_threadpool
  from starlette.responses import Response
  from starlette.routing import Route
  free = asyncio.Semaphore(AT_ONCE)

  def answering(function):
    async def endpoint(request):
      try:
        check_origin(request.headers)
        async with free:
          data = await received(request)
          status, answer = 200, await run_in_threadpool(function, demo, data, request.query_params)
      except Refused as refused:
        status, answer = refused.args[0], {'error': refused.args[1]}
      except UserError as error:
        status, answer = 400, {'error': str(error)}
      return Response(json.dumps(answer), status, media_type='application/json')
    return endpoint
  return [Route('/api/classify', answering(classify), methods=['POST']),
          Route('/api/embed', answering(embed), methods=['POST'])]


def classify(demo, data: bytes, options) -> dict:
  """Compares a recording with the texts of `label`, or of `caption`, each of which may be given several times."""
  labels, captions = options.getlist('label'), options.getlist('caption')
  if bool(labels) == bool(captions):
    raise UserError('give label=dog&label=rain, or caption=..., as many as there are')
  lines = limits.read_lines('\n'.join(labels or captions))
  wave = demo.listen('sound', data)
  scores = demo.compare(wave, lines, limits.LABELS if labels else limits.CAPTIONS)
  return about(demo, wave) | {'scores': [{'text': text, 'cosine': cosine} for text, cosine in scores]}


def embed(demo, data: bytes, options) -> dict:
  """A recording's features (pooled over time) and its CLAP embedding, as lists; takes no options."""
  del options
  wave = demo.listen('sound', data)
  features, clap = demo.pipeline.features(wave)
  return about(demo, wave) | {'embedding': features[0].tolist(), 'clap': clap[0].tolist()}


def about(demo, wave) -> dict:
  """What every answer says of a recording [S]: the model that was asked, and the seconds that it heard."""
  return {'model': demo.pipeline.fingerprint, 'seconds': len(wave) / demo.pipeline.sample_rate}


def check_origin(headers):
  """A browser names the page that sends a request: only this one may."""
  if 'origin' in headers and urllib.parse.urlsplit(headers['origin']).netloc != headers.get('host'):
    raise Refused(403, 'requests of other pages are not answered')


async def received(request) -> bytes:
  """The body, which is refused as soon as it is known to be too large."""
  parts, size = [], int(request.headers.get('content-length') or 0)
  if size > limits.MOST_UPLOAD:
    raise Refused(413, f'{size} bytes; a recording may have {limits.MOST_UPLOAD}')
  size = 0
  try:
    async with asyncio.timeout(UPLOAD_SECONDS):
      async for part in request.stream():
        size += len(part)
        if size > limits.MOST_UPLOAD:
          raise Refused(413, f'more than {limits.MOST_UPLOAD} bytes, the most that a recording may have')
        parts.append(part)
  except TimeoutError:
    raise Refused(408, f'the recording did not arrive in {UPLOAD_SECONDS} s') from None
  return b''.join(parts)
