"""Damaged versions of files, and reading them within bounds of time and memory."""

import contextlib
import copy
import json
import os
import pathlib
import resource
import signal

import hypothesis
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get('SLM_FUZZ_EXAMPLES', '150'))  # mutations of each file
ROOM = 2 << 30  # bytes of address space that a reader may take
SECONDS = 30  # of processor time for 150 mutations

fuzzed = hypothesis.settings(
  max_examples=EXAMPLES, derandomize=True, database=None, deadline=None,
  suppress_health_check=list(hypothesis.HealthCheck),
)  # fmt: skip


@contextlib.contextmanager
def bounded():
  """Fail instead of hanging or taking all memory."""

  def stop(*_):
    raise AssertionError('took too long')

  used = int(pathlib.Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
  limits = resource.getrlimit(resource.RLIMIT_AS)
  before = signal.signal(signal.SIGVTALRM, stop)
  signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS * max(EXAMPLES / 150, 1))
  resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, limits[1]))
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)
    resource.setrlimit(resource.RLIMIT_AS, limits)


def attempt(read, path):
  """Read a file; anything but success, or one line that names the file, is a failure."""
  try:
    read(path)
  except (ValueError, OSError) as e:
    assert path.name in str(e) or path.parent.name in str(e), f'does not name the file: {e}'


# Values that take another's place in JSON.
VALUES = st.sampled_from([
  None, True, False, 0, -1, 1, 2, 0.5, 1e400, float('nan'), 2**31, 2**63, 10**30, '', 'x', '-1',
  'x' * 300, '\ud800', '\n', [], [0], ['x'], [[]], [None], {}, {'x': 0}, {'content': 'x'},
]).map(copy.deepcopy)  # fmt: skip


def places(value, at=()):
  """Yield the place of every value within JSON."""
  yield at
  inside = (
    value.items()
    if isinstance(value, dict)
    else enumerate(value)
    if isinstance(value, list)
    else ()
  )
  for key, x in inside:
    yield from places(x, (*at, key))


@st.composite
def json_mutations(draw, value):
  """Replace, remove, rename, repeat or nest one to three of the values."""
  value = copy.deepcopy(value)
  for _ in range(draw(st.integers(1, 3))):
    found = [*places(value)]
    at = found[draw(st.integers(0, len(found) - 1))]
    how = draw(st.sampled_from(['replace', 'replace', 'remove', 'rename', 'nest']))
    if not at:
      value = draw(VALUES) if how != 'nest' else [value]
      continue
    holder = value
    for key in at[:-1]:
      holder = holder[key]
    if how == 'replace':
      holder[at[-1]] = draw(VALUES)
    elif how == 'nest':
      holder[at[-1]] = [holder[at[-1]]]
    elif how == 'remove' or isinstance(holder, list):
      del holder[at[-1]]
    else:
      holder[draw(st.sampled_from(['', 'x', str(at[-1]).upper()]))] = holder.pop(at[-1])
  return value


INSERTED = st.sampled_from([b'[' * 100_000, b'{"a":' * 100_000, b'\xff\xfe', b'9' * 5000])


@st.composite
def byte_mutations(draw, data):
  """Flip, cut, repeat and insert bytes, mostly at the start, where formats keep their sizes."""
  data = bytearray(data)
  for _ in range(draw(st.integers(1, 4))):
    reach = draw(st.sampled_from([16, 256, len(data)]))
    at = draw(st.integers(0, max(min(reach, len(data)) - 1, 0)))
    how = draw(st.sampled_from(['flip', 'set', 'cut', 'remove', 'repeat', 'insert']))
    if how == 'flip' and data:
      data[at] ^= 1 << draw(st.integers(0, 7))
    elif how == 'set':
      data[at : at + 8] = draw(st.sampled_from([b'\xff' * 8, b'\0' * 8, b'\xff' * 7 + b'\x7f']))
    elif how == 'cut':
      del data[at:]
    elif how == 'remove':
      del data[at : at + draw(st.integers(1, 64))]
    elif how == 'repeat':
      data[at:at] = data[at : at + draw(st.integers(1, 64))] * draw(st.integers(1, 9))
    else:
      data[at:at] = draw(
        st.sampled_from([b'[' * 100_000, b'{"a":' * 100_000, b'\xff\xfe', b'9' * 5000])
      )
  return bytes(data)


def damaged(path, read):
  """Read mutations of a file, which holds JSON if it is named so; it is as it was afterwards."""
  whole = path.read_bytes()
  changed = byte_mutations(whole)
  if path.suffix == '.json':
    changed |= json_mutations(json.loads(whole)).map(lambda x: json.dumps(x).encode())

  @fuzzed
  @hypothesis.given(changed)
  def test(data):
    path.write_bytes(data)
    attempt(read, path)

  try:
    with bounded():
      test()
  finally:
    path.write_bytes(whole)
