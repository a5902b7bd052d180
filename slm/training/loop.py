"""Train any model by any objective: the only train loop."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm import objectives, reparam
from slm.base import console, files
from slm.data import loader
from slm.models.decoder import forward_flops
from slm.objectives import distill, heldout, losses, rollout, setup
from slm.runs import checkpoint, load, processes, rundir
from slm.training import optim
from slm.training.recorder import Recorder
from slm.training.step import State, init_state, make_train_step
from slm.weights import sharding, tree
from slm.weights.axes import Params

DTYPES = ('float32', 'bfloat16')
TEACHERS = ('teacher', 'teacher_cache')


def resolve(config: Mapping[str, Any]) -> dict[str, Any]:
  """Fill in what the data decide (vocabulary, tokenizer, context) and make paths absolute.

  Raises:
    ValueError: if a value is impossible or two do not fit together.
  """
  cfg = json.loads(json.dumps(config))
  if not cfg['data']['path']:
    raise ValueError('data.path: expected the directory made by slm.data.prepare, found nothing')
  load.check_init(cfg)
  if cfg['steps'] < 1:
    raise ValueError(f'steps: expected at least 1, found {cfg["steps"]}')
  if cfg['dtype'] not in DTYPES:
    raise ValueError(f'dtype: expected one of {", ".join(DTYPES)}, found {cfg["dtype"]!r}')
  named, name = [cfg[key] for key in TEACHERS if cfg[key]], cfg['objective']['name']
  if len(named) != (name == 'distill'):
    raise ValueError(
      f'{" and ".join(TEACHERS)}: objective {name!r} takes '
      f'{"one of them" if name == "distill" else "neither"}, found {", ".join(named) or "neither"}'
    )
  for section, key in ((cfg['data'], 'path'), *((cfg, key) for key in ('init', *TEACHERS))):
    section[key] = section[key] and str(Path(section[key]).resolve())
  path = cfg['data']['path']
  manifest = loader.manifest(path)
  vocab = manifest['tokenizer']['vocab']
  cfg['tokenizer'] = manifest['tokenizer']['fingerprint']
  cfg['context'] = manifest['context']
  d = cfg['data']
  cfg['rows'] = loader.Split(path, d['set'], d['split'], d['index']).sha256
  if d['mix_set']:
    cfg['rows'] += ' ' + loader.Split(path, d['mix_set'], 'train', d['mix_index']).sha256
  cfg['clustering'] = loader.clustering(path) if cfg['data']['level'] else ''
  load.inherit(cfg)
  if cfg['init'] and cfg['reparam']['name'] == 'code':
    d, clusters = cfg['data'], cfg['reparam']['of']['clusters']
    found = loader.histogram(path, d['set'], d['split'], clusters, d['index'])
    cfg['reparam']['histogram'] = found.tolist()
  cfg['model']['vocab'] = cfg['model']['vocab'] or vocab
  if cfg['model']['vocab'] < vocab:
    raise ValueError(f'model.vocab={cfg["model"]["vocab"]}: the tokenizer has {vocab} ids')
  cfg['eval']['set'] = cfg['eval']['set'] or cfg['data']['set']
  loader.Split(path, cfg['eval']['set'], cfg['eval']['split'])  # before any work: is it there?
  if cfg['eval']['batch_size'] < 1:
    raise ValueError(f'eval.batch_size: expected at least 1, found {cfg["eval"]["batch_size"]}')
  return cfg


def make_sums(
  objective: Callable, rep: reparam.Reparam, dtype: str
) -> Callable[[Params, Params, dict[str, jax.Array]], losses.Sums]:
  """Make sums(theta, frozen, batch [groups,rows,t]): materialise, cast, apply the objective.

  The objective's student must be reparam.map_groups(rep, forward). Independent models have a loss
  each, so the objective itself is mapped over groups and the sums are per group. Parts trained
  beside theta (see objectives/setup.py) come to the objective among the frozen ones.
  """

  def sums(theta, frozen, batch):
    theta, parts = setup.split(theta)
    frozen = frozen | parts
    rows = {name: x for name, x in batch.items() if name != 'condition'}
    condition = batch['condition'] if rep.clusters else None
    params = tree.cast(rep.materialize(theta, frozen, condition), jnp.dtype(dtype))
    frozen = tree.cast(frozen, jnp.dtype(dtype))
    if rep.independent:
      in_axes = (reparam.group_axes(rep, params), None, 0)
      return sharding.vmap_groups(objective, in_axes)(params, frozen, rows)
    rows = jax.tree.map(lambda x: x.reshape((-1,) + x.shape[2:]), rows)
    return objective(params, frozen, rows)

  return sums


def _check(workdir: Path, cfg: dict[str, Any]) -> bool:
  """Refuse a directory that holds something else; say whether the run there is to be longer.

  It may be if that changes no step which is done.

  Raises:
    ValueError: if it holds another run, or a schedule that depends on where it ends.
  """
  path, done = workdir / 'config.json', checkpoint.saved_steps(workdir / 'checkpoints')
  before = files.read_json(path).get('steps', 0) if path.exists() else cfg['steps']
  longer = done and before < cfg['steps']
  rundir.check_run(workdir, {**cfg, 'steps': before} if longer else cfg)
  if longer:
    old, new = (optim.schedule(cfg['schedule'], steps) for steps in (before, cfg['steps']))
    same = np.array_equal(*(rate(np.arange(done[0])) for rate in (old, new)))
    if not same or cfg['objective'].get('on_policy_from'):
      raise ValueError(
        f'{workdir}: steps was {before}, now {cfg["steps"]}: the {done[0]} steps that are done '
        'would have been others; a schedule that is constant, inverse_sqrt, or wsd before its '
        'decay can be extended (without objective.on_policy_from)'
      )
  return bool(longer)


def train(config: Mapping[str, Any], workdir: str | Path) -> dict[str, Any]:
  """Run or continue a training run; returns what result.json holds.

  Raises:
    ValueError: if the config, the data or the run directory do not fit together, or another
      process is writing the run.
    FloatingPointError: if a loss or gradient is not finite, naming the step and the leaf.
    console.Interrupted: if SIGTERM or SIGINT asked to stop; the state is saved.
  """
  workdir = Path(workdir)
  cfg = processes.together(lambda: resolve(config))
  processes.agree({**cfg, 'workdir': str(workdir)})
  more = processes.together(lambda: _check(workdir, cfg))
  if (workdir / 'result.json').exists() and not more:
    return files.read_json(workdir / 'result.json')
  mesh = sharding.make_mesh(cfg['mesh'])
  with processes.hold(workdir), processes.ending(), jax.set_mesh(mesh):
    processes.together(lambda: _check(workdir, cfg))  # nobody else writes from here on
    if jax.process_index() == 0:
      (workdir / 'result.json').unlink(missing_ok=True)
    return _Run(cfg, workdir, mesh).loop()


class _Run:
  """One run's state between the banner steps of `loop`."""

  def __init__(self, cfg: dict[str, Any], workdir: Path, mesh: jax.sharding.Mesh):
    self.cfg, self.workdir, self.mesh = cfg, workdir, mesh
    self.model, self.reparam = load.build(cfg)
    load.check_groups(cfg, self.reparam, sharding.batch_devices(mesh))
    self.shapes, self.where = load.theta_shardings(self.reparam, mesh)
    taught = setup.prepare(cfg, self.model, mesh)
    self.frozen, self.ancestors = dict(taught.frozen), list(taught.ancestors)
    if self.reparam.base:
      self.frozen['base'] = load.base(cfg, self.reparam, mesh)
    student = reparam.map_groups(self.reparam, taught.forward['student'])
    passes = {**taught.forward, 'student': student}
    self.schedule = optim.schedule(cfg['schedule'], cfg['steps'])
    self.tx = optim.build(cfg['optim'], self.schedule, self.reparam.independent)
    self.parts = taught.parts
    if self.parts:
      if self.reparam.independent:
        raise ValueError(
          f'objective: a teacher or projection is trained with one student, and reparam '
          f'{cfg["reparam"]["name"]!r} holds several'
        )
      self.tx = optim.each(self.tx, {'teacher': float(cfg['objective'].get('correct', 0.0))})

    def step(**other):
      objective = objectives.build({**cfg['objective'], **other}, passes)
      sums = make_sums(objective, self.reparam, cfg['dtype'])
      return make_train_step(sums, self.tx, self.reparam.independent)

    self.steps = {'rows': step()}
    d = cfg['data']
    groups = d['batch_size'] // d['rows_per_group']
    self.batches = self._open_data(groups // d['accum'], taught.look_up)
    share = distill.own_share(cfg['objective'])
    if share:  # of the steps, on the student's own text
      self.rewrite = rollout.make_rewrite(self.model, self.reparam, cfg, mesh)
      kl = cfg['objective'].get('on_policy_kl') or cfg['objective']['kl']
      self.steps['own'] = step(kl=kl)
    positions = d['batch_size'] * cfg['context']
    self.step_flops = positions * (
      (3 + share) * forward_flops(self.model.cfg, cfg['context']) + taught.flops
    ) + 3 * reparam.materialize_flops(self.reparam, self.shapes, groups)
    beside = jax.eval_shape(lambda: self.parts)
    self.shapes = setup.join(self.shapes, beside)
    self.where = setup.join(self.where, sharding.shardings(beside, mesh))
    self.materialize = jax.jit(self.reparam.materialize)
    self.row_losses = heldout.make_row_losses(
      self.model.forward, cfg['dtype'], cfg['objective']['chunk'], mesh
    )

  def _open_data(self, groups: int, look_up: Callable | None) -> loader.Loader:
    """Open the batches of the groups that lie on this process's devices."""
    cfg = self.cfg
    where = sharding.batch_sharding(self.mesh).addressable_devices_indices_map((groups,))
    starts = [s.indices(groups) for (s,) in where.values()]
    start, stop = min(s[0] for s in starts), max(s[1] for s in starts)
    return loader.build(
      loader.DataConfig(seed=cfg['seed'], **cfg['data']),
      tokenizer=cfg['tokenizer'],
      look_up=look_up,
      process_index=start // (stop - start),
      process_count=groups // (stop - start),
    )

  def initial_state(self) -> State:
    """Draw theta, or take the weights of cfg.init, laid out on the mesh."""
    cfg, (where, _) = self.cfg, setup.split(self.where)
    if cfg['init']:
      self.ancestors.insert(0, str(cfg['init']))
    if cfg['init'] and not self.reparam.base:
      start = load.load(cfg['init'], self.mesh, finished=True)
      load.same_tokenizer(start, cfg['tokenizer'])
      if not self.reparam.start:
        raise ValueError(
          f'init: reparam {cfg["reparam"]["name"]!r} cannot start from the weights of another run'
        )
      theta = jax.jit(self.reparam.start, out_shardings=where)(start.params())
    else:
      key = jax.random.fold_in(jax.random.key(cfg['seed']), 0)
      theta = jax.jit(self.reparam.init, out_shardings=where)(key)
    theta, self.parts = setup.join(theta, self.parts), {}  # the state alone holds them now
    return jax.jit(lambda t: init_state(t, self.tx), out_shardings=self.layout)(theta)

  @property
  def layout(self) -> State:
    """Lay optimiser moments out like the weights they belong to, the rest replicated."""
    shapes = jax.eval_shape(lambda t: init_state(t, self.tx), self.shapes)
    replicated = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())

    def like(where, tree):
      structure = jax.tree.structure(where)
      same = lambda x: jax.tree.structure(x) == structure
      return jax.tree.map(lambda x: where if same(x) else replicated, tree, is_leaf=same)

    if setup.split(self.where)[1]:
      moments = {name: like(self.where[name], tree) for name, tree in shapes.opt_state.items()}
    else:
      moments = like(self.where, shapes.opt_state)
    return State(replicated, self.where, moments)

  def restore(self, saved: checkpoint.Checkpoints) -> State:
    """Continue from the newest checkpoint, or start."""
    if saved.latest is None:
      return self.initial_state()
    if self.cfg['init']:
      self.ancestors.insert(0, str(self.cfg['init']))
    shapes = jax.eval_shape(lambda t: init_state(t, self.tx), self.shapes)
    want = checkpoint.abstract(shapes, self.layout)
    theta, rest, next_batch = saved.restore(saved.latest, *_saved(want))
    opt_state, parts = rest if setup.split(want.theta)[1] else (rest, {})
    self.batches.set_state(next_batch)
    self.parts = {}
    step = jax.device_put(jnp.asarray(saved.latest, jnp.int32), self.layout.step)
    return State(step, setup.join(theta, parts), opt_state)

  def evaluate(self, state: State) -> tuple[dict[str, float], float]:
    """Measure the held-out loss, each row under its own cluster's specialist, and the seconds."""
    e, cfg, began = self.cfg['eval'], self.cfg, time.monotonic()
    theta, _ = setup.split(state.theta)
    specialist = lambda c: theta
    if self.reparam.clusters or self.reparam.base:
      condition = lambda c: c if self.reparam.clusters else None
      specialist = lambda c: self.materialize(theta, self.frozen, condition(c))
    values = heldout.rows(
      self.row_losses,
      specialist,
      self.mesh,
      cfg['data']['path'],
      e['set'],
      e['split'],
      e['batch_size'],
      self.reparam.clusters,
      e['max_rows'],
    )
    return heldout.summary(values, 0), time.monotonic() - began

  def global_batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Make global arrays of this process's rows, groups split over the batch axes."""
    where = sharding.batch_sharding(self.mesh, axis=1)
    make = jax.make_array_from_process_local_data
    return jax.tree.map(lambda x: make(where, x), batch)

  def loop(self) -> dict[str, Any]:
    """Train, record, evaluate, save; returns the result."""
    cfg = self.cfg
    due = lambda every: every and step % every == 0
    # A new run is recorded once its first state exists: until then the config may be wrong.
    began = (self.workdir / 'config.json').exists()
    state = None if began else self.initial_state()
    keep = cfg['checkpoint']
    folder, marks = self.workdir / 'checkpoints', keep['milestones']
    with checkpoint.Checkpoints(folder, keep['keep'], marks) as saved:
      state = self.restore(saved) if began else state
      rundir.write_run(self.workdir, cfg, int(state.step))
      start, compiled, stop = int(state.step), {}, False
      with self.recorder(start) as record, checkpoint.StopSignal() as asked:
        for step in range(start + 1, cfg['steps'] + 1):
          if record.exhausted:
            break
          batch = self.global_batch(next(self.batches))
          if not compiled:
            for name, one in self.steps.items():
              jitted = jax.jit(one, donate_argnums=0, out_shardings=(self.layout, None))
              compiled[name] = jitted.lower(state, self.frozen, batch).compile()
          own = 'own' in self.steps and rollout.turn(cfg, step)
          record.dispatch()
          if own:
            batch = self.rewrite(setup.split(state.theta)[0], self.frozen, batch, step)
          state, metrics = compiled['own' if own else 'rows'](state, self.frozen, batch)
          record.dispatched(step, metrics)
          final, stop = step == cfg['steps'], asked(step)
          if due(cfg['eval']['every']) or final:
            record.flush()
            record.evaluated(step, *self.evaluate(state))
          final |= record.exhausted
          best = cfg['eval']['patience'] and record.best_step == step
          if final or stop or best or due(keep['every']) or step in marks:
            record.flush()
            record.write()
            next_batch = self.batches.get_state()
            # A loss makes a checkpoint a candidate for the best, which only early stopping wants.
            loss = record.eval_loss(step) if cfg['eval']['patience'] else None
            saved.save(step, *_saved(state), next_batch, loss)
          if stop and not final:
            break
    if stop and not final:
      raise console.Interrupted(
        f'{self.workdir}: saved step {step}, the same command continues', stop
      )
    result = record.result()
    if jax.process_index() == 0:
      files.write_json(self.workdir / 'result.json', result)
    return result

  def recorder(self, start: int) -> Recorder:
    """Open the metrics and ledger of this run at a step."""
    names = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(self.shapes)]
    return Recorder(
      self.cfg,
      self.workdir,
      start,
      names,
      self.step_flops,
      forward_flops(self.model.cfg, self.cfg['context']),
      self.schedule,
      self.ancestors,
    )


def _saved(state: State) -> tuple[Params, Any]:
  """Return what a checkpoint serves, and what only continuing needs."""
  theta, parts = setup.split(state.theta)
  return theta, ((state.opt_state, parts) if parts else state.opt_state)
