"""Record a training run as it goes: metrics, writers, progress, the cost ledger."""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from slm.base import console, files
from slm.runs import ledger, rundir
from slm.runs.config import RunConfig
from slm.runs.ledger import phase_entry
from slm.training import optim, writers
from slm.weights.count import forward_flops

_AVERAGE = 0.98  # share of the earlier losses in their running average, at every step
_NO_CURVES = {'nll', 'tokens', 'rows', 'pairs'}  # of a held-out summary

# Totals over all restarts of a run.
TOTALS = (
  'tokens', 'flops', 'seconds', 'device_seconds', 'eval_tokens', 'eval_device_seconds',
  'compile_device_seconds', 'save_device_seconds',
)  # fmt: skip
ANSWERS = ('rollout_tokens', 'rollout_device_seconds')  # of runs that answer prompts


class Diverged(FloatingPointError):
  """A step whose loss or gradient is not finite, or whose loss is a spike."""

  def __init__(self, workdir: Path, step: int, why: str, totals: dict[str, float]):
    super().__init__(f'{workdir}: step {step}: {why}')
    self.step, self.why, self.totals = step, why, totals


class Recorder:
  """Takes each step's metrics while the next step runs; totals survive restarts.

  Every process keeps the same counts, so that all stop together; only process 0 writes.
  """

  def __init__(
    self,
    cfg: RunConfig,
    workdir: Path,
    start: int,
    leaves: list[str],
    step_flops: float,
    ancestors: list[str],
  ):
    """Open the records of a run at a step; lines after it, of a killed process, are dropped."""
    self._cfg, self._workdir, self._leaves = cfg, workdir, leaves
    self._step_flops, self._ancestors = step_flops, ancestors
    self._schedule = optim.schedule(cfg.schedule, cfg.steps)
    lines = [line for line in rundir.read_metrics(workdir) if line['step'] <= start]
    self._main = jax.process_index() == 0
    if self._main:
      text = ''.join(json.dumps(line) + '\n' for line in lines)
      files.write_text(workdir / 'metrics.jsonl', text)
    last = lines[-1] if lines else {}
    rewound = rundir.rewound_to(workdir, start)  # what was thrown away has cost something too
    costs = rewound['totals'] if rewound else last
    names = TOTALS + ANSWERS if cfg.objective.answers else TOTALS
    self._total = {name: costs.get(name, 0) for name in names}
    self._counts = {'skipped': last.get('skipped', 0)} if cfg.optim.skip_above else {}
    if cfg.rewind.steps:
      self._counts['rewinds'] = len(rundir.read_rewinds(workdir))
    self._average = last.get('loss_average')
    self._evals = [(line['step'], line['eval_loss']) for line in lines if 'eval_loss' in line]
    self._pending: list[tuple[int, dict[str, jax.Array]]] = []
    self._clock: float | None = None
    self._line: dict[str, float] = {'step': start}
    self._start = self._written = start
    self._due = False

  def __enter__(self) -> 'Recorder':
    self._file = (self._workdir / 'metrics.jsonl').open('a') if self._main else None
    self._writers = writers.start(self._cfg, self._workdir, self._start) if self._main else []
    self._positions = self._cfg.data.batch_size * self._cfg.context  # of a step
    name, total = f'{self._cfg.phase} {self._workdir.name}', self._cfg.steps * self._positions
    self._progress = console.Progress(name, total, 'tokens', show=self._main).__enter__()
    self._progress.skip(self._start * self._positions)
    self._progress.say('compiling')
    return self

  def __exit__(self, *error: object) -> None:
    self._progress.__exit__(*error)
    if self._due:
      self.write()
    if self._file:
      self._file.close()
    writers.finish(self._writers, failed=error[0] is not None)

  def dispatch(self) -> None:
    """Start the clock of training time if it is stopped."""
    if self._clock is None:
      self._clock = time.monotonic()

  def dispatched(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """Take a step's metrics; read those of the step before, which the device has finished."""
    self._pending.append((step, metrics))
    while len(self._pending) > 1:
      self._finish(*self._pending.pop(0))

  def flush(self) -> None:
    """Wait for the last step and stop the clock."""
    while self._pending:
      self._finish(*self._pending.pop(0))
    self._tick()
    self._clock = None

  @contextlib.contextmanager
  def apart(self, what: str) -> Iterator[None]:
    """Count a block's time as `what`, 'compile', 'save' or 'rollout', and not as training."""
    self.flush()
    began = time.monotonic()
    yield
    seconds = time.monotonic() - began
    self._total[f'{what}_device_seconds'] += seconds * jax.device_count()

  def _tick(self) -> None:
    if self._clock is not None:
      now = time.monotonic()
      self._total['seconds'] += now - self._clock
      self._total['device_seconds'] += (now - self._clock) * jax.device_count()
      self._clock = now

  def _finish(self, step: int, metrics: dict[str, jax.Array]) -> None:
    values = {name: value.item() for name, value in jax.device_get(metrics).items()}
    if self._due:
      self.write()  # the step before, with its evaluation
    before = self._total['seconds']
    self._tick()
    tokens = values.pop('tokens')
    self._total['tokens'] += int(tokens) if math.isfinite(tokens) else 0
    if self._cfg.objective.answers:
      self._total['rollout_tokens'] += int(values.pop('rollout_tokens'))
    self._total['flops'] += self._step_flops
    if why := self._problem(values):
      raise Diverged(self._workdir, step, why, dict(self._total))
    self._line = {
      'step': step,
      **values,
      **self._counts,
      'lr': float(self._schedule(step - 1)),
      'tokens_per_second': tokens / max(self._total['seconds'] - before, 1e-9),
    }
    self._progress.update(self._positions, loss=values['loss'])
    every = self._cfg.log_every
    self._due = bool(every) and step % every == 0

  def _problem(self, values: dict[str, float]) -> str:
    """Say why a step may not stand, '' if it may; takes from `values` what is only for this."""
    bad, in_a_row = int(values.pop('bad_leaf')), values.pop('not_finite', 0)
    loss, cfg = values['loss'], self._cfg.rewind
    skipped = values.get('skipped', 0) > self._counts.get('skipped', 0)
    if skipped:
      self._counts['skipped'] = values['skipped']
    if (bad >= 0 or not math.isfinite(loss)) and not 0 < in_a_row < optim.MOST_NOT_FINITE:
      where = f'gradient of {self._leaves[bad]}' if bad >= 0 else 'loss'
      return f'{where} is not finite (loss {loss})'
    if not cfg.steps or self._cfg.objective.answers:  # the loss of a policy lies around 0
      return ''
    average = loss if self._average is None else self._average
    if not skipped and loss > cfg.above * average:
      return f'loss {loss:.4g} is above rewind.above={cfg.above:g} times its average {average:.4g}'
    if not skipped:
      self._average = _AVERAGE * average + (1 - _AVERAGE) * loss
    values |= {} if self._average is None else {'loss_average': self._average}
    return ''

  def evaluated(
    self, step: int, results: Mapping[str, Mapping[str, float]], seconds: float
  ) -> None:
    """Record the evaluators' values; 'heldout' decides which step is best."""
    self._total['eval_tokens'] += sum(int(values['tokens']) for values in results.values())
    self._total['eval_device_seconds'] += seconds * jax.device_count()
    heldout = results['heldout']
    self._evals.append((step, heldout['loss']))
    curves = heldout.keys() - _NO_CURVES
    self._line |= {'step': step, **{f'eval_{key}': heldout[key] for key in sorted(curves)}}
    for name in results.keys() - {'heldout'}:
      self._line |= {f'eval_{name}_{key}': value for key, value in results[name].items()}
    self._due = True
    self._progress.update(0, loss=self._line['loss'], eval=heldout['loss'])

  def write(self) -> None:
    """Append the latest step's values to metrics.jsonl and the writers; refresh the ledger."""
    if self._line['step'] == self._written:
      return
    self._written, self._due = self._line['step'], False
    if not self._main:
      return
    if not (self._workdir / 'config.json').exists():  # what follows would make it anew, in part
      raise FileNotFoundError(f'{self._workdir}: was removed while it was written')
    values = self._line | self._total | ledger.peak_bytes()
    self._file.write(json.dumps(values) + '\n')
    self._file.flush()
    step = values.pop('step')
    for writer in self._writers:
      writer.log(step, values)
    t = self._total
    training = (t['tokens'], t['flops'], t['device_seconds'])
    flops = forward_flops(self._cfg.model, self._cfg.context) * t['eval_tokens']
    evaluation = (t['eval_tokens'], flops, t['eval_device_seconds'])
    phases = [phase_entry(self._cfg.phase, *training), phase_entry('evaluate', *evaluation)]
    if self._cfg.objective.answers:
      phases.append(self._rollouts())
    ledger.write_ledger(self._workdir, phases, self._ancestors)

  def _rollouts(self) -> dict[str, Any]:
    """Return the ledger's entry of drawing and scoring answers; prompts are not counted."""
    tokens = self._total['rollout_tokens']
    width = self._cfg.context + self._cfg.objective.max_tokens
    flops = forward_flops(self._cfg.model, width) * tokens
    return phase_entry('rollout', tokens, flops, self._total['rollout_device_seconds'])

  @property
  def best_step(self) -> int | None:
    """Return the step of the lowest held-out loss so far, the latest of equals."""
    return min(self._evals, key=lambda e: (e[1], -e[0]))[0] if self._evals else None

  def eval_loss(self, step: int) -> float | None:
    """Return the held-out loss at a step, None if it was not evaluated."""
    return dict(self._evals).get(step)

  @property
  def exhausted(self) -> bool:
    """Return whether the held-out loss has not improved for `eval.patience` evaluations."""
    patience = self._cfg.eval.patience
    since = [step for step, _ in self._evals if step > (self.best_step or 0)]
    return bool(patience) and len(since) >= patience

  def result(self) -> dict[str, Any]:
    """Summarise the run."""
    loss, steps = dict(self._evals), self._line['step']
    return {
      'steps': steps,
      'best_step': self.best_step,
      'best_loss': loss[self.best_step],
      # Of the weights that are served; see load.served_step.
      'loss': loss.get(self.best_step if self._cfg.eval.patience else steps),
      **self._total,
      **self._counts,
    }
