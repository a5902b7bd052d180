"""The study's methods as plain data: what is pretrained, and how a domain's model comes out of it.

A family is one pretraining: on the generic set, shared by all domains, or (with `select`) on rows
chosen for one domain. A method takes its start from a family and fine-tunes it.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Family:
  """One pretraining.

  Attributes:
    config: which file of configs/ it starts from.
    large: whether it trains the large model.
    clusters: how many specialists it holds: a level, 'clusters' for the scale's own, 0 for none.
    set: dotted config keys on top.
    select: how rows are chosen for a domain (a job's `do` and its keys); None is every row.
    init: the family whose weights it starts from.
  """

  config: str = 'pretrain'
  large: bool = False
  clusters: int | str = 0
  set: dict[str, Any] = dataclasses.field(default_factory=dict)
  select: dict[str, Any] | None = None
  init: str = ''


FAMILIES = {
  'slm': Family(),
  'llm': Family(large=True),
  'mixture': Family('mixture', clusters='clusters'),
  'project': Family('project', clusters='clusters'),
  'importance': Family('importance', select={'do': 'importance'}),
}


@dataclasses.dataclass(frozen=True)
class Method:
  """One row of the table.

  Attributes:
    family: where it starts; '' is a random start.
    rule: how the specialist is chosen from a family that holds several (slm.specialise).
    tune: the config of its fine-tuning; '' is none.
    teacher: the method whose fine-tuned model teaches it.
  """

  name: str
  label: str
  describe: str
  family: str
  rule: str = ''
  tune: str = 'finetune'
  teacher: str = ''


METHODS = (
  Method(
    'slm', 'SLM', 'A small model trained on generic text, then fine-tuned on the domain.', 'slm'
  ),
  Method(
    'slm_noft',
    'SLM, no fine-tuning',
    'The same small model before it has seen the domain.',
    'slm',
    tune='',
  ),
  Method(
    'slm_nopt',
    'SLM, no pretraining',
    'The small model trained on the domain text alone.',
    '',
  ),
  Method(
    'importance',
    'SLM-is, importance sampling',
    'A small model trained on generic text resampled to look like the domain, then fine-tuned.',
    'importance',
  ),
  Method(
    'distill',
    'SLM-d, distillation',
    'The small model, fine-tuned to imitate the fine-tuned large model.',
    'slm',
    tune='distill',
    teacher='llm',
  ),
  Method(
    'mixture',
    'SLM-mix, hard mixture',
    'One small model per cluster of generic text; the one nearest the domain is fine-tuned.',
    'mixture',
    rule='frequent',
  ),
  Method(
    'project',
    'SLM-pn, projected network',
    'One large network that projects to a small model per cluster; the nearest is fine-tuned.',
    'project',
    rule='frequent',
  ),
  Method(
    'llm',
    'LLM',
    'A model about six times larger, given the same FLOPs (so fewer tokens), then fine-tuned.',
    'llm',
  ),
)
