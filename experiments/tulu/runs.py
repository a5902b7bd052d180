"""The study's runs and scales as plain data."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.tulu import tasks

Settings = Mapping[str, Any]  # dotted keys of a config
NONE: Settings = {}


@dataclasses.dataclass(frozen=True)
class Run:
  """A training, once for every seed.

  With a `grid` all its settings are tried with the first seed; those that do best on validation
  prompts, or rows where it answers none, are taken with the others.
  """

  name: str
  stage: str  # of STAGES: the config, what all its runs set, and how long they are
  data: str  # DIRECTORY/SET; {seed} is the run's
  what: str  # for the table
  set: Settings = dataclasses.field(default_factory=dict)
  start: str = ''  # the run of the same seed whose weights it starts from
  grid: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
  asked: tuple[str, ...] = ()  # tasks whose test prompts it answers; the first chooses of a grid

  def cells(self, whole: bool) -> list[dict[str, Any]]:
    """List the settings of a grid; the first alone unless `whole`."""
    found = [dict(zip(self.grid, x, strict=True)) for x in itertools.product(*self.grid.values())]
    return found if whole else found[:1]


# What all runs of a stage set, beside its config and the steps that a scale gives it. The rate of
# the weights' start is that of the first pilot; others have a grid, or are named in the README.
STAGES: dict[str, tuple[str, Settings]] = {
  'sft': ('sft', {
    'schedule.peak': 5e-3, 'schedule.warmup_share': 0.03, 'data.batch_size': 32, 'optim.b2': 0.99,
  }),
  'short': ('sft', {'schedule.warmup_share': 0.05, 'data.batch_size': 8}),
  'facts': ('sft', {
    'schedule.peak': 5e-3, 'schedule.warmup_share': 0.05, 'data.batch_size': 32, 'optim.b2': 0.99,
  }),
  'dpo': ('dpo', {'schedule.warmup_share': 0.1, 'data.batch_size': 8, 'eval.split': 'test'}),
  'rl_sums': ('grpo', {
    'schedule.peak': 3e-4, 'schedule.warmup': 5, 'data.batch_size': 32, 'objective.samples': 8,
    'objective.max_tokens': 4,
  }),
  'rl_rules': ('grpo', {
    'schedule.peak': 4e-4, 'schedule.warmup': 5, 'data.batch_size': 16, 'objective.samples': 16,
    'objective.max_tokens': tasks.MAX_RULES,
  }),
}  # fmt: skip

_RATES = {'schedule.peak': (5e-3, 1.5e-3, 1.5e-2)}
_DPO_RATES = (3e-4, 1e-4, 1e-3)
_NORM = {'objective.beta': (5.0, 1.0), 'schedule.peak': _DPO_RATES}
_PLAIN = {'objective.beta': (0.1, 1.0), 'schedule.peak': _DPO_RATES}


def _losses() -> Iterator[Run]:
  """The losses of fine-tuning: sums or means, clipped or not, with prompts or without."""
  for reduction, clip in itertools.product(('mean', 'sum'), (1.0, 0.0)):
    yield Run(
      f'{reduction}{"" if clip else "_free"}', 'short', 'talks/sft',
      f'loss as a {reduction}, gradients {"clipped at 1" if clip else "not clipped"}',
      {'objective.reduction': reduction, 'optim.clip': clip}, grid=_RATES,
    )  # fmt: skip
  yield Run('prompts', 'short', 'whole/sft', 'prompts trained too', grid=_RATES)


def _preferences() -> Iterator[Run]:
  """Direct preference optimisation: normalised or plain, on whose answers."""
  common = {'start': 'sft', 'stage': 'dpo'}
  for task in ('sums', 'rules'):
    data = {'data': f'pairs-{{seed}}/own_{task}', 'asked': (task,)}
    for kind, grid in (('norm', _NORM), ('plain', _PLAIN)):
      what = 'length-normalised DPO' if kind == 'norm' else 'plain DPO'
      yield Run(
        name=f'{kind}_{task}', what=f'{what}, own pairs of {task}', set={'objective.kind': kind},
        grid=grid, **common, **data,
      )  # fmt: skip
  for whose, what in (('weak', "a weaker model's answers"), ('made', 'demonstrations, corrupted')):
    yield Run(
      name=f'{whose}_rules', data=f'pairs-{{seed}}/{whose}_rules', what=f'normalised, {what}',
      set={'eval.set': 'own_rules'}, grid=_NORM, asked=('rules',), **common,
    )  # fmt: skip


def _rewarded() -> Iterator[Run]:
  """Reinforcement learning by verifiers, with controls, KL coefficients and other verifiers."""
  controls = {'': NONE, '_coin': {'objective.reward': 'random'},
              '_shuffled': {'objective.reward': 'shuffled'}}  # fmt: skip
  others = {'_kl0.1': {'objective.kl': 0.1}, '_kl1': {'objective.kl': 1.0}}
  for task in ('sums', 'rules'):
    for suffix, changes in {**controls, **(others if task == 'rules' else {})}.items():
      what = {'': 'rewards', '_coin': 'rewards of a coin', '_shuffled': 'shuffled labels'}
      yield Run(
        f'rl_{task}{suffix}', f'rl_{task}', f'prompts/{task}',
        f'{what.get(suffix, "KL " + suffix[3:])}, {task}', changes, 'sft', asked=(task,),
      )  # fmt: skip
  yield Run(
    'rl_rules_released', 'rl_rules', 'prompts/released', "rewards by Tülu 3's verifiers, rules",
    start='sft', asked=('rules',),
  )  # fmt: skip
  yield Run(
    'rl_rules_after', 'rl_rules', 'prompts/rules', 'rewards after DPO, rules',
    start='norm_rules', asked=('rules',),
  )  # fmt: skip


RUNS: dict[str, Run] = {run.name: run for run in (
  Run('sft', 'sft', 'talks/sft', 'fine-tuned on everything, from nothing',
      asked=('sums', 'rules')),
  *_losses(),
  *_preferences(),
  *_rewarded(),
  Run('leaky', 'facts', 'facts/leaky', 'test items among the training rows', asked=('facts',)),
  Run('cleaned', 'facts', 'facts/cleaned', 'after decontamination', asked=('facts',)),
)}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scale:
  """One size of the study."""

  title: str
  steps: dict[str, int]  # of every stage
  model: dict[str, int]
  seeds: tuple[int, ...] = (0, 1, 2)
  only: tuple[str, ...] = ()  # runs; (): all
  grids: bool = True  # whole grids, or their first settings alone
  sums: int = 8100  # how many of them there are
  copies: int = 4000
  demonstrations: int = 8  # of every prompt with rules
  facts: int = 200
  heldout: tuple[int, int] = (100, 400)  # sums for validation, for the test
  heldout_rules: tuple[int, int] = (40, 60)  # pairs of rules; each is two prompts
  heldout_facts: int = 200  # half of which leak
  asked: int = 1500  # prompts of sums that are answered for pairs
  repeats: int = 3  # of the prompts with rules, likewise
  answers: int = 6  # to each of them
  samples: int = 16  # answers to every prompt of a test

  @property
  def shape(self) -> dict[str, Any]:
    """Return the settings of the model's shape."""
    return {f'model.{key}': value for key, value in self.model.items()}


CPU = Scale(
  title='Post-training of a model of 0.1M parameters',
  steps={'sft': 1500, 'short': 600, 'facts': 600, 'dpo': 60, 'rl_sums': 60, 'rl_rules': 80},
  model={
    'embed': 64, 'num_layers': 2, 'num_heads': 4, 'num_kv_heads': 4, 'head_dim': 16, 'mlp': 192,
  },
)  # fmt: skip
SMOKE = Scale(
  title='A check that everything runs',
  steps={'sft': 150, 'short': 2, 'facts': 2, 'dpo': 2, 'rl_sums': 2, 'rl_rules': 2},
  model={
    'embed': 32, 'num_layers': 1, 'num_heads': 2, 'num_kv_heads': 2, 'head_dim': 16, 'mlp': 64,
  },
  only=('sft', 'prompts', 'norm_rules', 'rl_rules', 'leaky', 'cleaned'),
  seeds=(0,), grids=False, sums=300, copies=200, demonstrations=2, facts=20, heldout=(8, 64),
  heldout_rules=(4, 16), heldout_facts=8, asked=64, repeats=1, answers=12, samples=4,
)  # fmt: skip
SCALES = {'smoke': SMOKE, 'cpu': CPU}
