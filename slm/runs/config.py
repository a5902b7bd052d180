"""The config of a run: every key, its default and its meaning.

A config file (configs/) and the command line give some keys as an ml_collections config, which
`resolve` turns into a frozen RunConfig. Models, reparameterisations and data define their own
sections.
"""

import dataclasses
import math
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from slm.base import artifact, schema, stage
from slm.data import copies, loader
from slm.models import Config as ModelConfig
from slm.reparam import Config as ReparamConfig
from slm.reparam.dense import FullConfig
from slm.reparam.projection import CodeConfig, ProjectConfig
from slm.runs import rundir
from slm.weights.sharding import MeshConfig

DTYPES = ('float32', 'bfloat16')
# Keys that do not change what is computed: they may change between restarts.
OPERATIONAL = ('mesh', 'distributed', 'log_every', 'tensorboard', 'writers', 'checkpoint')
# Keys of a model that change how it is computed, not its weights.
COMPUTED = ('attention', 'dispatch', 'remat', 'unroll')


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
  """Several processes, each started with the same command."""

  enable: bool = False
  coordinator: str = ''  # host:port of process 0; '': detected on Slurm, TPU, Kubernetes, MPI
  num_processes: int = 0  # 0: detected likewise
  process_id: int = -1  # -1: detected likewise
  timeout: int = 300  # seconds to wait for the others at the start


class ObjectiveConfig:
  """What every objective's config has."""

  chunk: int  # tokens whose logits exist at once on a device
  name: str
  reduction: str  # of the losses of a step: mean | sum
  counts_to_the_end = False  # whether a step depends on the total number of steps
  kinds = ('', 'conversations')  # of data that it trains on; '': text
  answers = False  # whether it trains on sampled answers to prompts
  updates = 1  # of the optimiser in a step
  value = ''  # run directory of the reward model that a value network starts from


@dataclasses.dataclass(frozen=True)
class NextTokenConfig(ObjectiveConfig):
  """The next-token loss."""

  chunk: int = 512  # tokens whose logits exist at once on a device
  balance: float = 0.0  # weight of the load-balance loss of a model that routes tokens
  z: float = 0.0  # weight of its router's z-loss
  # Of the losses of a step's trained tokens: mean, over all microbatches and devices, or sum, with
  # which a gradient is larger the more of them there are, and so clipped by optim.clip.
  reduction: Literal['mean', 'sum'] = 'mean'
  name: str = 'next_token'


@dataclasses.dataclass(frozen=True)
class DistillConfig(ObjectiveConfig):
  """(1 - mixing) CE + mixing T^2 KL to a teacher."""

  chunk: int = 256  # tokens whose logits, of both models, exist at once on a device
  temperature: float = 1.0
  mixing: float = 0.5
  kl: str = 'forward'  # forward | reverse | jsd | cosine | mse | wsl
  beta: float = 0.5  # of jsd: the teacher's weight in the mixture
  top_k: int = 0  # merge all tokens but the teacher's k best into one; 0: keep every token
  # Match hidden states too: 'embed', or 'TEACHER:STUDENT' layers, such as '-3:-3' (Minitron).
  states: tuple[str, ...] = ()
  on_policy: float = 0.0  # share of steps that train on the student's own text (GKD) ...
  on_policy_from: float = 0.0  # ... after this share of all steps
  on_policy_kl: str = ''  # kl of those steps; '': kl (GKD: jsd)
  prompt: int = 16  # tokens of a row that the student's text continues
  # Above 0 the teacher learns the next token meanwhile, at this share of the learning rate.
  correct: float = 0.0
  balance: float = 0.01  # weight of the load-balance loss of a student that routes tokens
  z: float = 1e-3  # weight of its router's z-loss
  reduction: Literal['mean', 'sum'] = 'mean'  # of the losses of a step's tokens
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
        f'objective.beta={self.beta}: expected more than 0 and less than 1 (the limits are '
        'kl="forward" and kl="reverse")'
      )
    if not 0 <= self.on_policy <= 1 or not 0 <= self.on_policy_from < 1:
      raise ValueError(
        f'objective.on_policy={self.on_policy}, on_policy_from={self.on_policy_from}: expected '
        'shares in 0..1'
      )
    if self.on_policy and (self.mixing < 1 or self.correct):
      raise ValueError(
        f"objective.on_policy={self.on_policy}: needs mixing=1 and correct=0, as the student's own "
        f'text is no target; found mixing={self.mixing}, correct={self.correct}'
      )

  @property
  def own_share(self) -> float:
    """Return the share of all steps that train on the student's own text."""
    return self.on_policy * (1 - self.on_policy_from)

  @property
  def counts_to_the_end(self) -> bool:
    """Return whether own text begins after a share of all steps."""
    return self.on_policy > 0 and self.on_policy_from > 0


@dataclasses.dataclass(frozen=True)
class DpoConfig(ObjectiveConfig):
  """Preference pairs: the chosen answer is to be likelier, next to a reference, than the other."""

  chunk: int = 512  # tokens whose logits exist at once on a device
  # What is compared: norm (log-probabilities per token), plain (their sums), ipo, simpo (per token,
  # no reference).
  kind: Literal['norm', 'plain', 'ipo', 'simpo'] = 'norm'
  beta: float = 0.0  # factor of rewards; 0: that of the kind, norm 5, plain 0.1, ipo 0.1, simpo 2
  gamma: float = 1.0  # of simpo: the margin of rewards that is asked for
  smoothing: float = 0.0  # share of pairs that are taken to be labelled the wrong way round
  reduction: Literal['mean', 'sum'] = 'mean'  # of the losses of a step's pairs
  name: str = 'dpo'
  kinds = ('pairs',)

  def __post_init__(self) -> None:
    if self.beta < 0 or not 0 <= self.smoothing < 0.5:
      raise ValueError(
        f'objective.beta={self.beta}, smoothing={self.smoothing}: expected at least 0, and a share '
        'below 0.5'
      )
    if self.smoothing and self.kind == 'ipo':
      raise ValueError(f'objective.smoothing={self.smoothing}: expected 0 with kind="ipo"')

  @property
  def scale(self) -> float:
    """Return beta, or that of the kind."""
    return self.beta or {'norm': 5.0, 'plain': 0.1, 'ipo': 0.1, 'simpo': 2.0}[self.kind]

  @property
  def has_reference(self) -> bool:
    """Return whether answers are compared with those of the start of the run."""
    return self.kind != 'simpo'


@dataclasses.dataclass(frozen=True)
class RewardConfig(ObjectiveConfig):
  """Preference pairs: a scalar read at an answer's end is to be higher for the chosen one."""

  chunk: int = 512  # tokens whose logits exist at once where the run is evaluated on text
  reduction: Literal['mean', 'sum'] = 'mean'  # of the losses of a step's pairs
  name: str = 'reward'
  kinds = ('pairs',)


@dataclasses.dataclass(frozen=True)
class PolicyConfig(ObjectiveConfig):
  """Policy gradients on sampled and scored answers to prompts: GRPO and its relatives, PPO."""

  chunk: int = 256  # tokens whose logits exist at once on a device
  samples: int = 8  # answers per prompt: a group
  max_tokens: int = 128  # of an answer, its end token included
  temperature: float = 1.0
  # Answers drawn at once on a device, where the next takes the place of one that has ended;
  # 0: all of them, until the longest has ended.
  slots: int = 0
  # What scores answers: the verifiers that the prompts name; or controls that must not help: a
  # seeded coin, or the verifiers with the labels of other prompts.
  reward: Literal['verifiers', 'random', 'shuffled'] = 'verifiers'
  scale: float = 1.0  # factor of what they give
  unended: float = 0.0  # reward of an answer without an end token ...
  score_unended: bool = False  # ... unless it is scored like the others
  # Of an answer: its reward minus the group's mean, divided by the standard deviation (std) or not
  # (center), or minus the mean of the others in the group (loo). Or of each token, by a value
  # network that is trained beside the policy (gae); the next keys are those of gae.
  advantage: Literal['std', 'center', 'loo', 'gae'] = 'std'
  # Run directory of the reward model whose weights and head the value network starts from; '':
  # those of `init`, and a head that is drawn.
  value: str = ''
  gamma: float = 1.0  # discount of a reward that comes a token later
  lam: float = 0.95  # weight of a temporal difference that comes a token later, beside gamma
  # The token whose reward the score is: the end token, or one after it, where the value of the
  # state after the end token is trained too.
  score_at: Literal['end', 'after'] = 'end'
  whiten: int = 0  # answers whose advantages are whitened together; 0: all of a step
  value_clip: float = 0.2  # values are clipped to those at the draw +- value_clip
  value_weight: float = 0.1  # of half the squared errors of values in the loss
  # Of data.batch_size prompts, train on the first so many whose rewards differ; 0: on all.
  keep: int = 0
  epochs: int = 1  # times that a step trains on its answers, each in another order
  minibatches: int = 1  # updates in each, of as many answers
  # 1: the answers of the next step are drawn before the updates of this one, and scored meanwhile.
  stale: int = 0
  # Weigh the advantage of a token by the ratio of its probabilities at the start of the step and in
  # the draw, at most so much, and clip the change since that start; 0: clip that since the draw.
  correction: float = 0.0
  clip_low: float = 0.2  # the ratio of probabilities is clipped to 1 - clip_low ..
  clip_high: float = 0.2  # .. 1 + clip_high
  # A step's losses are divided by the number of its tokens, or summed over each answer divided by
  # its length and then by the number of answers, or by that number times max_tokens; or those of
  # each microbatch by the number of its tokens, and then by the number of microbatches.
  normalise: Literal['tokens', 'sequences', 'constant', 'microbatches'] = 'tokens'
  # Weight of the KL divergence from the weights of `init`: in the loss, with gae in the rewards.
  kl: float = 0.01
  kl_kind: Literal['k1', 'k2', 'k3'] = 'k3'  # its estimator
  reduction: Literal['mean', 'sum'] = 'mean'  # of the losses of a step
  name: str = 'policy'
  kinds = ('prompts',)
  answers = True

  def __post_init__(self) -> None:
    least = 2 - self.has_values
    valid = self.samples >= least and self.max_tokens >= 1 and self.slots >= 0
    if not valid or not 0 < self.temperature < math.inf:
      raise ValueError(
        f'objective: expected samples >= {least}, max_tokens >= 1, slots >= 0 and temperature > 0, '
        f'found samples={self.samples}, max_tokens={self.max_tokens}, slots={self.slots}, '
        f'temperature={self.temperature}'
      )
    if self.stale not in (0, 1) or self.correction < 0:
      raise ValueError(
        'objective: expected stale of 0 or 1 and correction >= 0, found '
        f'stale={self.stale}, correction={self.correction}'
      )
    if min(self.epochs, self.minibatches) < 1:
      raise ValueError(
        'objective: expected epochs >= 1 and minibatches >= 1, found '
        f'epochs={self.epochs}, minibatches={self.minibatches}'
      )
    if min(self.clip_low, self.clip_high) <= 0 or self.clip_low > 1 or min(self.kl, self.keep) < 0:
      raise ValueError(
        'objective: expected clip_low in 0..1, clip_high > 0, kl >= 0 and keep >= 0, found '
        f'clip_low={self.clip_low}, clip_high={self.clip_high}, kl={self.kl}, keep={self.keep}'
      )
    if not self.has_values:
      if self.value:
        raise ValueError(f"objective.value={self.value}: expected advantage='gae'")
      return
    if self.keep:
      raise ValueError(f"objective.keep={self.keep}: expected 0 with advantage='gae'")
    shares = 0 <= self.gamma <= 1 and 0 <= self.lam <= 1
    if not shares or self.value_clip <= 0 or min(self.value_weight, self.whiten) < 0:
      raise ValueError(
        'objective: expected gamma and lam in 0..1, value_clip > 0, value_weight >= 0 and whiten '
        f'>= 0, found gamma={self.gamma}, lam={self.lam}, value_clip={self.value_clip}, '
        f'value_weight={self.value_weight}, whiten={self.whiten}'
      )

  @property
  def has_values(self) -> bool:
    """Return whether a value network is trained beside the policy."""
    return self.advantage == 'gae'

  @property
  def updates(self) -> int:
    """Return the updates of the optimiser in a step, all on the answers drawn at its start."""
    return self.epochs * self.minibatches


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
  """The learning rate by step."""

  name: str = 'cosine'  # constant | cosine | inverse_sqrt | linear | wsd
  peak: float = 2e-3
  warmup: int = 100  # steps
  warmup_share: float = 0.0  # of all steps, which decides warmup; 0: warmup does
  final: float = 0.1  # last rate as a share of the peak (cosine, linear, wsd)
  decay: float = 0.2  # length of the decay as a share of the steps (wsd)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """AdamW."""

  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip: float = 1.0  # maximum global norm of the gradient; 0: unlimited
  # Do not apply a batch whose gradient norm is above this multiple of the median of the latest
  # ones, or is not finite; 0: apply all, and end the run at what is not finite.
  skip_above: float = 0.0

  def __post_init__(self) -> None:
    if self.clip < 0:
      raise ValueError(f'optim.clip: expected a norm, or 0 for none, found {self.clip}')
    if self.skip_above and self.skip_above <= 1:
      raise ValueError(
        f'optim.skip_above: expected a multiple above 1, or 0 for none, found {self.skip_above}'
      )


@dataclasses.dataclass(frozen=True)
class RewindConfig:
  """Going back to an earlier checkpoint when the loss spikes, and on with other batches."""

  steps: int = 0  # go back at least so many; 0: never, and a loss that is not finite ends the run
  # A spike: a loss that is not finite, or above this multiple of its running average; of a policy,
  # whose losses lie around 0, the first alone.
  above: float = 2.0
  most: int = 3  # times in a run; the next spike ends it

  def __post_init__(self) -> None:
    if self.steps < 0 or self.above <= 1 or self.most < 1:
      raise ValueError(
        'rewind: expected steps >= 0, above > 1 and most >= 1, found '
        f'steps={self.steps}, above={self.above}, most={self.most}'
      )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Held-out evaluation during training."""

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
  """Checkpoints to keep, beside the best one if eval.patience is set."""

  every: int = 200  # steps
  keep: int = 1
  milestones: tuple[int, ...] = ()  # steps that are always kept: RUN@STEP
  keep_every: int = 0  # steps whose multiples are always kept too; 0: none


def _derived(default: Any) -> Any:
  """Make a field that is derived from the data or another run, not given."""
  return dataclasses.field(default=default, metadata={'given': False})


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
  """The config of a run; its last fields are derived from the data and from other runs."""

  seed: int = 0
  phase: str = 'pretrain'  # of the cost ledger: pretrain | finetune | distill
  steps: int = 1000
  epochs: float = 0.0  # passes over the rows, which decide steps; 0: steps does
  dtype: str = 'float32'  # compute dtype; weights and optimiser state stay float32
  mesh: MeshConfig = MeshConfig()
  distributed: DistributedConfig = DistributedConfig()
  model: ModelConfig
  reparam: ReparamConfig = FullConfig()  # see slm/reparam and the configs of that name
  objective: NextTokenConfig | DistillConfig | DpoConfig | RewardConfig | PolicyConfig = (
    NextTokenConfig()
  )
  teacher: str = ''  # run directory of the distillation teacher
  # Instead of a teacher, or of a reference in memory: its predictions, as slm.signals wrote them.
  teacher_cache: str = ''
  # Run directory whose (dense) weights and shape to start from; '': random, '?': must be named.
  init: str = ''
  data: loader.DataConfig
  schedule: ScheduleConfig = ScheduleConfig()
  optim: OptimConfig = OptimConfig()
  rewind: RewindConfig = RewindConfig()
  eval: EvalConfig = EvalConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  log_every: int = 10  # steps; 0: at evaluations and saves only
  tensorboard: bool = True  # event files in RUN/tb
  # Metrics go there too, while training: wandb | mlflow | trackio, one or several.
  writers: tuple[Literal['wandb', 'mlflow', 'trackio'], ...] = ()

  context: int = _derived(0)  # tokens in a row
  tokenizer: str = _derived('')  # fingerprint
  rows: str = _derived('')  # hash of the training rows
  clustering: str = _derived('')  # hash of the clusters that rows are grouped by
  # Steps of the runs that this one reads when it began: the weights that every restart reads again.
  source_steps: dict[str, int] | None = _derived(None)
  specialist: dict[str, Any] | None = _derived(None)  # its run, cluster and rule of choice
  prune: dict[str, Any] | None = _derived(None)  # what was cut, and how it was scored
  hf: dict[str, Any] | None = _derived(None)  # the imported model of transformers

  def __post_init__(self) -> None:
    if self.dtype not in DTYPES:
      raise ValueError(f'dtype: expected one of {", ".join(DTYPES)}, found {self.dtype!r}')

  @property
  def computed(self) -> dict[str, Any]:
    """Return the keys that decide the result, as plain values: all but operational ones."""
    return {key: x for key, x in schema.plain(self).items() if key not in OPERATIONAL}


def defaults() -> dict[str, Any]:
  """Return the defaults of all keys that may be given."""
  return schema.defaults(RunConfig)


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
  """Return a config as plain values, with the defaults of keys that it or a section lacks."""
  values = defaults() | artifact.plain(config)
  for key, kind in schema.sections(RunConfig, values).items():
    if isinstance(values[key], dict):
      values[key] = schema.defaults(kind) | values[key]
  return values


def read(values: Mapping[str, Any]) -> RunConfig:
  """Make a RunConfig from plain values; missing keys take their defaults."""
  return schema.read(RunConfig, values)


def of(ref: str | Path) -> RunConfig:
  """Read the config of RUN or RUN@STEP; raise ValueError if it is not one of this version."""
  try:
    return read(rundir.read_config(ref))
  except ValueError as e:
    path = rundir.split_ref(ref)[0]
    raise ValueError(str(e) if str(path) in str(e) else f'{path}/config.json: {e}') from None


def resolve(config: Mapping[str, Any]) -> RunConfig:
  """Derive the keys that data and other runs decide, and make paths absolute.

  Data at an address become their copy on this machine.

  Raises:
    ValueError: if a value is impossible or two do not fit together.
  """
  given = complete(config)
  path = given['data']['path']
  if not path:
    raise ValueError('data.path: expected the directory made by slm.data.prepare, found nothing')
  path = copies.local(path)
  manifest = loader.manifest(path)
  vocab = manifest['tokenizer']['vocab']
  inherit(given)
  given['model']['vocab'] = given['model']['vocab'] or vocab
  cfg = read(given)
  if cfg.model.vocab < vocab:
    raise ValueError(f'model.vocab={cfg.model.vocab}: the tokenizer has {vocab} ids')
  check(cfg)
  kind = manifest.get('chat', {}).get('kind', '')
  if kind not in cfg.objective.kinds:
    raise ValueError(
      f'{path}: holds {kind or "text"}, on which objective {cfg.objective.name!r} does not train'
    )
  absolute = lambda name: stage.absolute(name) if name else ''
  d = dataclasses.replace(cfg.data, path=absolute(path))
  held_out = dataclasses.replace(cfg.eval, set=cfg.eval.set or d.set)
  loader.Split(d.path, held_out.set, held_out.split)  # raises before any work if it is missing
  split = loader.Split(d.path, d.set, d.split, d.index)
  rows = split.sha256
  if d.mix_set:
    rows += ' ' + loader.Split(d.path, d.mix_set, 'train', d.mix_index).sha256
  rep = cfg.reparam
  if cfg.init and isinstance(rep, CodeConfig):
    histogram = loader.histogram(d.path, d.set, d.split, rep.of.clusters, d.index)
    rep = dataclasses.replace(rep, histogram=tuple(histogram.tolist()))
  if cfg.objective.value:
    value = absolute(cfg.objective.value)
    cfg = dataclasses.replace(cfg, objective=dataclasses.replace(cfg.objective, value=value))
  return dataclasses.replace(
    _counted(cfg, len(split.ids)),
    **{key: absolute(getattr(cfg, key)) for key in ('init', 'teacher', 'teacher_cache')},
    data=d,
    eval=held_out,
    reparam=rep,
    rows=rows,
    tokenizer=manifest['tokenizer']['fingerprint'],
    context=manifest['context'],
    clustering=loader.clustering(path) if d.level else '',
  )


def _counted(cfg: RunConfig, num_rows: int) -> RunConfig:
  """Derive the steps that `epochs` decides, and the warm-up that its share of them decides."""
  d = cfg.data
  if cfg.epochs and d.level:
    raise ValueError(f'epochs={cfg.epochs}: counts rows that are not grouped: set steps instead')
  steps = cfg.steps
  if cfg.epochs:
    steps = math.ceil(cfg.epochs * num_rows / (d.batch_size * (1 - d.mix_share)))
  schedule = cfg.schedule
  if schedule.warmup_share:
    warmup = math.ceil(schedule.warmup_share * steps)
    schedule = dataclasses.replace(schedule, warmup=min(warmup, steps - 1))
  return dataclasses.replace(cfg, steps=steps, schedule=schedule)


def without_data(config: Mapping[str, Any], context: int = 0) -> RunConfig:
  """Read a config without data; raise ValueError unless it has the vocabulary and the context."""
  given = inherit(complete(config))
  context = given.get('context', context)
  if not (given['model']['vocab'] and context):
    raise ValueError('without data.path: expected --config.model.vocab and --context')
  return dataclasses.replace(read(given), context=context)


def inherit(given: dict[str, Any]) -> dict[str, Any]:
  """Take the model's shape, but not how it is computed, from the run that `init` names.

  Changes `given` and returns it.

  Raises:
    ValueError: if the run to start from must be named, or a tuned code does not start from a
      projected network.
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
    uniform = [1 / network.clusters] * network.clusters  # until the data give the histogram
    given['reparam'] |= {'of': schema.plain(network), 'histogram': uniform}
  return given


def shaped(given: Mapping[str, Any], model: ModelConfig) -> dict[str, Any]:
  """Return a model section with the shape of `model`, computed as `given` says."""
  return schema.plain(model) | {key: given[key] for key in COMPUTED}


def check(cfg: RunConfig) -> None:
  """Raise ValueError if keys of a training run do not fit together."""
  if cfg.steps < 1:
    raise ValueError(f'steps: expected at least 1, found {cfg.steps}')
  if cfg.epochs < 0 or not 0 <= cfg.schedule.warmup_share < 1:
    raise ValueError(
      f'epochs={cfg.epochs}, schedule.warmup_share={cfg.schedule.warmup_share}: expected at least '
      '0, and a share below 1'
    )
  warmup = 0 if cfg.epochs or cfg.schedule.warmup_share else cfg.schedule.warmup
  if not 0 <= warmup < cfg.steps:  # with a share or epochs the steps decide it, and may come later
    raise ValueError(
      f'schedule.warmup={warmup}: expected less than steps={cfg.steps}; lower it, or set '
      'schedule.warmup_share=0.1'
    )
  if cfg.checkpoint.keep < 1:  # Checkpoints opens a directory to read with keep=0
    raise ValueError(f'checkpoint.keep: expected at least 1, found {cfg.checkpoint.keep}')
  if cfg.checkpoint.keep_every < 0:
    raise ValueError(
      f'checkpoint.keep_every: expected steps, or 0 for none, found {cfg.checkpoint.keep_every}'
    )
  reach = (cfg.checkpoint.keep - 1) * cfg.checkpoint.every + 1
  if cfg.rewind.steps > reach and not cfg.checkpoint.keep_every:
    raise ValueError(
      f'rewind.steps={cfg.rewind.steps}: {cfg.checkpoint.keep} checkpoints, one every '
      f'{cfg.checkpoint.every} steps, reach {reach} steps back: raise checkpoint.keep'
    )
  if isinstance(cfg.objective, DpoConfig):
    _check_reference(cfg)
    return
  teachers = [ref for ref in (cfg.teacher, cfg.teacher_cache) if ref]
  distils = isinstance(cfg.objective, DistillConfig)
  if len(teachers) != distils:
    raise ValueError(
      f'teacher and teacher_cache: objective {cfg.objective.name!r} takes '
      f'{"one of them" if distils else "neither"}, found {", ".join(teachers) or "neither"}'
    )


def _check_reference(cfg: RunConfig) -> None:
  """Raise ValueError if a run on pairs lacks its reference, or names one that it does not use."""
  if cfg.teacher:
    raise ValueError(
      f"teacher: objective 'dpo' has none: its reference is the run that init names; found "
      f'{cfg.teacher}'
    )
  if cfg.objective.has_reference and not cfg.init:
    raise ValueError("init: objective 'dpo' needs the run to start from, which is its reference")
  if cfg.teacher_cache and not cfg.objective.has_reference:
    raise ValueError(
      f'teacher_cache: objective.kind={cfg.objective.kind!r} has no reference, found '
      f'{cfg.teacher_cache}'
    )


def derive(parent: RunConfig, phase: str, **changes: Any) -> RunConfig:
  """Return the config of a dense run made from another run's weights without training.

  It has no init, teacher or reparameterisation, and its rows are not grouped. `changes` record what
  it was made from.
  """
  dense = {
    'phase': phase,
    'reparam': FullConfig(),
    'data': dataclasses.replace(parent.data, level=0, order='proportional', rows_per_group=1),
    **dict.fromkeys(('init', 'teacher', 'teacher_cache'), ''),
    **dict.fromkeys(('source_steps', 'specialist', 'prune', 'hf')),
  }
  return dataclasses.replace(parent, **dense | changes)


def check_run(workdir: Path, cfg: RunConfig) -> None:
  """Raise ValueError if a directory holds another run, naming the first difference, or files."""
  record = workdir / 'config.json'
  artifact.check(record, cfg.computed, 'another run', read=lambda path: of(path.parent).computed)


def write_run(workdir: Path, cfg: RunConfig, step: int = 0) -> None:
  """Record a run's config, code and environment from a step on; only process 0 writes."""
  rundir.write_run(workdir, schema.plain(cfg), step)


def section(kind: str, values: Mapping[str, Any]) -> Any:
  """Make one section of a run's config, such as 'reparam', from plain values."""
  return schema.convert(typing.get_type_hints(RunConfig)[kind], values, kind)
