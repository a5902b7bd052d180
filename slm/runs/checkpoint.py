"""Every Orbax call: asynchronous saves, restores onto any mesh; and the signal to save and stop."""

import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

policies = ocp.training.preservation_policies


class Checkpoints:
  """The checkpoints of one run; as a context manager it waits for pending saves."""

  def __init__(self, directory: str | Path, keep: int = 0, milestones: Sequence[int] = ()):
    """Keep the latest `keep`, the one with the lowest loss, and the steps that are milestones.

    keep=0 opens them to read only.
    """
    best = policies.BestN(
      get_metric_fn=lambda m: m['loss'], reverse=True, n=1, keep_checkpoints_without_metrics=False
    )
    self._checkpointer = ocp.training.Checkpointer(
      Path(directory).absolute(),
      save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
      preservation_policy=policies.AnyPreservationPolicy(
        [policies.LatestN(n=keep), best, policies.CustomSteps(list(milestones))]
      ),
      # Only the owner may clean up: to a reader, another process's unfinished save looks the same.
      cleanup_tmp_directories=bool(keep),
    )

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *_: object) -> None:
    self._checkpointer.close()

  @property
  def latest(self) -> int | None:
    """Return the newest step saved, None if there is none."""
    metadata = self._checkpointer.latest
    return None if metadata is None else metadata.step

  @property
  def steps(self) -> list[int]:
    """List the steps that are there."""
    return [c.step for c in self._checkpointer.checkpoints]

  @property
  def best(self) -> int | None:
    """Return the step with the lowest loss among those that recorded one, else the latest."""
    scored = [c for c in self._checkpointer.checkpoints if c.metrics]
    return min(scored, key=lambda c: (c.metrics['loss'], -c.step)).step if scored else self.latest

  def save(
    self,
    step: int,
    theta: Any,
    opt_state: Any = None,
    next_batch: int | None = None,
    loss: float | None = None,
  ) -> None:
    """Start an asynchronous save; the state may be donated as soon as this returns."""
    items = {'theta': theta}
    if opt_state is not None:
      items |= {'opt': opt_state, 'data': {'next': np.asarray(next_batch)}}
    metrics = None if loss is None else {'loss': loss}
    self._checkpointer.save_checkpointables_async(step, items, metrics=metrics)

  def restore(self, step: int, theta: Any, opt_state: Any) -> tuple[Any, Any, int]:
    """Return theta, opt_state and the next batch, laid out as the abstract arguments say."""
    abstract = {'theta': theta, 'opt': opt_state, 'data': {'next': np.asarray(0)}}
    items = self._checkpointer.load_checkpointables(step, abstract)
    return items['theta'], items['opt'], int(items['data']['next'])

  def restore_theta(self, step: int, theta: Any) -> Any:
    """Return theta alone, laid out as the abstract argument says."""
    return self._checkpointer.load_checkpointables(step, {'theta': theta})['theta']


def abstract(tree: Any, shardings: Any) -> Any:
  """Describe a tree's shapes, dtypes and shardings."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
  )


class StopSignal:
  """Notes SIGTERM and SIGINT so that the loop can save first; the same answer on every host.

  With several processes JAX's own handler notes SIGTERM, and they agree on the step.
  """

  def __enter__(self) -> 'StopSignal':
    self._asked = False
    self._before = {}
    main_thread = threading.current_thread() is threading.main_thread()
    if main_thread and jax.process_count() == 1:
      for s in (signal.SIGTERM, signal.SIGINT):
        self._before[s] = signal.signal(s, self._note)
    return self

  def __exit__(self, *_: object) -> None:
    for s, handler in self._before.items():
      signal.signal(s, handler)

  def _note(self, *_: object) -> None:
    self._asked = True
    self.__exit__()  # the second signal acts at once

  def __call__(self, step: int) -> bool:
    """Say whether a stop was asked for."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._asked
