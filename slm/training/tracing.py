"""Traces of some steps of a run, for TensorBoard, XProf and Perfetto."""

import contextlib
import re
from pathlib import Path

import jax

from slm.training.recorder import Recorder


def steps(text: str, total: int) -> range:
  """Return the steps that START:STOP names, both included; none for ''.

  Raises:
    ValueError: if these are not two steps of 1..total, in order.
  """
  if not text:
    return range(0)
  match = re.fullmatch(r'(\d+):(\d+)', text)
  first, last = map(int, match.groups()) if match else (0, 0)
  if not 1 <= first <= last <= total:
    raise ValueError(
      f'--profile={text}: expected START:STOP, the first and the last step to trace of 1 to {total}'
    )
  return range(first, last + 1)


class Trace(contextlib.AbstractContextManager):
  """Traces a range of steps into RUN/profile; process 0 writes, of its own devices."""

  def __init__(self, steps: range, workdir: Path):
    self._steps, self._folder, self._on = steps, workdir / 'profile', False

  def __exit__(self, *_: object) -> None:
    if self._on:
      self._switch()

  def before(self, step: int, record: Recorder) -> None:
    """Start before the first step of the range, and stop before the one after it.

    Every process waits for its steps there, so that all of them raise at the same step.
    """
    if (step in self._steps) != self._on:
      record.flush()  # the devices are idle, and the clock of training stops
      self._switch()

  def _switch(self) -> None:
    self._on = not self._on
    if jax.process_index():
      return
    if self._on:
      jax.profiler.start_trace(self._folder)
    else:
      jax.profiler.stop_trace()
