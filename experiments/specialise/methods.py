"""The study's methods as plain data: what is pretrained, and how a domain's model comes out of it.

A family is one pretraining: on the generic set, shared by all domains, or on rows chosen for one
domain. A method takes its start from a family and fine-tunes it.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Family:
  """One pretraining.

  Attributes:
    config: which file of configs/ it starts from.
    large: whether it trains the large model.
    clusters: how many specialists it holds: a level, the scale's key that says so, 0 for none.
    rows: rows of one cluster (or histogram) in a batch; 0: the scale's own.
    set: dotted config keys on top.
    mlp: width of the MLP, as a share of the small model's.
    select: how rows are chosen for a domain (a job's `do` and its keys); None is every row.
    mix: the share of rows that are the domain's own.
    init: the family whose weights it starts from, after `init_share` of its steps.
    init_rule: how the specialist is chosen from an `init` that holds several.
    share: how much of the SLM's FLOPs it may take.
  """

  config: str = 'pretrain'
  large: bool = False
  clusters: int | str = 0
  rows: int = 0
  set: dict[str, Any] = dataclasses.field(default_factory=dict)
  mlp: float = 1.0
  select: dict[str, Any] | None = None
  mix: float = 0.0
  init: str = ''
  init_rule: str = ''
  init_share: float = 1.0
  share: float = 1.0

  @property
  def per_domain(self) -> bool:
    """Say whether every domain pays for its own."""
    return bool(self.select or self.mix)


_CAPACITY = {'reparam.capacity': 'clusters', 'reparam.code': 'clusters'}
FAMILIES = {
  'slm': Family(),
  'llm': Family(large=True),
  'mixture': Family('mixture', clusters='mixture_clusters'),
  'project': Family('project', clusters='clusters', set=_CAPACITY),
  'importance': Family('importance', select={'do': 'importance'}),
  # The number of clusters.
  'project_64': Family('project', clusters=64, set=_CAPACITY),
  'importance_16': Family('importance', select={'do': 'importance', 'level': 16}),
  'importance_64': Family('importance', select={'do': 'importance', 'level': 64}),
  # Other ways to choose rows.
  'importance_top': Family('importance', select={'do': 'importance', 'level': 16, 'top': True}),
  'importance_warm': Family(
    'importance', select={'do': 'importance'}, init='slm', init_share=0.5, share=0.125
  ),
  'importance_warm_project': Family(
    'importance', select={'do': 'importance'}, init='project', init_rule='frequent',
    init_share=0.5, share=0.125,
  ),
  'dsir': Family('importance', select={'do': 'dsir', 'share': 0.1}),
  'mixed': Family(mix=0.1),
  # Other ways to hold capacity for many domains.
  'soup': Family('soup', clusters='clusters', rows=4, set={'reparam.experts': 'clusters'}),
  'soup_mlp': Family(
    'soup', clusters='clusters', rows=4,
    set={'reparam.experts': 'clusters', 'reparam.router': 'mlp'},
  ),
  'hyper': Family('hyper', clusters='clusters'),
  'demix': Family('demix', clusters='clusters'),
  'cbtm': Family('mixture', clusters='mixture_clusters', init='slm', init_share=0.5, share=0.5),
  'moe_active': Family('moe', set={'model.num_experts': 16}, mlp=0.5),
  'moe_total': Family('moe', set={'model.num_experts': 16}, mlp=1 / 16),
}  # fmt: skip


def uses_clusters(family: Family) -> bool:
  """Say whether the generic set must be clustered first, which is then part of the cost."""
  return bool(family.clusters) or (family.select or {}).get('do') == 'importance'


@dataclasses.dataclass(frozen=True)
class Method:
  """One row of the table.

  Attributes:
    family: where it starts; '' is a random start.
    rule: how the specialist is chosen from a family that holds several: a rule of slm.specialise,
      'code' for a run of configs/code.py, 'ensemble' for all of them (ensemble.py).
    tune: the config of its fine-tuning; '' is none.
    teacher: the method whose fine-tuned model teaches it.
    group: the table it stands in, beside the plain SLM.
    sweep: the method that it is a variant of, with another number of clusters.
  """

  name: str
  label: str
  describe: str
  family: str
  rule: str = ''
  tune: str = 'finetune'
  teacher: str = ''
  group: str = ''
  sweep: str = ''


_MAIN = (
  Method(
    'slm', 'SLM', 'A small model trained on generic text, then fine-tuned on the domain.', 'slm'
  ),
  Method(
    'slm_noft', 'SLM, no fine-tuning', 'The same small model before it has seen the domain.',
    'slm', tune='',
  ),
  Method(
    'slm_nopt', 'SLM, no pretraining', 'The small model trained on the domain text alone.', '',
  ),
  Method(
    'importance', 'SLM-is, importance sampling',
    'A small model trained on generic text resampled to look like the domain, then fine-tuned.',
    'importance', sweep='importance',
  ),
  Method(
    'distill', 'SLM-d, distillation',
    'The small model, fine-tuned to imitate the fine-tuned large model.',
    'slm', tune='distill', teacher='llm',
  ),
  Method(
    'mixture', 'SLM-mix, hard mixture',
    'One small model per cluster of generic text; the one nearest the domain is fine-tuned.',
    'mixture', 'frequent',
  ),
  Method(
    'project', 'SLM-pn, projected network',
    'One large network that projects to a small model per cluster; the nearest is fine-tuned.',
    'project', 'frequent', sweep='project',
  ),
  Method(
    'llm', 'LLM',
    'A model about six times larger, given the same FLOPs (so fewer tokens), then fine-tuned.',
    'llm',
  ),
)  # fmt: skip

BEFORE, SELECT, SHARE, TUNE = (
  'Before fine-tuning', 'Choosing text', 'Sharing one pretraining', 'Other ways to tune'
)  # fmt: skip
_FURTHER = (
  Method('importance_noft', 'SLM-is, no fine-tuning', 'SLM-is before fine-tuning.', 'importance',
         tune='', group=BEFORE),
  Method('mixture_noft', 'SLM-mix, no fine-tuning', 'The expert before fine-tuning.', 'mixture',
         'frequent', tune='', group=BEFORE),
  Method('mixture_ensemble', 'SLM-mix, ensemble of 2, no fine-tuning', 'The two experts nearest '
         'the text so far answer together; all are served.', 'mixture', 'ensemble', tune='',
         group=BEFORE),
  Method('project_noft', 'SLM-pn, no fine-tuning', 'The projection before fine-tuning.', 'project',
         'frequent', tune='', group=BEFORE),
  Method('llm_noft', 'LLM, no fine-tuning', 'The large model before fine-tuning.', 'llm', tune='',
         group=BEFORE),
  Method('importance_16', 'SLM-is, 16 clusters', 'Importance sampling by few, coarse clusters.',
         'importance_16', group=SELECT, sweep='importance'),
  Method('importance_64', 'SLM-is, 64 clusters', 'Importance sampling by 64 clusters.',
         'importance_64', group=SELECT, sweep='importance'),
  Method('importance_top', 'SLM on the top cluster', 'Pretrained on the most frequent of 16 '
         'clusters alone.', 'importance_top', group=SELECT),
  Method('importance_warm', 'SLM, then SLM-is', 'The SLM at half its pretraining, continued on '
         'resampled text for an eighth of it.', 'importance_warm', group=SELECT),
  Method('importance_warm_project', 'SLM-pn, then SLM-is', 'The same from the projection, at half '
         'the pretraining.', 'importance_warm_project', group=SELECT),
  Method('dsir', 'DSIR', 'Pretrained on the tenth of the rows whose words look most like the '
         "domain's.", 'dsir', group=SELECT),
  Method('mixed', 'SLM, 10 % domain text', 'Generic pretraining in which every tenth row is of the '
         'smallest domain set.', 'mixed', group=SELECT),
  Method('mixture_best', 'SLM-mix, best expert', 'The expert with the lowest loss on the set.',
         'mixture', 'best', group=SHARE),
  Method('mixture_average', 'SLM-mix, averaged', "Experts averaged by the domain's histogram.",
         'mixture', 'histogram', group=SHARE),
  Method('cbtm', 'c-BTM', 'Experts branched from the SLM at half its pretraining.', 'cbtm',
         'frequent', group=SHARE),
  Method('cbtm_average', 'c-BTM, averaged', "Those experts averaged by the domain's histogram.",
         'cbtm', 'histogram', group=SHARE),
  Method('demix', 'DEMix by cluster', 'One MLP per cluster in shared attention: a projected '
         'network without its low-rank sharing.', 'demix', 'frequent', group=SHARE),
  Method('project_best', 'SLM-pn, best cluster', 'The projection with the lowest loss on the set.',
         'project', 'best', group=SHARE),
  Method('project_histogram', 'SLM-pn, histogram', "Projected from the vectors' average by the "
         "domain's histogram.", 'project', 'histogram', group=SHARE),
  Method('project_code', 'SLM-pn, tuned vector', 'The vector is tuned on the set before the '
         'projection.', 'project', 'code', group=SHARE),
  Method('project_64', 'SLM-pn, 64 clusters', 'A projected network with 64 specialists.',
         'project_64', 'frequent', group=SHARE, sweep='project'),
  Method('soup', 'Soup, linear', "Weights as a linear function of the domain's histogram.", 'soup',
         'histogram', group=SHARE),
  Method('soup_mlp', 'Soup, MLP', "Weights as an MLP's function of the domain's histogram.",
         'soup_mlp', 'histogram', group=SHARE),
  Method('hyper', 'SLM-hn, hypernetwork', "Low-rank changes emitted from the cluster's vector.",
         'hyper', 'frequent', group=SHARE),
  Method('moe_active', 'Token-routed, equal active', 'Sixteen experts half as wide, two per token: '
         'more parameters served.', 'moe_active', group=SHARE),
  Method('moe_total', 'Token-routed, equal total', 'Sixteen narrow experts, two per token.',
         'moe_total', group=SHARE),
  Method('lora', 'SLM, LoRA', 'The SLM with rank 8 changes tuned.', 'slm', tune='lora', group=TUNE),
  Method('mask', 'SLM, masked', "Which of the SLM's MLP weights are used is tuned.", 'slm',
         tune='mask', group=TUNE),
  Method('llm_lora', 'LLM, LoRA', 'The LLM with rank 8 changes tuned.', 'llm', tune='lora',
         group=TUNE),
)  # fmt: skip
METHODS = _MAIN + _FURTHER
MAIN = tuple(m.name for m in _MAIN)
EVERY = tuple(m.name for m in METHODS)
