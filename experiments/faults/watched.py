"""Run a command of slm; note its batches, count its writes, and end it at one of them if asked.

    python -m experiments.faults.watched FOLDER NOTES WRITE SIGNAL -m slm.train --config=...

A write is anything by which Python changes a path below FOLDER: opening a file to write, renaming,
removing, making a directory. Before write number WRITE (0: none) the process sends itself SIGNAL.
Below NOTES, writes.PID gets their number at the end, `sent` appears when the signal is sent, and
batches.PROCESS.jsonl gets a line for every batch: {'step', 'process', 'groups': their hashes}.
"""

import atexit
import hashlib
import json
import os
import runpy
import sys
import threading
from pathlib import Path
from typing import Any

_CHANGES = ('os.rename', 'os.remove', 'os.rmdir', 'os.mkdir', 'os.link', 'os.symlink')


class Writes:
  """An audit hook that counts writes below a folder, and sends a signal before one of them."""

  def __init__(self, folder: str, notes: Path, write: int, number: int):
    self._folder, self._notes, self._at, self._number = folder, notes, write, number
    self._lock, self.count = threading.Lock(), 0

  def __call__(self, event: str, args: tuple[Any, ...]) -> None:
    """Take an event of the interpreter; see the table of audit events in Python's manual."""
    if event == 'open':
      path, _, flags = args
      if not flags & (os.O_WRONLY | os.O_RDWR):
        return
    elif event in _CHANGES:
      path = args[0]
    else:
      return
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path).startswith(self._folder):
      return
    with self._lock:
      self.count += 1
      now = self.count == self._at
    if now:
      (self._notes / 'sent').touch()
      os.kill(os.getpid(), self._number)


def note_batches(notes: Path) -> None:
  """Append a line to a file for every batch that training takes."""
  import jax
  import numpy as np

  from slm.data import loader

  take = loader.Loader.__next__

  def noted(self: loader.Loader) -> loader.Batch:
    step, batch, hashes = self.get_state(), take(self), []
    for group in range(batch['condition'].shape[1]):
      parts = (np.ascontiguousarray(x[:, group]).tobytes() for _, x in sorted(batch.items()))
      hashes.append(hashlib.sha256(b''.join(parts)).hexdigest()[:16])
    line = {'step': step, 'process': jax.process_index(), 'groups': hashes}
    with (notes / f'batches.{jax.process_index()}.jsonl').open('a') as f:
      f.write(json.dumps(line) + '\n')
    return batch

  loader.Loader.__next__ = noted


def main() -> None:
  """Read the command line and become the command."""
  folder, notes, write, number, _, module, *flags = sys.argv[1:]
  writes = Writes(folder + os.sep, Path(notes), int(write), int(number))
  if module == 'slm.train':
    note_batches(Path(notes))
  sys.addaudithook(writes)
  count = Path(notes) / f'writes.{os.getpid()}'
  atexit.register(lambda: count.write_text(str(writes.count)))
  sys.argv = [module, *flags]
  runpy.run_module(module, run_name='__main__', alter_sys=True)


if __name__ == '__main__':
  main()
