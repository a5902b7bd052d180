"""The config of a post-training recipe, and the training config of each of its stages."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from slm.base import artifact, schema
from slm.data.settings import TokenizerConfig
from slm.inference.tasks import Task
from slm.runs import config
from slm.runs.config import RunConfig

# The stages in their order, each a run directory: the kind of rows that it is trained on.
STAGES = {
  'sft': 'conversations', 'reward': 'pairs', 'dpo': 'pairs', 'rlvr': 'prompts', 'control': 'prompts'
}  # fmt: skip
KINDS = ('conversations', 'pairs', 'prompts')


@dataclasses.dataclass(frozen=True)
class MadeConfig:
  """A file that is made: `{made}/NAME.jsonl`, and `{made}/NAME_heldout.jsonl` of other rows."""

  # Problems, strings of letters, tasks of reasoning-gym (slm.synthesise), constraints attached to
  # the prompts of a source, or lines of a source in random order.
  kind: Literal['arithmetic', 'formats', 'gym', 'constraints', 'lines'] = 'lines'
  rows: int = 0  # of the first file; of a source, 0 is all that are left
  heldout: int = 0  # rows of the second file; 0: there is none
  seed: int = 0
  tasks: tuple[str, ...] = ()  # kinds of problems, marks or constraints; none: all
  wrong: float = 0.0  # arithmetic, formats: share of the demonstrations that are wrong
  source: str = ''  # constraints, lines: FILE[?KEY=FIELD&...]
  longest: int = 0  # constraints: characters of a prompt, at most; 0: any
  labels: str = 'official'  # constraints: official | official_loose | tulu3_fixed | tulu3_released
  least: int = 1  # constraints: fewest and most of a prompt
  most: int = 3
  dialogues: bool = False  # lines: a prompt of `Human:` and `Assistant:` becomes messages


@dataclasses.dataclass(frozen=True)
class RowsConfig:
  """Rows of one kind: the sources of each split, as slm.data.prepare takes them."""

  train: str = ''
  validation: str = ''
  context: int = 0  # tokens in a row
  too_long: str = 'truncate'  # truncate | drop


@dataclasses.dataclass(frozen=True)
class CleanConfig:
  """Evaluations whose items are dropped from the training files; see slm.data.decontaminate."""

  eval: tuple[str, ...] = ()  # [NAME=]FILE[:FIELD+FIELD]; none: nothing is looked for


@dataclasses.dataclass(frozen=True)
class AnswersConfig:
  """Answers of the SFT run to the prompts of training, of which verifiers make pairs."""

  count: int = 0  # for each prompt; 0: none are drawn
  prompts: str = ''  # '': the training prompts
  max_tokens: int = 64
  temperature: float = 1.0
  batch_size: int = 64


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  """What every stage is evaluated on."""

  prompts: int = 200  # held-out prompts that are answered; 0: none
  samples: int = 8  # answers drawn to each, for pass@k
  max_tokens: int = 64  # of an answer to them
  ended: bool = True  # whether one without an end counts 0
  context: int = 0  # tokens read at a time; 0: as many as in a row of conversations
  batch_size: int = 64
  # Further tasks by name, each the keys of slm.inference.tasks.Task, `file` and what is not usual.
  tasks: dict[str, Any] = dataclasses.field(default_factory=dict)
  text: str = ''  # files of general text, whose loss shows what is forgotten
  text_rows: int = 200  # of it that are evaluated
  examples: int = 6  # prompts whose answers the report shows


@dataclasses.dataclass(frozen=True)
class TuluConfig:
  """A recipe; `sft`, `reward`, `dpo` and `rlvr` are training configs, left out with steps=0.

  In sources and files {corpus}, {made} and {answers} stand for `corpus`, for the directory of what
  is made, and for that of the answers of the SFT run, where pairs.jsonl is.
  """

  # A run directory, or a directory of transformers; '': the random weights of sft.model.
  start: str = ''
  model: dict[str, Any] = dataclasses.field(default_factory=dict)  # shape, for --dry_run
  corpus: str = ''  # a directory
  tokenizer: TokenizerConfig = TokenizerConfig()  # where there is no start
  template: str = ''  # tulu | chatml | llama3; '': the tokenizer's own
  made: dict[str, Any] = dataclasses.field(default_factory=dict)  # by name: MadeConfig
  clean: CleanConfig = CleanConfig()
  conversations: RowsConfig = RowsConfig()
  pairs: RowsConfig = RowsConfig()
  prompts: RowsConfig = RowsConfig()
  sft: dict[str, Any] = dataclasses.field(default_factory=dict)
  reward: dict[str, Any] = dataclasses.field(default_factory=dict)
  answers: AnswersConfig = AnswersConfig()
  dpo: dict[str, Any] = dataclasses.field(default_factory=dict)
  rlvr: dict[str, Any] = dataclasses.field(default_factory=dict)
  control: bool = True  # whether RLVR is repeated with random rewards
  evaluate: EvaluateConfig = EvaluateConfig()

  @property
  def stages(self) -> dict[str, dict[str, Any]]:
    """Return the training configs of the stages that are not left out, in order."""
    found = {name: getattr(self, name) for name in STAGES if name != 'control'}
    kept = {name: c for name, c in found.items() if c and c.get('steps')}
    if self.control and 'rlvr' in kept:
      chance = {'objective': {**kept['rlvr'].get('objective', {}), 'reward': 'random'}}
      kept['control'] = {**kept['rlvr'], **chance}
    return kept

  def rows(self, kind: str) -> RowsConfig:
    """Return the rows of a kind."""
    return getattr(self, kind)

  def parent(self, stage: str) -> str:
    """Return the stage, or 'start', whose weights a stage starts from; '' for random weights."""
    order = [x for x in ('sft', 'dpo', 'rlvr') if x in self.stages]
    if stage in ('reward', 'dpo'):
      before = [x for x in order if x == 'sft']
    elif stage in ('rlvr', 'control'):
      before = [x for x in order if x != 'rlvr']
    else:
      before = []
    return before[-1] if before else 'start' * bool(self.start)

  def tasks(self) -> list[Task]:
    """Return the further tasks of the evaluation."""
    found = self.evaluate.tasks.items()
    return [schema.read(Task, {'name': n, **x}, f'evaluate.tasks.{n}') for n, x in found]

  def files(self) -> dict[str, MadeConfig]:
    """Return what is made, by name."""
    return {n: schema.read(MadeConfig, x, f'made.{n}') for n, x in self.made.items()}


def read(given: Mapping[str, Any]) -> TuluConfig:
  """Read a recipe.

  Raises:
    ValueError: naming a key that is unknown or has a wrong value, or a stage that lacks what it
      needs.
  """
  cfg = schema.read(TuluConfig, artifact.plain(dict(given)))
  cfg.tasks(), cfg.files()
  if not cfg.stages:
    raise ValueError('sft, dpo, rlvr: expected steps of at least one stage, found none')
  for name, section in cfg.stages.items():
    rows = cfg.rows(STAGES[name])
    if rows.context < 1:
      raise ValueError(f'{STAGES[name]}.context: expected at least 1, found {rows.context}')
    if not cfg.parent(name) and name != 'sft':
      raise ValueError(f'start: {name} starts from a model: name one, or set sft.steps')
    objective = config.section('objective', config.complete(section)['objective'])
    if STAGES[name] not in objective.kinds:
      raise ValueError(f'{name}.objective: {objective.name!r} does not train on {STAGES[name]}')
  if cfg.answers.count and 'sft' not in cfg.stages and not cfg.start:
    raise ValueError('answers.count: expected a start or sft.steps, whose answers are drawn')
  return cfg


def training(cfg: TuluConfig, stage: str, init: str, data: str, reward: str) -> dict[str, Any]:
  """Return the training config of a stage that starts from a run and reads a directory.

  A value network starts from the run `reward` ('': there is none) unless the config names another.
  """
  given = config.complete(cfg.stages[stage])
  given['init'] = init
  if reward and given['objective'].get('advantage') == 'gae':
    given['objective']['value'] = given['objective']['value'] or reward
  given['data'] |= {'path': data, 'set': STAGES[stage]}
  return given


def outline(cfg: TuluConfig, stage: str, shape: Mapping[str, Any]) -> RunConfig:
  """Return the training config of a stage from the shape of its model alone."""
  given = config.complete(cfg.stages[stage])
  given |= {'init': '', 'model': {**given['model'], **shape}}
  planned = config.read(given)
  schedule = planned.schedule
  if share := schedule.warmup_share:
    warmup = min(math.ceil(share * planned.steps), planned.steps - 1)
    schedule = dataclasses.replace(schedule, warmup=warmup)
  context = cfg.rows(STAGES[stage]).context
  return dataclasses.replace(planned, init='start', context=context, schedule=schedule)
