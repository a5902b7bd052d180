"""Checkpoints by Orbax: asynchronous saves, restores onto any mesh, and signals to save and stop.

Once a checkpoint is written it is sealed: its checksums.json holds the size and hash of every file.
A damaged checkpoint is never used.
"""

import concurrent.futures
import contextlib
import itertools
import pathlib
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from slm.base import console, files, lease, stage
from slm.runs import processes, rundir

Path = pathlib.Path
policies = ocp.training.preservation_policies
THETA, BESIDE = 'theta', 'beside'  # items of a checkpoint: what is served, what is trained with it
_SUMS = 'checksums.json'
_METADATA = '_CHECKPOINT_METADATA'  # of Orbax, in every complete checkpoint


class Checkpoints:
  """The checkpoints of a run; leaving its context waits for pending saves."""

  def __init__(
    self,
    directory: str | Path,
    keep: int = 0,
    milestones: Sequence[int] = (),
    keep_every: int = 0,
  ):
    """Keep the latest `keep` checkpoints, the one with the lowest loss, and the milestones.

    Steps that are multiples of `keep_every` are kept too (0: none). keep=0 opens them to read.
    Otherwise damaged ones newer than the newest sound one are moved aside, with a message, and the
    newest is sealed if the process that saved it was killed before it could.

    Raises:
      ValueError: if there are checkpoints and none is sound.
    """
    self._directory = stage.origin(Path(directory).absolute())
    self._run = Path(directory).parent
    if keep:
      processes.together(lambda: jax.process_index() or self._mend())
    best = policies.BestN(
      get_metric_fn=lambda m: m['loss'], reverse=True, n=1, keep_checkpoints_without_metrics=False
    )
    always = [policies.LatestN(n=keep), best, policies.CustomSteps(list(milestones))]
    if keep_every:
      always.append(policies.EveryNSteps(keep_every))
    context = ocp.Context()
    # Replicas share the writing of an array only in parts of at least 1 MB: cutting takes a program
    # per shape and device.
    context.array.saving.min_slice_bytes_for_replica_parallel = 2**20
    with _signals_held():
      self._checkpointer = ocp.training.Checkpointer(
        self._directory,
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
        preservation_policy=policies.AnyPreservationPolicy(always),
        # A reader must not: another process's unfinished save looks like a leftover.
        cleanup_tmp_directories=bool(keep),
        context=context,
      )
    self._sealer = concurrent.futures.ThreadPoolExecutor(1)
    self._sealed = self._sealer.submit(lambda: None)  # the latest save
    self._saving, self._size = 0, 0  # its step and bytes

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
    # What all processes raise together leaves here too; for the rest, closing would wait for the
    # others, which have ended or wait for this one.
    alone = error and not isinstance(error, FloatingPointError)
    if alone and jax.process_count() > 1:
      return
    with self._errors('saved'):
      try:
        self._sealed.result()
      finally:
        self._sealer.shutdown()
        self._checkpointer.close()
    if isinstance(error, FloatingPointError):
      error.args = (f'{error}; {self._intact()}',)

  @property
  def latest(self) -> int | None:
    """Return the newest step, None if there is none."""
    return max(self.steps, default=None)

  @property
  def steps(self) -> list[int]:
    """List the saved steps."""
    return [c.step for c in self._checkpointer.checkpoints]

  @property
  def best(self) -> int | None:
    """Return the step with the lowest recorded loss, else the latest."""
    scored = [c for c in self._checkpointer.checkpoints if c.metrics]
    return min(scored, key=lambda c: (c.metrics['loss'], -c.step)).step if scored else self.latest

  def save(
    self, step: int, theta: Any, opt_state: Any = None, beside: Any = None, batch: int = 0,
    ahead: Any = None, loss: float | None = None,
  ) -> None:  # fmt: skip
    """Start an asynchronous save; the state may be donated as soon as this returns.

    `beside` is what is trained beside theta, `batch` the number of the next batch, and `ahead` what
    was drawn for the next step. A checkpoint with a `loss` may become the best.

    Raises:
      OSError: if this save or the one before it fails, such as for lack of space, naming the newest
        intact step.
    """
    items = {THETA: theta}
    if opt_state is not None:
      items |= {'opt': opt_state, 'data': _data(batch, ahead)}
    if beside:
      items[BESIDE] = beside
    metrics = None if loss is None else {'loss': loss}
    lease.push(self._run)  # a restart needs the metrics of the steps before
    with self._errors('saved'):
      self._sealed.result()
      self._saving, self._size = step, sum(x.nbytes for x in jax.tree.leaves(items))
      saved = self._checkpointer.save_checkpointables_async(step, items, metrics=metrics)
      self._sealed = self._sealer.submit(self._seal, self._directory / str(step), saved)

  def _seal(self, folder: Path, saved: Any) -> None:
    """Wait for a save and write the checksums of its files."""
    saved.result()
    if jax.process_index() == 0:
      _write_sums(folder)

  @contextlib.contextmanager
  def _errors(self, done: str, step: int | None = None) -> Iterator[None]:
    """Turn any error of Orbax into one line that names the checkpoint; hold signals meanwhile."""
    try:
      with _signals_held():
        yield
    except Exception as e:  # noqa: BLE001 (Orbax and tensorstore raise errors of any class)
      if isinstance(_first(e), (console.Interrupted, KeyboardInterrupt)):  # the second signal
        raise _first(e) from None
      step = self._saving if step is None else step
      text = f'{self._directory}: step {step} cannot be {done} ({_first_line(e)})'
      if files.no_space(e):
        size = f'{max(self._size / 1e6, 1):,.0f} MB'
        text = f'no space on {self._directory} while saving step {step} (needs about {size})'
      with stage.reaching(text):
        gone, intact = not self._directory.exists(), self._intact() if done == 'saved' else ''
      if gone:
        raise FileNotFoundError(f'{self._directory}: was removed while it was written') from None
      raise OSError(f'{text}; {intact}' if intact else text) from None

  def _intact(self) -> str:
    """Describe the newest intact step."""
    steps = saved_steps(self._directory)
    for step in steps:
      folder = self._directory / str(step)
      if (folder / _SUMS).exists() and not damage(folder):
        return f'step {step} is intact'
    return f'step {steps[0]} exists, without checksums' if steps else 'there is no checkpoint'

  def _mend(self) -> None:
    """Move damaged checkpoints aside, and seal the newest: Orbax names it when it is complete.

    It removes an outdated one file by file: of one whose removal was cut short the rest goes too.
    """
    self._move_damaged_aside()
    newest, *older = [self._directory / str(step) for step in saved_steps(self._directory)] or [
      None
    ]
    if newest and not (newest / _SUMS).exists():
      _write_sums(newest)
    for folder in older:
      if isinstance(folder, Path) and not (folder / _METADATA).exists():
        shutil.rmtree(folder)

  def _move_damaged_aside(self) -> None:
    steps = saved_steps(self._directory)
    problems = (damage(self._directory / str(step)) for step in steps)
    damaged = dict(zip(steps, itertools.takewhile(bool, problems), strict=False))
    if steps and len(damaged) == len(steps):
      raise ValueError(f'no checkpoint is sound: {"; ".join(damaged.values())}')
    for step, problem in damaged.items():
      aside = self._directory.with_name('damaged') / str(step)
      while aside.exists():
        aside = aside.with_name(f'{aside.name}-again')
      stage.move(self._directory / str(step), aside)
      print(
        f'{problem}: moved to {aside}, going on from step {steps[len(damaged)]}', file=sys.stderr
      )

  def restore(
    self, step: int, theta: Any, beside: Any, opt_state: Any, ahead: Any = None
  ) -> tuple[Any, Any, Any, int, Any]:
    """Return what `save` took but the loss, laid out like the abstract arguments."""
    abstract = {THETA: theta, 'opt': opt_state, 'data': _data(0, ahead)}
    joined = beside and not (self._directory / str(step) / BESIDE).exists()  # by slm 0.2
    if beside:
      abstract |= {'opt': (opt_state, beside)} if joined else {BESIDE: beside}
    with self._errors('read', step):
      items = self._checkpointer.load_checkpointables(step, abstract)
    opt_state, beside = items['opt'] if joined else (items['opt'], items.get(BESIDE, {}))
    return items[THETA], beside, opt_state, int(items['data']['next']), items['data'].get('ahead')

  def restore_item(self, step: int, item: str, abstract: Any) -> Any:
    """Return THETA or BESIDE, laid out like the abstract argument.

    Raises:
      ValueError: if it is damaged.
    """
    processes.together(lambda: jax.process_index() or self._check_item(step, item))
    with self._errors('read', step):
      return self._checkpointer.load_checkpointables(step, {item: abstract})[item]

  def _check_item(self, step: int, item: str) -> None:
    if problem := damage(self._directory / str(step), item):
      steps = (s for s in self.steps if not damage(self._directory / str(s), item))
      sound = ', '.join(f'{self._directory.parent}@{s}' for s in steps)
      raise ValueError(f'{problem}; {"sound: " + sound if sound else "no other step is sound"}')


def _data(batch: int, ahead: Any) -> dict[str, Any]:
  return {'next': np.asarray(batch), **({'ahead': ahead} if ahead else {})}


def saved_steps(directory: Path) -> list[int]:
  """List the steps of a directory, newest first."""
  folder = stage.origin(directory)
  whole = lambda name: isinstance(folder, Path) or (folder / name / stage.COMMIT).exists()
  with stage.reaching(folder):
    names = [path.name for path in folder.glob('*') if path.name.isdecimal()]
    return sorted((int(name) for name in names if whole(name)), reverse=True)


def forget_after(directory: Path, step: int) -> None:
  """Remove the checkpoints after a step; stopped at any moment, it leaves earlier ones whole."""
  directory = stage.origin(directory)
  away = directory.with_name('rewound')
  for later in saved_steps(directory):  # from the newest
    if later > step and not isinstance(directory, Path):
      stage.discard(directory / str(later))
    elif later > step:
      away.mkdir(exist_ok=True)
      (directory / str(later)).rename(away / str(later))
  if isinstance(away, Path):
    shutil.rmtree(away, ignore_errors=True)


def verify(ref: str | Path) -> Iterator[tuple[str, str]]:
  """Yield RUN@STEP of each checkpoint of RUN or RUN@STEP, and what is wrong with its files.

  That is '' if all are as they were written. Reads every byte and changes nothing.

  Raises:
    ValueError: if there is no such checkpoint.
  """
  run, step = rundir.split_ref(ref)
  if not run.exists():
    raise ValueError(f'{run}: no such file or directory')
  steps = saved_steps(run / 'checkpoints')[::-1]
  if not steps:
    raise ValueError(f'{run}: holds no checkpoints, the run has not saved yet')
  if step is not None and step not in steps:
    raise ValueError(f'{run}: has no checkpoint of step {step}, found steps {steps}')
  for saved in steps if step is None else [step]:
    folder, name = stage.origin(run / 'checkpoints' / str(saved)), stage.named(f'{run}@{saved}')
    if (folder / _SUMS).exists():
      yield name, damage(folder)
    else:  # of an earlier version, not finished, or deleted
      yield name, f'{folder}: has no {_SUMS} to compare with'


def _write_sums(folder: Path) -> None:
  sums = {name: files.stamp(folder / name) for name in stage.below(folder)}
  files.write_json(folder / _SUMS, sums)


def damage(folder: Path, item: str = '') -> str:
  """Describe the first damaged file of a checkpoint, or of one item of it; '' if there is none.

  An unsealed checkpoint, of an earlier version of slm or a killed process, counts as sound.
  """
  folder = stage.origin(folder)
  try:
    sums = files.read_json(folder / _SUMS, {str: list})
    names = (n for n in sums if not item or '/' not in n or n.startswith(f'{item}/'))
    with stage.reaching(folder), files.reading(folder / _SUMS):
      return next(filter(None, (files.damage(folder / name, sums[name]) for name in names)), '')
  except FileNotFoundError:
    return ''
  except ValueError as e:
    return str(e)


def _first(error: BaseException) -> BaseException:
  """Return an error's first cause."""
  while error.__cause__ or error.__context__:
    error = error.__cause__ or error.__context__
  return error


def _first_line(error: BaseException) -> str:
  """Return the start of the message of an error's first cause; Orbax adds pages to it."""
  error = _first(error)
  return f'{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}'


def abstract(tree: Any, shardings: Any) -> Any:
  """Return a tree's shapes, dtypes and shardings."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
  )


class _Signals:
  """Records the first SIGTERM or SIGINT; a second one acts at once.

  With several processes JAX's own handler records SIGTERM.
  """

  def __enter__(self) -> Self:
    self.received = 0
    self._before = {}
    main_thread = threading.current_thread() is threading.main_thread()
    if main_thread and jax.process_count() == 1:
      for s in (signal.SIGTERM, signal.SIGINT):
        self._before[s] = signal.signal(s, self._receive)
    return self

  def __exit__(self, *_: object) -> None:
    for s, handler in self._before.items():
      signal.signal(s, handler)

  def _receive(self, number: int, _: object) -> None:
    self.received = number
    self.__exit__()


class StopSignal(_Signals):
  """Records SIGTERM and SIGINT, so that the loop can save before it stops.

  Several processes agree on the step.
  """

  def __call__(self, step: int) -> int:
    """Return the signal received before a step, 0 if there was none."""
    if jax.process_count() > 1:
      return signal.SIGTERM * multihost_utils.reached_preemption_sync_point(step)
    return self.received


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
  """Hold back a signal while Orbax works, whose event loop would make an error of it."""
  with _Signals() as signals:
    yield
  if signals.received:
    signal.raise_signal(signals.received)
