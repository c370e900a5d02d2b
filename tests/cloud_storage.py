"""A server of what gcsfs, TensorStore and Google's own client use of Cloud Storage's JSON interface, in memory.

Source: https://cloud.google.com/storage/docs/json_api/v1. Left out: rights, versions, batches, composed objects.
"""
import base64
import email.utils
import hashlib
import http.server
import itertools
import json
import re
import threading
import urllib.parse
import uuid


class Bucket:
  """objects: {name: (bytes, generation)}; broken: requests with this in their path are refused, if not empty."""

  def __init__(self, name: str):
    self.name, self.objects, self.uploads = name, {}, {}
    self.generations, self.lock = itertools.count(1), threading.Lock()
    self.broken = ''

  def put(self, name: str, data: bytes, match: str | None):
    """Stores an object -> its description, or None where another generation is there than `match`."""
    with self.lock:
      there = self.objects.get(name, (b'', 0))[1]
      if match is not None and int(match) != there:
        return None
      self.objects[name] = data, next(self.generations)
      return self.describe(name)

  def describe(self, name: str) -> dict:
    data, generation = self.objects[name]
    digest = base64.b64encode(hashlib.md5(data).digest()).decode()
    time = f'2024-01-01T00:00:{generation % 60:02d}.000Z'
    return {'kind': 'storage#object', 'bucket': self.name, 'name': name, 'size': str(len(data)), 'etag': f'e{generation}',
            'generation': str(generation), 'metageneration': '1', 'md5Hash': digest, 'updated': time, 'timeCreated': time}

  def listing(self, query: dict) -> dict:
    """As objects.list: names in their order, those with the delimiter after the prefix as common prefixes."""
    prefix, delimiter = query.get('prefix', ''), query.get('delimiter')
    start = max(query.get('startOffset', ''), query.get('pageToken', ''))
    most, items, prefixes = int(query.get('maxResults') or 1000), [], []
    with self.lock:
      for name in sorted(self.objects):
        if not name.startswith(prefix) or name < start or query.get('endOffset') and name >= query['endOffset']:
          continue
        cut = name.find(delimiter, len(prefix)) if delimiter else -1
        if cut >= 0 and name[:cut + 1] in prefixes:
          continue
        if len(items) + len(prefixes) == most:
          return {'items': items, 'prefixes': prefixes, 'nextPageToken': name}
        if cut >= 0:
          prefixes.append(name[:cut + 1])
        else:
          items.append(self.describe(name))
    return {'items': items, 'prefixes': prefixes}


class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version, wbufsize, disable_nagle_algorithm = 'HTTP/1.1', 1 << 16, True

  def log_message(self, *_):
    pass

  def do_any(self):
    data = self._body()
    url = urllib.parse.urlsplit(self.path)
    self.query = dict(urllib.parse.parse_qsl(url.query))
    bucket = self.server.bucket
    if bucket.broken and bucket.broken in urllib.parse.unquote(self.path):
      return self._answer(403, {'error': {'code': 403, 'message': 'Not today'}})
    match = re.fullmatch(r'(/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?', url.path)
    if not match or match[2] != bucket.name:
      return self._answer(404, {'error': {'code': 404, 'message': 'The specified bucket does not exist.'}})
    name = urllib.parse.unquote(match[3] or '')
    if match[1] == '/upload':
      return self._upload(bucket, data)
    if self.command == 'POST' and '/rewriteTo/' in (match[3] or ''):
      return self._rewrite(bucket, match[3])
    if self.command == 'DELETE' and name:
      return self._delete(bucket, name)
    if self.command == 'GET' and name:
      return self._get(bucket, name, match[1] == '/download' or self.query.get('alt') == 'media')
    if self.command == 'GET' and '/o' in url.path[len(bucket.name):]:
      return self._answer(200, {'kind': 'storage#objects', **bucket.listing(self.query)})
    return self._answer(200, {'kind': 'storage#bucket', 'name': bucket.name, 'id': bucket.name})
  do_GET = do_POST = do_PUT = do_DELETE = do_any

  def _body(self) -> bytes:
    if self.headers.get('Transfer-Encoding') != 'chunked':
      return self.rfile.read(int(self.headers.get('Content-Length') or 0))
    parts = []
    while size := int(self.rfile.readline().split(b';')[0], 16):
      parts.append(self.rfile.read(size))
      self.rfile.readline()
    self.rfile.readline()
    return b''.join(parts)

  def _upload(self, bucket: Bucket, data: bytes):
    kind, name = self.query.get('uploadType'), self.query.get('name')
    if 'upload_id' in self.query:
      return self._continue(bucket, self.query['upload_id'], data)
    if kind == 'resumable':
      number = uuid.uuid4().hex
      bucket.uploads[number] = name or json.loads(data)['name'], bytearray()
      place = f'http://{self.headers["Host"]}/upload/storage/v1/b/{bucket.name}/o?upload_id={number}'
      return self._answer(200, {}, Location=place)
    if kind == 'multipart':
      boundary = email.message_from_string(f'Content-Type: {self.headers["Content-Type"]}').get_param('boundary')
      mark = b'--' + boundary.encode()
      about, _, rest = data.partition(b'\n' + mark)  # not split: the content may hold anything
      name = json.loads(re.split(rb'\r?\n\r?\n', about, maxsplit=1)[1])['name']
      data = re.split(rb'\r?\n\r?\n', rest, maxsplit=1)[1].removesuffix(b'\n' + mark + b'--')
    return self._stored(bucket.put(name, data, self.query.get('ifGenerationMatch')))

  def _continue(self, bucket: Bucket, number: str, data: bytes):
    name, so_far = bucket.uploads[number]
    start, end, total = re.fullmatch(r'bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)', self.headers['Content-Range']).groups()
    if start is not None:
      assert int(start) == len(so_far) and int(end) - int(start) + 1 == len(data)
      so_far += data
    if total == '*' or int(total) > len(so_far):
      return self._answer(308, None, Range=f'bytes=0-{len(so_far) - 1}')
    del bucket.uploads[number]
    return self._stored(bucket.put(name, bytes(so_far), None))

  def _stored(self, about: dict | None):
    return self._answer(200, about) if about else self._answer(412, {'error': {'code': 412, 'message': 'Precondition'}})

  def _rewrite(self, bucket: Bucket, path: str):
    source, target = re.fullmatch(r'(.+)/rewriteTo/b/[^/]+/o/(.+)', path).groups()
    source, target = urllib.parse.unquote(source), urllib.parse.unquote(target)
    if source not in bucket.objects:
      return self._missing(source)
    data = bucket.objects[source][0]
    return self._answer(200, {'kind': 'storage#rewriteResponse', 'done': True, 'resource': bucket.put(target, data, None)})

  def _delete(self, bucket: Bucket, name: str):
    with bucket.lock:
      there = bucket.objects.get(name)
      if there and self.query.get('ifGenerationMatch') not in (None, str(there[1])):
        return self._stored(None)
      bucket.objects.pop(name, None)
    return self._answer(204, None) if there else self._missing(name)

  def _get(self, bucket: Bucket, name: str, media: bool):
    with bucket.lock:
      if name not in bucket.objects:
        return self._missing(name)
      (data, generation), about = bucket.objects[name], bucket.describe(name)
    if not media:
      return self._answer(200, about)
    if self.query.get('ifGenerationNotMatch') == str(generation):
      return self._answer(304, None)
    if self.query.get('ifGenerationMatch') not in (None, str(generation)):
      return self._stored(None)
    headers = {'X-Goog-Generation': str(generation), 'X-Goog-Metageneration': '1', 'ETag': about['etag']}
    part = re.fullmatch(r'bytes=(\d*)-(\d*)', self.headers.get('Range') or '')
    if not part:
      return self._send(200, data, headers)
    start = int(part[1]) if part[1] else max(0, len(data) - int(part[2]))
    end = min(len(data), int(part[2]) + 1 if part[1] and part[2] else len(data))
    if start >= len(data):
      return self._answer(416, {'error': {'code': 416, 'message': 'Requested range not satisfiable'}})
    return self._send(206, data[start:end], headers | {'Content-Range': f'bytes {start}-{end - 1}/{len(data)}'})

  def _missing(self, name: str):
    return self._answer(404, {'error': {'code': 404, 'message': f'No such object: {name}'}})

  def _answer(self, code: int, content: dict | None, **headers):
    data = b'' if content is None else json.dumps(content).encode()
    return self._send(code, data, {'Content-Type': 'application/json', **headers})

  def _send(self, code: int, data: bytes, headers: dict):
    try:
      self.send_response(code)
      for key, value in headers.items():
        self.send_header(key, value)
      if code not in (204, 304):
        self.send_header('Content-Length', str(len(data)))
      self.end_headers()
      if code not in (204, 304):
        self.wfile.write(data)
    except ConnectionError:  # a client that was killed, or has seen enough
      self.close_connection = True


class Server(http.server.ThreadingHTTPServer):
  """`with Server('name') as server`: serves one bucket at http://127.0.0.1:server.server_port."""
  daemon_threads, request_queue_size = True, 128

  def __init__(self, name: str):
    super().__init__(('127.0.0.1', 0), Handler)
    self.bucket = Bucket(name)

  def __enter__(self):
    threading.Thread(target=self.serve_forever, daemon=True).start()
    return self

  def __exit__(self, *_):
    self.shutdown()
    self.server_close()

  def handle_error(self, *_):
    pass  # connections that are cut off are part of the tests
