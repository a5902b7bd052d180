"""Processes for work that may not end: each call has seconds, after which its process is killed.

No signal handler and no timer of the interpreter is used: calls may come from any thread, and what
never returns from C code ends as well. Processes are kept and used again.
"""

import atexit
import collections
import json
import os
import subprocess
import sys
import threading
import time
from typing import Any

SECONDS = 5.0  # of one call
_START = 120.0  # seconds in which a process has to import what a call needs
SIZE = os.cpu_count() or 1

counts: collections.Counter[str] = collections.Counter()  # of calls, and of those without answer
_idle: list[subprocess.Popen] = []
_lock = threading.Lock()
_slots = threading.BoundedSemaphore(SIZE)


class Undecided(Exception):
  """Raised where a call has no answer: it took too long, or all memory, or its process died."""


class _DiedError(Exception):
  """Raised where the process of a call ended before its time was over."""


def call(task: str, *args: Any, seconds: float = 0.0) -> Any:
  """Return what `worker.TASKS[task]` returns for arguments that JSON can hold.

  A process that dies is replaced once: what ended it may have been meant for another, or it may
  have died while it waited, and neither may decide a reward.

  Raises:
    Undecided: if there is no answer within `seconds` (0: SECONDS); its process is killed.
    ValueError: if a library is not installed, or the task takes no such arguments.
  """
  seconds = seconds or SECONDS
  with _slots:
    with _lock:
      process = _idle.pop() if _idle else None
      counts['calls'] += 1
    if process is None or process.poll() is not None:
      process = _start()
    try:
      answer = _keep(process, task, args, seconds)
    except _DiedError:
      try:
        answer = _keep(_start(), task, args, seconds)
      except _DiedError:
        raise _undecided(task, 'its process died') from None
  if 'undecided' in answer:
    raise _undecided(task, answer['undecided'])
  if 'error' in answer:
    raise ValueError(answer['error'])
  return answer['value']


def close() -> None:
  """End the processes that wait for calls; a later call starts others."""
  with _lock:
    while _idle:
      _end(_idle.pop())


atexit.register(close)


def _start() -> subprocess.Popen:
  path = os.pathsep.join(p for p in sys.path if p)
  return subprocess.Popen(
    [sys.executable, '-m', 'slm.inference.verifiers.worker'], stdin=subprocess.PIPE,
    stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, 'PYTHONPATH': path},
    text=True, encoding='ascii',
  )  # fmt: skip


def _keep(process: subprocess.Popen, task: str, args: tuple[Any, ...], seconds: float) -> Any:
  """Return the answer of a process, which is then kept for the next call, or ended."""
  try:
    answer = _ask(process, task, args, seconds)
  except BaseException:
    _end(process)
    raise
  with _lock:
    _idle.append(process)
  return answer


def _ask(process: subprocess.Popen, task: str, args: tuple[Any, ...], seconds: float) -> Any:
  try:
    process.stdin.write(json.dumps([task, seconds, *args]) + '\n')
    process.stdin.flush()
  except OSError:  # it died while it waited
    raise _DiedError from None
  _line(process, task, _START)
  return json.loads(_line(process, task, seconds))


def _line(process: subprocess.Popen, task: str, seconds: float) -> str:
  """Read a line of a process, which is killed after `seconds`."""
  began, timer = time.monotonic(), threading.Timer(seconds, process.kill)
  timer.start()
  line = process.stdout.readline()
  timer.cancel()
  if not line.endswith('\n'):
    if time.monotonic() - began < seconds:
      raise _DiedError
    raise _undecided(task, f'no answer in {seconds:g} s')
  return line


def _undecided(task: str, why: str) -> Undecided:
  with _lock:
    counts['undecided'] += 1
  return Undecided(f'{task}: {why}')


def _end(process: subprocess.Popen) -> None:
  process.kill()
  process.wait()
  process.stdin.close()
  process.stdout.close()
