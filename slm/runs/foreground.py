"""Processes of this machine, run in the foreground: one output, one end, one status."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import TextIO

GRACE = 10.0  # seconds in which the others end by themselves once one has failed
_LINUX = sys.platform == 'linux'
_libc = ctypes.CDLL(None) if _LINUX else None
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def run(commands: Sequence[Sequence[str]]) -> int:
  """Run commands side by side; return the status of the first that fails, 0 if none does.

  Each line of output begins with the number of its process. If one fails the others are ended. A
  signal that is raised here, as console.Interrupted is, stops all with SIGTERM and waits for them.
  On Linux they are killed if this process is. One command alone takes the place of this process.
  """
  if len(commands) == 1:
    os.execvp(commands[0][0], commands[0])
  started, readers = [], []
  try:
    for index, command in enumerate(commands):
      # In sessions of their own: Ctrl-C is for this process, which passes on what saves.
      process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, errors='replace', start_new_session=True,
        preexec_fn=_end_with_parent if _LINUX else None,
      )  # fmt: skip
      started.append(process)
      for source, sink in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
        readers.append(
          threading.Thread(target=_copy, args=(f'[{index}] ', source, sink), daemon=True)
        )
        readers[-1].start()
    return _status(_wait(started))
  except BaseException:
    for process in started:
      process.terminate()
    for process in started:
      process.wait()
    raise
  finally:
    for process in started:
      process.kill()
    for reader in readers:
      reader.join(GRACE)  # a process that one of them left behind keeps its output open


def _end_with_parent() -> None:
  """Let the system kill this process when its parent is killed.

  It would go on without a reader of its output and, where that ends one of several processes, wait
  for ever with the directory held.
  """
  _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait(started: Sequence[subprocess.Popen]) -> int:
  """Wait until all have ended; the first that fails gives the others little time."""
  while running := [p for p in started if p.poll() is None]:
    if failed := next((p.returncode for p in started if p.returncode), 0):
      deadline = time.monotonic() + GRACE
      for process in running:
        try:
          process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
          process.kill()
      return failed
    time.sleep(0.1)
  return next((p.returncode for p in started if p.returncode), 0)


def _status(code: int) -> int:
  """Return an exit status as a shell gives it: 128 + N for a process ended by signal N."""
  return 128 - code if code < 0 else code


def _copy(prefix: str, source: TextIO, sink: TextIO) -> None:
  for line in source:
    sink.write(f'{prefix}{line}')
    sink.flush()
