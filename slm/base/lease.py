"""Writers of runs at addresses: one at a time, and what they write to a stage is put there.

The lock is an object that its holder renews while it lives, so that a run whose machine is lost
goes on elsewhere.
"""

import contextlib
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from slm.base import files, stage

RENEW = 10.0  # seconds between renewals, and puts of changed files
LEASE = 60.0  # seconds after which a lease that was not renewed is taken over
_SETTLE = 1.0  # seconds until one of two that take a lease over at once knows that it has lost
_HOLDER = {'host': str, 'pid': int, 'started': str, 'since': str, 'boot': str}  # of a lease
_leases: 'list[Lease]' = []  # of this process


@contextlib.contextmanager
def held(
  folder: Path,
  name: str,
  holder: Mapping[str, Any],
  alive: Callable[[Mapping[str, Any]], bool],
  refusal: Callable[[object, Mapping[str, Any]], ValueError],
) -> Iterator[None]:
  """Hold a stage, or the part of it called `name`, at its address; nothing for other directories.

  What has changed is put there at the end, also after an error.

  Raises:
    ValueError: the `refusal`, if another process holds it; see `Lease.take`.
    OSError: if the address cannot be read or written, or another process took it over.
  """
  if not stage.address(folder):
    yield
    return
  lease = Lease(folder, name, holder)
  lease.take(alive, refusal)
  try:
    with stage.fetched(folder) as known:
      lease.start(known)
      try:
        yield
      except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
          lease.push()
        raise
      lease.push()
  finally:
    lease.drop()


def push(folder: Path) -> None:
  """Put what has changed in a stage that this process holds; nothing for any other directory.

  Raises:
    OSError: if that fails, or the lease was lost.
  """
  for lease in list(_leases):
    if lease.folder == folder:
      lease.push()


def release() -> None:
  """Remove the leases of this process, which ends at once; for a second at most."""
  for lease in list(_leases):
    thread = threading.Thread(target=lease.drop, daemon=True)
    thread.start()
    thread.join(1)


class Lease:
  """A lock at the address of a stage, which a thread renews; it also puts changed files there.

  Who finds one waits until it is renewed, and is refused, or has not been for LEASE seconds, and
  takes it over: clocks are not compared.
  """

  def __init__(self, folder: Path, name: str, holder: Mapping[str, Any]):
    self.folder, self._name, self._holder = folder, name, dict(holder)
    self._where = stage.remote(stage.address(folder))
    self._object = str(self._where / f'{name}.lock')
    self._known: dict[str, Any] = {}  # states of the files at the address
    self._renewed, self._lost = 0.0, ''
    self._busy, self._over = threading.Lock(), threading.Event()

  def take(
    self,
    alive: Callable[[Mapping[str, Any]], bool],
    refusal: Callable[[object, Mapping[str, Any]], ValueError],
  ) -> None:
    """Take the lease.

    Raises:
      ValueError: the `refusal`, if another process renews it. Who is not `alive` on this machine
        is not waited for. Or if the lease is damaged.
    """
    first, since = {}, time.monotonic()
    with stage.reaching(self._object, 'made'):
      while not self._put('create'):
        if not (found := self._read()):  # given back meanwhile
          continue
        if first and found != first:
          raise refusal(self._where, found)
        here = found['boot'] == self._holder['boot']
        if (here and not alive(found)) or time.monotonic() - since > LEASE:
          self._put('overwrite')
          time.sleep(_SETTLE)
          if not self._is_mine(found := self._read()):
            raise refusal(self._where, found)
          return
        if not first:
          print(
            f'{self._object}: of process {found["pid"]} on {found["host"]}: waiting up to '
            f'{LEASE:.0f} s to see whether it lives',
            file=sys.stderr,
          )
        first = found
        time.sleep(RENEW / 10)

  def _put(self, mode: str) -> bool:
    """Put the lease, renewed now; return whether it could be created."""
    began, content = time.monotonic(), json.dumps(self._holder | {'renewed': time.time()})
    try:
      stage.bucket(self._object).pipe_file(self._object, content.encode(), mode=mode)
    except FileExistsError:
      return False
    self._renewed = began
    return True

  def _read(self) -> dict[str, Any]:
    try:
      content = stage.bucket(self._object).cat_file(self._object)
    except FileNotFoundError:
      return {}
    with files.reading(self._object):
      found = json.loads(content)
    files.check(self._object, found, _HOLDER)
    return found

  def _is_mine(self, found: dict[str, Any]) -> bool:
    return found | {'renewed': 0} == self._holder | {'renewed': 0}

  def start(self, known: Mapping[str, Any]) -> None:
    """Renew the lease from now on; `known` are the states of the files at the address."""
    self._known = dict(filter(self._owns, known.items()))
    _leases.append(self)
    threading.Thread(target=self._go_on, daemon=True).start()

  def _owns(self, entry: tuple[str, Any]) -> bool:
    """Return whether a file is this holder's to put: the writer's are all."""
    return self._name == 'writer' or re.split('[./]', entry[0])[0] == self._name

  def _go_on(self) -> None:
    while not self._over.wait(RENEW):
      # The next `push` raises one too, in the thread that writes.
      with contextlib.suppress(OSError, ValueError):
        self._renew()
        self.push()

  def _renew(self) -> None:
    with self._busy, stage.reaching(self._object, 'renewed'):
      if self._over.is_set():
        return
      if self._is_mine(found := self._read()):
        self._put('overwrite')
      else:
        who = f'process {found["pid"]} on {found["host"]}' if found else 'a process that has ended'
        self._lost = f'{self._where}: was taken over by {who}'

  def push(self) -> None:
    """Put the files that have changed, each whole, the config first and the result last.

    Raises:
      OSError: if that fails, or the lease was lost.
    """
    with self._busy:
      if self._lost or time.monotonic() - self._renewed > LEASE:
        raise OSError(self._lost or f'{self._object}: was not renewed for {LEASE:.0f} s')
      now = dict(filter(self._owns, stage.states(self.folder).items()))
      changed = [name for name, state in now.items() if self._known.get(name) != state]
      for name in sorted(changed, key=lambda n: (n == 'result.json', n != 'config.json', n)):
        with stage.reaching(self._where / name, 'written'):
          self._put_file(name, now[name])
      for name in self._known.keys() - now.keys():
        with stage.reaching(self._where / name, 'removed'), contextlib.suppress(FileNotFoundError):
          stage.bucket(self._object).rm_file(str(self._where / name))
        del self._known[name]

  def _put_file(self, name: str, state: Any) -> None:
    try:
      content = (self.folder / name).read_bytes()
    except FileNotFoundError:  # removed meanwhile
      return
    stage.bucket(self._object).pipe_file(str(self._where / name), content)
    self._known[name] = state

  def drop(self) -> None:
    """Give the lease back, if it is still this process's; it ends by itself where that fails."""
    self._over.set()
    if self in _leases:
      _leases.remove(self)
    gone = contextlib.suppress(OSError, ValueError)  # ValueError: damaged, and so another's
    with self._busy, gone, stage.reaching(self._object, 'removed'):
      if self._is_mine(self._read()):
        stage.bucket(self._object).rm_file(self._object)
