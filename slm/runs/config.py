"""A run's config: every key of a training run, its default and what it means.

A config file (configs/) and the command line give some of the keys as an ml_collections config;
`resolve` turns it into a frozen RunConfig once, at the door. Models, reparameterisations and data
define their own sections.
"""

import dataclasses
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slm.base import artifact, schema
from slm.data import loader
from slm.models import Config as ModelConfig
from slm.reparam import Config as ReparamConfig
from slm.reparam.dense import FullConfig
from slm.reparam.projection import CodeConfig, ProjectConfig
from slm.runs import rundir

DTYPES = ('float32', 'bfloat16')
# Keys that say where and how often, not what is computed: they may change between restarts.
OPERATIONAL = ('mesh', 'distributed', 'log_every', 'tensorboard', 'checkpoint')
# Keys of a model that say how it is computed, not what it is.
COMPUTED = ('dispatch', 'remat', 'unroll')


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each axis of the mesh; -1: those that are left."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  expert: int = 1


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
  """Several processes: the same command on each."""

  enable: bool = False
  coordinator: str = ''  # host:port of process 0; '': found out on Slurm, TPU, Kubernetes, MPI
  num_processes: int = 0  # 0: found out likewise
  process_id: int = -1  # -1: found out likewise
  timeout: int = 300  # seconds to wait for the others at the start


class ObjectiveConfig:
  """What the loop and the plan ask of any objective."""

  @property
  def own_share(self) -> float:
    """Return the share of all steps that are on the student's own text."""
    return 0.0

  @property
  def counts_to_the_end(self) -> bool:
    """Return whether what a step does depends on how many steps there are."""
    return False


@dataclasses.dataclass(frozen=True)
class NextTokenConfig(ObjectiveConfig):
  """The next-token loss."""

  chunk: int = 512  # tokens whose logits exist at once, on a device
  balance: float = 0.0  # weight of the load-balance loss of a model that routes tokens
  z: float = 0.0  # weight of its router's z-loss
  name: str = 'next_token'


@dataclasses.dataclass(frozen=True)
class DistillConfig(ObjectiveConfig):
  """(1 - mixing) CE + mixing T^2 KL to a teacher."""

  chunk: int = 256  # half of next_token's: two models' logits at once
  temperature: float = 1.0
  mixing: float = 0.5
  kl: str = 'forward'  # forward | reverse | jsd | cosine | mse | wsl
  beta: float = 0.5  # of jsd: towards 1 it weighs what the teacher, towards 0 the student gives
  top_k: int = 0  # tell only the teacher's k best tokens apart from all others; 0: every token
  # Pull states together too: 'embed', or 'TEACHER:STUDENT' layers, such as '-3:-3' (Minitron).
  states: tuple[str, ...] = ()
  on_policy: float = 0.0  # this share of the steps is on the student's own text (GKD) ...
  on_policy_from: float = 0.0  # ... once this share of all steps is done
  on_policy_kl: str = ''  # kl of those steps, if another (GKD: jsd)
  prompt: int = 16  # tokens of a row that it starts from
  # Above 0 the teacher learns the next token meanwhile, at this share of the learning rate.
  correct: float = 0.0
  balance: float = 0.01  # of a student that routes tokens: its load-balance loss ...
  z: float = 1e-3  # ... and its router's z-loss
  name: str = 'distill'

  def __post_init__(self) -> None:
    if not 0 <= self.correct <= 1:
      raise ValueError(
        f'objective.correct={self.correct}: expected a share of the learning rate in 0..1'
      )
    if not 0 <= self.mixing <= 1 or self.temperature <= 0:
      raise ValueError(
        'objective: expected 0 <= mixing <= 1 and temperature > 0, '
        f'found mixing={self.mixing}, temperature={self.temperature}'
      )
    if self.top_k < 0 or self.top_k and self.kl == 'mse':
      raise ValueError(f'objective.top_k={self.top_k}: expected at least 0, and 0 with kl="mse"')
    if not 0 < self.beta < 1:
      raise ValueError(
        f'objective.beta={self.beta}: expected more than 0 and less than 1, where kl="forward" and '
        '"reverse" are the ends'
      )
    if not 0 <= self.on_policy <= 1 or not 0 <= self.on_policy_from < 1:
      raise ValueError(
        f'objective.on_policy={self.on_policy}, on_policy_from={self.on_policy_from}: expected '
        'shares in 0..1'
      )
    if self.on_policy and (self.mixing < 1 or self.correct):
      raise ValueError(
        f'objective.on_policy={self.on_policy}: needs mixing=1 and correct=0, for nobody learns '
        f'the next token of what the student wrote; found mixing={self.mixing}, '
        f'correct={self.correct}'
      )

  @property
  def own_share(self) -> float:
    """Return the share of all steps that are on the student's own text."""
    return self.on_policy * (1 - self.on_policy_from)

  @property
  def counts_to_the_end(self) -> bool:
    """Return whether own text begins after a share of all steps."""
    return self.on_policy > 0 and self.on_policy_from > 0


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
  """The learning rate by step."""

  name: str = 'cosine'  # constant | cosine | inverse_sqrt | wsd
  peak: float = 2e-3
  warmup: int = 100  # steps
  final: float = 0.1  # share of the peak at the last step (cosine, wsd)
  decay: float = 0.2  # share of the steps that decay (wsd)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """AdamW."""

  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip: float = 1.0  # global norm of the gradient; 0: not clipped

  def __post_init__(self) -> None:
    if self.clip < 0:
      raise ValueError(f'optim.clip: expected a norm, or 0 for none, found {self.clip}')


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Held-out losses while training."""

  every: int = 200  # steps; 0: only at the end
  set: str = ''  # '': data.set
  split: str = 'validation'
  max_rows: int = 512  # 0: all
  batch_size: int = 32
  patience: int = 0  # stop after this many evaluations without a better loss; 0: never

  def __post_init__(self) -> None:
    if self.batch_size < 1:
      raise ValueError(f'eval.batch_size: expected at least 1, found {self.batch_size}')


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """What is kept, beside the best by evaluation loss where eval.patience asks for it."""

  every: int = 200  # steps
  keep: int = 1
  milestones: tuple[int, ...] = ()  # steps kept for good: RUN@STEP


def _section(kind: type) -> Any:
  return dataclasses.field(default_factory=kind)


def _known(default: Any) -> Any:
  """Return a field that is found out, not given."""
  return dataclasses.field(default=default, metadata={'given': False})


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
  """All that a run computes; the last fields are found out from the data and from other runs."""

  seed: int = 0
  phase: str = 'pretrain'  # the ledger's name for this run's cost: pretrain | finetune | distill
  steps: int = 1000
  dtype: str = 'float32'  # compute dtype; weights and optimiser state stay float32
  mesh: MeshConfig = _section(MeshConfig)
  distributed: DistributedConfig = _section(DistributedConfig)
  model: ModelConfig
  reparam: ReparamConfig = _section(FullConfig)  # see slm/reparam, and the configs named so
  objective: NextTokenConfig | DistillConfig = _section(NextTokenConfig)
  teacher: str = ''  # run directory of the distillation teacher
  teacher_cache: str = ''  # instead of it: what slm.signals wrote of its predictions
  # Run directory whose (dense) weights, and so shape, to start from; '': random, '?': refused.
  init: str = ''
  data: loader.DataConfig
  schedule: ScheduleConfig = _section(ScheduleConfig)
  optim: OptimConfig = _section(OptimConfig)
  eval: EvalConfig = _section(EvalConfig)
  checkpoint: CheckpointConfig = _section(CheckpointConfig)
  log_every: int = 10  # steps; 0: at evaluations and saves only
  tensorboard: bool = True

  context: int = _known(0)  # tokens in a row
  tokenizer: str = _known('')  # fingerprint
  rows: str = _known('')  # hash of the rows that are trained on
  clustering: str = _known('')  # hash of the clusters that rows are grouped by
  specialist: dict[str, Any] | None = _known(None)  # which of whose, and by which rule
  prune: dict[str, Any] | None = _known(None)  # what was cut, and how it was scored
  hf: dict[str, Any] | None = _known(None)  # the model of transformers that was imported

  def __post_init__(self) -> None:
    if self.dtype not in DTYPES:
      raise ValueError(f'dtype: expected one of {", ".join(DTYPES)}, found {self.dtype!r}')

  @property
  def computed(self) -> dict[str, Any]:
    """Return what decides the result, as plain values: all but operational keys."""
    return {key: x for key, x in schema.plain(self).items() if key not in OPERATIONAL}


def defaults() -> dict[str, Any]:
  """Return every key that may be given, with its default."""
  return schema.defaults(RunConfig)


def read(values: Mapping[str, Any]) -> RunConfig:
  """Make a RunConfig of plain values; keys that are left out have their defaults."""
  return schema.read(RunConfig, values)


def of(ref: str | Path) -> RunConfig:
  """Read the config of RUN or RUN@STEP.

  Raises:
    ValueError: if it is damaged, written by another version, or of a model of transformers.
  """
  try:
    return read(rundir.read_config(ref))
  except ValueError as e:
    path = rundir.split_ref(ref)[0]
    raise ValueError(str(e) if str(path) in str(e) else f'{path}/config.json: {e}') from None


def resolve(config: Mapping[str, Any]) -> RunConfig:
  """Fill in what the data decide (vocabulary, tokenizer, context) and make paths absolute.

  Raises:
    ValueError: if a value is impossible or two do not fit together.
  """
  given = json.loads(json.dumps(config))
  path = given['data']['path']
  if not path:
    raise ValueError('data.path: expected the directory made by slm.data.prepare, found nothing')
  manifest = loader.manifest(path)
  vocab = manifest['tokenizer']['vocab']
  inherit(given)
  given['model']['vocab'] = given['model']['vocab'] or vocab
  cfg = read(given)
  if cfg.model.vocab < vocab:
    raise ValueError(f'model.vocab={cfg.model.vocab}: the tokenizer has {vocab} ids')
  absolute = lambda name: str(Path(name).resolve()) if name else ''
  cfg = dataclasses.replace(
    cfg,
    **{key: absolute(getattr(cfg, key)) for key in ('init', 'teacher', 'teacher_cache')},
    data=dataclasses.replace(cfg.data, path=absolute(path)),
    eval=dataclasses.replace(cfg.eval, set=cfg.eval.set or cfg.data.set),
    tokenizer=manifest['tokenizer']['fingerprint'],
    context=manifest['context'],
    clustering=loader.clustering(path) if cfg.data.level else '',
  )
  check(cfg)
  return _with_rows(cfg)


def _with_rows(cfg: RunConfig) -> RunConfig:
  """Fill in what the rows decide: their hash, and the histogram that a code is tuned from."""
  d = cfg.data
  loader.Split(d.path, cfg.eval.set, cfg.eval.split)  # before any work: is it there?
  rows = loader.Split(d.path, d.set, d.split, d.index).sha256
  if d.mix_set:
    rows += ' ' + loader.Split(d.path, d.mix_set, 'train', d.mix_index).sha256
  if cfg.init and isinstance(cfg.reparam, CodeConfig):
    histogram = loader.histogram(d.path, d.set, d.split, cfg.reparam.of.clusters, d.index)
    tuned = dataclasses.replace(cfg.reparam, histogram=tuple(histogram.tolist()))
    cfg = dataclasses.replace(cfg, reparam=tuned)
  return dataclasses.replace(cfg, rows=rows)


def without_data(config: Mapping[str, Any], context: int = 0) -> RunConfig:
  """Read a config before there are data, of which the vocabulary and the context are given.

  Raises:
    ValueError: if one of them is not.
  """
  given = inherit(json.loads(json.dumps(config)))
  context = given.get('context', context)
  if not (given['model']['vocab'] and context):
    raise ValueError('--dry_run without data.path: expected model.vocab and --context')
  return dataclasses.replace(read(given), context=context)


def inherit(given: dict[str, Any]) -> dict[str, Any]:
  """Take over from the run that `init` names what its weights decide: the model's shape.

  How it is computed stays the config's. Changes `given` and returns it.

  Raises:
    ValueError: if the config leaves open which run to start from, or a tuned code does not start
      from a projected network.
  """
  if given['init'] == '?':
    raise ValueError(
      f'init: phase {given["phase"]!r} starts from the weights of a run: name it with '
      "--config.init=RUN ('' trains random weights)"
    )
  if not given['init']:
    return given
  start = of(given['init'])
  given['model'] = shaped(given['model'], start.model)
  if given['reparam']['name'] == 'code':
    network = start.reparam
    if not isinstance(network, ProjectConfig):
      raise ValueError(f'init: reparam "code" tunes a projected network, found {network.name!r}')
    even = [1 / network.clusters] * network.clusters  # where there are no data to say otherwise
    given['reparam'] |= {'of': schema.plain(network), 'histogram': even}
  return given


def shaped(given: Mapping[str, Any], model: ModelConfig) -> dict[str, Any]:
  """Return the model section of a shape, computed as a given section says."""
  return schema.plain(model) | {key: given[key] for key in COMPUTED}


def check(cfg: RunConfig) -> None:
  """Refuse a training run whose keys do not fit together.

  Raises:
    ValueError: naming them.
  """
  if cfg.steps < 1:
    raise ValueError(f'steps: expected at least 1, found {cfg.steps}')
  teachers = [name for name in (cfg.teacher, cfg.teacher_cache) if name]
  distils = isinstance(cfg.objective, DistillConfig)
  if len(teachers) != distils:
    raise ValueError(
      f'teacher and teacher_cache: objective {cfg.objective.name!r} takes '
      f'{"one of them" if distils else "neither"}, found {", ".join(teachers) or "neither"}'
    )


def derive(parent: RunConfig, phase: str, **changes: Any) -> RunConfig:
  """Return the config of a dense run whose weights another run's became without training.

  It has no start, teacher or reparameterisation, and its data are not grouped; what it was made of
  goes into `changes`.
  """
  dense = {
    'phase': phase,
    'reparam': FullConfig(),
    'data': dataclasses.replace(parent.data, level=0, order='proportional', rows_per_group=1),
    **dict.fromkeys(('init', 'teacher', 'teacher_cache'), ''),
    **dict.fromkeys(('specialist', 'prune', 'hf')),
  }
  return dataclasses.replace(parent, **dense | changes)


def check_run(workdir: Path, cfg: RunConfig) -> None:
  """Refuse a directory that holds something else.

  Raises:
    ValueError: if it holds a run of another config, naming the first difference, or other files.
  """
  record = workdir / 'config.json'
  artifact.check(record, cfg.computed, 'another run', read=lambda path: of(path.parent).computed)


def write_run(workdir: Path, cfg: RunConfig, step: int = 0) -> None:
  """Record what runs and, from which step, with which code and where; process 0 alone writes."""
  rundir.write_run(workdir, schema.plain(cfg), step)


def section(kind: str, values: Mapping[str, Any]) -> Any:
  """Read one section of a run's config, such as 'reparam'."""
  return schema.convert(typing.get_type_hints(RunConfig)[kind], values, kind)
