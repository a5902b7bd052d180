"""A fake of the JSON API of Google Cloud Storage on loopback, as far as gcsfs and tensorstore ask.

Objects are put whole, with generations: preconditions and exclusive creation behave as Google's.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse

_OBJECT = re.compile(r'(?:/download|/upload)?/storage/v1/b/([^/]+)(?:/o(?:/([^/]+))?)?$')
_REWRITE = re.compile(r'/storage/v1/b/[^/]+/o/([^/]+)/(?:rewriteTo|copyTo)/b/[^/]+/o/([^/]+)$')


class Store:
  """One bucket: {name: (content, generation)}, and a fault that the tests set."""

  def __init__(self):
    self.objects, self.uploads, self.lock, self.counter = {}, {}, threading.RLock(), 0
    self.refuse = lambda method, name: 0  # HTTP status to answer with, 0: do as asked
    self.asked = []  # (method, name)

  def put(self, name, content, match=None):
    """Put an object; return its metadata, None if its generation is not `match`."""
    with self.lock:
      if match is not None and int(match) != self.objects.get(name, (b'', 0))[1]:
        return None
      self.counter += 1
      self.objects[name] = (bytes(content), self.counter)
      return self.about(name)

  def about(self, name):
    """Return an object's metadata."""
    content, generation = self.objects[name]
    digest = base64.b64encode(hashlib.md5(content).digest()).decode()
    return {
      'kind': 'storage#object', 'bucket': 'bucket', 'name': name, 'size': str(len(content)),
      'generation': str(generation), 'metageneration': '1', 'md5Hash': digest, 'etag': digest,
      'updated': '2026-01-01T00:00:00.000Z', 'timeCreated': '2026-01-01T00:00:00.000Z',
    }  # fmt: skip

  def list(self, asked):
    """Return a listing."""
    prefix, delimiter = asked.get('prefix', ''), asked.get('delimiter', '')
    items, prefixes = [], set()
    with self.lock:
      for name in sorted(self.objects):
        after, _, deeper = name.removeprefix(prefix).partition(delimiter or '\0')
        between = asked.get('startOffset', '') <= name < asked.get('endOffset', '\U0010ffff')
        if not name.startswith(prefix) or not between:
          continue
        if deeper or (delimiter and name.endswith(delimiter)):
          prefixes.add(f'{prefix}{after}{delimiter}')
        else:
          items.append(self.about(name))
    return {'kind': 'storage#objects', 'items': items, 'prefixes': sorted(prefixes)}


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  wbufsize, disable_nagle_algorithm = -1, True  # an answer is one packet: they wait for no others

  def log_message(self, *_):
    pass

  def answer(self, status, content=b'', **headers):
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name.replace('_', '-'), str(value))
    self.send_header('Content-Length', str(len(content)))
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(content)
    self.wfile.flush()

  def fail(self, status, message=''):
    self.answer(status, {'error': {'code': status, 'message': message or 'not found'}})

  def parse(self):
    """Return the path, what the query asks, the name of the object, and the body."""
    path, _, query = self.path.partition('?')
    body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
    asked = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    match = _REWRITE.match(path) or _OBJECT.match(path)
    name = asked.get('name') or urllib.parse.unquote((match and match[match.lastindex]) or '')
    if match and match.re is _OBJECT and not match[2] and '/o' not in path[-2:]:
      name = ''
    return path, asked, name, body

  def handle_one(self):
    store, (path, asked, name, body) = self.server.store, self.parse()
    if 'multipart' in asked.get('uploadType', ''):
      name = name if 'name' in asked else json.loads(_parts(self.headers, body)[0])['name']
    elif asked.get('uploadType') == 'resumable' and 'upload_id' not in asked:
      name = asked.get('name') or json.loads(body)['name']
    elif 'upload_id' in asked:
      name = store.uploads[asked['upload_id']][0]
    store.asked.append((self.command, name))
    if status := store.refuse(self.command, name):
      return self.fail(status, f'{name}: refused')
    return getattr(self, f'on_{self.command}')(store, path, asked, name, body)

  do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_one

  def on_GET(self, store, path, asked, name, body):
    if path.endswith('/o'):
      return self.answer(200, store.list(asked))
    if re.search(r'/b/[^/]+$', path):
      return self.answer(200, {'kind': 'storage#bucket', 'name': 'bucket', 'location': 'US'})
    if name not in store.objects:
      return self.fail(404)
    content, generation = store.objects[name]
    if asked.get('alt') != 'media':
      return self.answer(200, store.about(name))
    if asked.get('ifGenerationNotMatch') == str(generation):
      return self.fail(304)
    if asked.get('ifGenerationMatch', str(generation)) != str(generation):
      return self.fail(412, 'precondition')
    headers = {'x_goog_generation': generation, 'Content_Type': 'application/octet-stream'}
    if part := re.match(r'bytes=(\d*)-(\d*)', self.headers.get('Range', '')):
      start = int(part[1]) if part[1] else len(content) - int(part[2])
      stop = min(int(part[2]) + 1, len(content)) if part[1] and part[2] else len(content)
      if start >= len(content):
        return self.fail(416, 'range')
      headers['Content_Range'] = f'bytes {start}-{stop - 1}/{len(content)}'
      return self.answer(206, content[start:stop], **headers)
    return self.answer(200, content, **headers)

  on_HEAD = on_GET

  def on_POST(self, store, path, asked, name, body):
    if 'upload_id' in asked:
      return self.on_PUT(store, path, asked, name, body)
    match = asked.get('ifGenerationMatch')
    if rewrite := _REWRITE.match(path):
      source, target = map(urllib.parse.unquote, rewrite.groups())
      if source not in store.objects:
        return self.fail(404)
      return self.answer(
        200, {'done': True, 'resource': store.put(target, store.objects[source][0])}
      )
    if asked.get('uploadType') == 'resumable':
      identity = str(len(store.uploads))
      store.uploads[identity] = (name, bytearray(), match)
      host = self.headers['Host']
      return self.answer(
        200, {}, Location=f'http://{host}{path}?uploadType=resumable&upload_id={identity}'
      )
    if asked.get('uploadType') == 'multipart':
      body = _parts(self.headers, body)[1]
    return self.done(store.put(name, body, match))

  def on_PUT(self, store, path, asked, name, body):
    name, content, match = store.uploads[asked['upload_id']]
    content += body
    total = self.headers.get('Content-Range', '').rpartition('/')[2]
    if total not in ('', '*') and len(content) >= int(total):
      return self.done(store.put(name, content, match))
    return self.answer(308, Range=f'bytes=0-{len(content) - 1}')

  def done(self, about):
    return self.answer(200, about) if about else self.fail(412, 'precondition failed')

  def on_DELETE(self, store, path, asked, name, body):
    with store.lock:
      match = asked.get('ifGenerationMatch')
      if name not in store.objects:
        return self.fail(404)
      if match and match != str(store.objects[name][1]):
        return self.fail(412, 'precondition failed')
      del store.objects[name]
    return self.answer(204)


def _parts(headers, body):
  """Split a multipart body."""
  boundary = re.search(r'boundary="?([^";]+)', headers['Content-Type'])[1].encode()
  parts = body.split(b'--' + boundary)[1:-1]
  return [part.partition(b'\n\n')[2].removesuffix(b'\n') for part in parts]  # as gcsfs sends them


@contextlib.contextmanager
def serving():
  """Serve a bucket called `bucket`; yield its store and the environment that leads there."""
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), _Handler)
  server.daemon_threads, server.store = True, Store()
  server.handle_error = lambda *_: None  # processes are killed while they ask
  threading.Thread(target=server.serve_forever, daemon=True).start()
  url = f'http://127.0.0.1:{server.server_port}'
  environment = {
    'STORAGE_EMULATOR_HOST': url,
    'TENSORSTORE_GCS_HTTP_URL': url,
    'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'none',
    'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',  # it asks for the bucket's kind by gRPC
  }
  try:
    yield server.store, environment
  finally:
    server.shutdown()
    server.server_close()
