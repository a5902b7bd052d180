"""Train any model by any objective: the only train loop."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm import objectives
from slm.base import console, files, schema, stage
from slm.data import loader
from slm.objectives.losses import Batch
from slm.objectives.setup import Reward
from slm.runs import checkpoint, config, load, processes, rundir
from slm.runs.config import RunConfig
from slm.training import optim, tracing, writers
from slm.training.program import Program, step_flops
from slm.training.recorder import Diverged, Recorder
from slm.training.step import State, trained
from slm.training.tracing import Trace
from slm.weights import sharding


def train(
  given: Mapping[str, Any],
  workdir: str | Path,
  profile: str = '',
  reward: Reward | None = None,
) -> dict[str, Any]:
  """Run or continue a training run; return the contents of result.json.

  `profile` is START:STOP, the steps to trace. `reward` scores answers to prompts.

  Raises:
    ValueError: if the config, the data or the run directory do not fit together, or another
      process is writing the run.
    FloatingPointError: if a loss or gradient is not finite, naming the step and the leaf, or the
      loss spikes, and the run may not go back to an earlier checkpoint.
    console.Interrupted: on SIGTERM or SIGINT, once the state is saved.
  """
  workdir, given = stage.of(workdir), config.complete(given)
  name, main = f'{given["phase"]} {workdir.name}', jax.process_index() == 0
  progress = console.Progress(name, 0, 'tokens', show=main)
  progress.say('reading data')
  processes.together(lambda: stage.fetch(workdir))
  cfg = processes.together(lambda: load.pin(workdir, config.resolve(given)))
  where = stage.named(str(workdir))
  processes.agree({**schema.plain(cfg), 'workdir': where, 'profile': profile})
  trace = Trace(tracing.steps(profile, cfg.steps), workdir)
  longer = processes.together(lambda: _extends(workdir, cfg))
  if (workdir / 'result.json').exists() and not longer:
    return files.read_json(workdir / 'result.json')
  processes.together(lambda: main and writers.check(cfg.writers))
  mesh = sharding.make_mesh(vars(cfg.mesh))
  with processes.hold(workdir), jax.set_mesh(mesh):
    processes.together(lambda: _extends(workdir, cfg))  # again: another run may have held it
    if main:
      (workdir / 'result.json').unlink(missing_ok=True)
    for key, ref in load.sources(cfg).items():
      progress.say(f'loading {key} {ref}')
    return _Run(cfg, workdir, mesh, trace, reward).loop()


def _extends(workdir: Path, cfg: RunConfig) -> bool:
  """Return whether a run extends the one in its directory; raise ValueError if it cannot go on."""
  done = checkpoint.saved_steps(workdir / 'checkpoints')
  before = config.of(workdir) if done and (workdir / 'config.json').exists() else cfg
  if before.steps >= cfg.steps:
    config.check_run(workdir, cfg)
    return False
  config.check_run(workdir, dataclasses.replace(cfg, steps=before.steps))
  rates = [optim.schedule(cfg.schedule, c.steps)(np.arange(done[0])) for c in (before, cfg)]
  if not np.array_equal(*rates) or cfg.objective.counts_to_the_end:
    raise ValueError(
      f'{workdir}: steps was {before.steps}, now {cfg.steps}, on which the {done[0]} completed '
      'steps depend; only schedules constant, inverse_sqrt and, before its decay, wsd can be '
      'extended, with objective.on_policy_from=0'
    )
  return True


class _Run:
  """A run that trains: its model, objective, optimiser, data and compiled steps."""

  def __init__(
    self,
    cfg: RunConfig,
    workdir: Path,
    mesh: jax.sharding.Mesh,
    trace: Trace,
    reward: Reward | None = None,
  ):
    self.cfg, self.workdir, self.mesh, self.trace = cfg, workdir, mesh, trace
    self.model, self.reparam = load.build(cfg)
    load.check_groups(cfg, self.reparam, sharding.batch_devices(mesh))
    self.setup = objectives.setup(cfg, self.model, self.reparam, mesh, reward)
    self.frozen, self.beside = dict(self.setup.frozen), self.setup.beside
    if self.reparam.base:
      self.frozen['base'] = load.base(cfg, self.reparam, mesh)
    self.program = Program(cfg, self.model, self.reparam, self.setup, mesh)
    self.shapes, self.layout = self.program.shapes, self.program.layout
    added = self.setup.flops
    self.step_flops = step_flops(cfg, self.model, self.reparam, self.shapes.theta, added)
    self.batches = self._open_data()
    self.materialize = jax.jit(self.reparam.materialize)
    self.compiled: dict[Any, Any] = {}
    self.passed_over = 0  # batches that no step was taken on
    self.ahead: Any = None  # what was drawn for the next step, if that is done a step ahead

  def _open_data(self) -> loader.Loader:
    """Open the batches of the groups of rows on this process's devices."""
    cfg, (index, count) = self.cfg, processes.local_share(self.mesh)
    return loader.build(
      cfg.data, seed=cfg.seed, tokenizer=cfg.tokenizer, look_up=self.setup.look_up,
      process_index=index, process_count=count,
    )  # fmt: skip

  def initial_state(self) -> State:
    """Draw theta, or start from the weights of cfg.init, laid out on the mesh."""
    cfg = self.cfg
    if cfg.init and not self.reparam.base:
      loaded = load.source(cfg, 'init', self.mesh)
      if not self.reparam.start:
        raise ValueError(
          f'init: reparam {cfg.reparam.name!r} cannot start from the weights of another run'
        )
      make, source = self.reparam.start, loaded.params()
    else:
      make, source = self.reparam.init, jax.random.fold_in(jax.random.key(cfg.seed), 0)
    theta = jax.jit(make, out_shardings=self.layout.theta)(source)
    beside, self.beside = self.beside, {}  # from here on the state holds these weights
    return self.program.init(theta, beside)

  def restore(self, saved: checkpoint.Checkpoints) -> State:
    """Continue from the newest checkpoint, or start."""
    if saved.latest is None:
      return self.initial_state()
    expected = checkpoint.abstract(self.shapes, self.layout)
    theta, beside, opt_state, next_batch, self.ahead = saved.restore(
      saved.latest, expected.theta, expected.beside, expected.opt_state, self.setup.ahead
    )
    if rewound := rundir.rewound_to(self.workdir, saved.latest):
      next_batch, self.ahead = rewound['next'], None  # which may be what the run failed on
    self.batches.set_state(next_batch)
    self.passed_over = next_batch - saved.latest - bool(self.ahead)
    self.beside = {}
    step = jax.device_put(jnp.asarray(saved.latest, jnp.int32), self.layout.step)
    return State(step, theta, beside, opt_state)

  def evaluate(self, state: State) -> tuple[dict[str, dict[str, float]], float]:
    """Run the objective's evaluators; return their values and the seconds."""
    began = time.monotonic()
    specialist = lambda condition: state.theta
    if self.reparam.clusters or self.reparam.base:
      chosen = lambda condition: condition if self.reparam.clusters else None
      specialist = lambda c: self.materialize(state.theta, self.frozen, chosen(c))
    runs = self.setup.evaluators.items()
    values = {name: run(specialist, state.beside) for name, run in runs}
    return values, time.monotonic() - began

  def next_batch(self) -> Batch:
    """Make global arrays of this process's next rows, groups split over the batch axes."""
    return processes.global_rows(next(self.batches), self.mesh, axis=1)

  def drawn(self, state: State, step: int) -> Any:
    """Return what `rewrite` takes for a step: a batch, or what was drawn for it.

    What is drawn a step ahead is scored while the device runs the step before; nothing here waits
    for that.
    """
    setup = self.setup
    if not setup.draw:
      return self.next_batch()
    draw = lambda at: setup.draw(state.theta, self.frozen, self.next_batch(), at, step - 1)
    if not setup.ahead:
      return draw(step)
    now = self.ahead or draw(step)
    self.ahead = draw(step + 1)
    return now

  def batch(self, state: State, step: int, record: Recorder) -> tuple[str, Batch, dict[str, Any]]:
    """Return the kind of the next batch, the batch, and metrics of how it was made."""
    if not (rewrite := self.setup.rewrite):
      batch = self.next_batch()
      record.dispatch()
      return objectives.ROWS, batch, {}
    record.dispatch()
    # Drawing answers waits for the step before anyway, and its time is told apart.
    waits = self.cfg.objective.answers and not self.setup.ahead
    with record.apart('rollout') if waits else contextlib.nullcontext():
      made = rewrite(state.theta, self.frozen | state.beside, self.drawn(state, step), step)
    record.dispatch()
    return made

  def step(self, kind: str, state: State, batch: Batch, record: Recorder) -> tuple[State, Any]:
    """Take a step on a batch; compile for each kind and shape of batch once."""
    shapes, structure = jax.tree.flatten(jax.tree.map(lambda x: (x.shape, x.dtype), batch))
    key = (kind, structure, *shapes)
    if key not in self.compiled:
      with record.apart('compile'):
        traced = self.program.trace(kind, state, self.frozen, batch)
        self.compiled[key] = traced.lower().compile()
      record.dispatch()
    return self.compiled[key](state, self.frozen, batch)

  def loop(self) -> dict[str, Any]:
    """Train to the end, over all rewinds; return the result."""
    while True:
      try:
        return self._train()
      except Diverged as error:
        to = processes.together(lambda e=error: self._earlier(e))
        if to is None:
          raise
        processes.together(lambda e=error, to=to: jax.process_index() or self._rewind(e, to))
        processes.share(self.workdir)

  def _earlier(self, error: Diverged) -> int | None:
    """Return the sound checkpoint to go back to from a failed step; None, and why, if none is."""
    cfg, folder = self.cfg.rewind, self.workdir / 'checkpoints'
    if not cfg.steps:
      return None
    if (count := len(rundir.read_rewinds(self.workdir))) >= cfg.most:
      error.args = (f'{error}; the run has gone back rewind.most={count} times',)
      return None
    # One that the run went back to before is old enough, however soon after it the next step fails.
    old = lambda s: s <= error.step - cfg.steps or rundir.rewound_to(self.workdir, s)
    steps = filter(old, checkpoint.saved_steps(folder))
    sound = next((s for s in steps if not checkpoint.damage(folder / str(s))), None)
    if sound is None:
      error.args = (f'{error}; no checkpoint is rewind.steps={cfg.steps} steps back',)
    return sound

  def _rewind(self, error: Diverged, to: int) -> None:
    """Go back to a checkpoint; the batches up to the failed step's own are passed over.

    PaLM was trained so by hand: back some 100 steps before a spike, and on without the 200 to 500
    batches around it, which did no harm from another state (arXiv 2204.02311, 5.1). A process that
    is killed before the entry is written takes the same steps again and comes back here.
    """
    checkpoint.forget_after(self.workdir / 'checkpoints', to)
    batch, before = error.step + self.passed_over, rundir.read_rewinds(self.workdir)
    entry = {'step': error.step, 'to': to, 'next': batch, 'why': error.why, 'totals': error.totals}
    files.write_json(self.workdir / 'rewinds.json', [*before, entry])
    print(
      f'{error}: going back to step {to}, and on with batch {batch} '
      f'({len(before) + 1} of at most rewind.most={self.cfg.rewind.most} times)',
      file=sys.stderr,
    )

  def _train(self) -> dict[str, Any]:
    """Start or continue; train, record, evaluate, save; return the result."""
    cfg = self.cfg
    # A new run is recorded once its first state exists: until then the config may be wrong.
    continues = (self.workdir / 'config.json').exists()
    state = None if continues else self.initial_state()
    keep = {key: getattr(cfg.checkpoint, key) for key in ('keep', 'milestones', 'keep_every')}
    with checkpoint.Checkpoints(self.workdir / 'checkpoints', **keep) as saved:
      state = self.restore(saved) if continues else state
      start = int(state.step)
      config.write_run(self.workdir, cfg, start)
      with self.recorder(start) as record, self.trace, checkpoint.StopSignal() as stop_signal:
        step, stop = self._steps(start, state, saved, record, stop_signal)
    finished = step == cfg.steps or record.exhausted
    result = record.result() if finished else {}
    if finished and jax.process_index() == 0:
      files.write_json(self.workdir / 'result.json', result)
    if stop:  # also in the last step: what comes after this run is stopped too
      left = 'finished' if finished else f'saved step {step}, the same command continues'
      raise console.Interrupted(f'{self.workdir}: {left}', stop)
    return result

  def _steps(self, start, state, saved, record, stop_signal) -> tuple[int, int]:
    """Take the steps after `start`; return the last, and the signal that stopped it (or 0)."""
    cfg, step, stop = self.cfg, start, 0
    due = lambda every: every and step % every == 0
    for step in range(start + 1, cfg.steps + 1):
      if record.exhausted:
        break
      self.trace.before(step, record)
      with jax.profiler.StepTraceAnnotation('train', step_num=step):
        kind, batch, made = self.batch(state, step, record)
        state, metrics = self.step(kind, state, batch, record)
      record.dispatched(step, metrics | made)
      final, stop = step == cfg.steps, stop_signal(step)
      if due(cfg.eval.every) or final:
        record.flush()
        record.evaluated(step, *self.evaluate(state))
      final |= record.exhausted
      best = cfg.eval.patience and record.best_step == step
      asked = due(cfg.checkpoint.every) or due(cfg.checkpoint.keep_every)
      if final or stop or best or asked or step in cfg.checkpoint.milestones:
        record.flush()
        record.write()
        # A checkpoint with a loss is a candidate for the best, which early stopping alone keeps.
        loss = record.eval_loss(step) if cfg.eval.patience else None
        with record.apart('save'):
          weights = state.theta, state.opt_state, state.beside
          saved.save(step, *weights, self.batches.get_state(), self.ahead, loss)
      if stop:
        break
    return step, stop

  def recorder(self, start: int) -> Recorder:
    """Open the metrics and ledger of this run at a step."""
    cfg, weights = self.cfg, trained(self.shapes.theta, self.shapes.beside)
    names = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(weights)]
    ancestors = [*filter(None, [cfg.init]), *self.setup.ancestors]
    return Recorder(cfg, self.workdir, start, names, self.step_flops, ancestors)
