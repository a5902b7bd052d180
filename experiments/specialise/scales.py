"""The study's scales as plain data: what is prepared, how large the models are, how long they run.

Pretraining budgets are equal in FLOPs: every generic model gets what the SLM's steps cost, so the
LLM sees fewer tokens and an expert of the mixture sees a cluster's share.
"""

import dataclasses
from typing import Any

from experiments.specialise.methods import EVERY, MAIN


@dataclasses.dataclass(frozen=True)
class Scale:
  """One size of the study."""

  title: str
  sources: dict[str, Any]  # set -> source, or {split: glob below the corpus directory}
  prepare: dict[str, Any]  # overrides of configs/data.py
  domains: tuple[str, ...]
  sizes: tuple[int, ...]  # nested specialisation sets, tokens
  small: dict[str, int]  # the served model
  large: dict[str, int]  # about 6 x its parameters
  steps: int  # of the SLM's pretraining
  batch_size: int
  peak: float  # learning rate of the small models' pretraining; fine-tuning uses it too
  large_peak: float  # of the large model's
  clusters: int  # experts of the mixture and the projected network
  selection_level: int  # clusters for importance sampling
  finetune_steps: tuple[int, ...]  # at most, one per size
  finetune_batch: int
  finetune_rate: float = 1.0  # peak of fine-tuning, as a share of the pretraining's
  finetune_evals: int = 15  # evaluations for early stopping, if it runs to its cap
  schedule: str = 'cosine'
  mixture_clusters: int = 0  # experts of the mixture, if not as many as of the projected network
  mixture_rows: int = 0  # rows of each expert in a batch; 0: what makes batch_size
  projected_layers: int = 0  # the last ones of the projected network; 0: all
  warmup: int = 0  # steps of pretraining; 0: a twentieth
  methods: tuple[str, ...] = MAIN
  # Methods that the first seed alone runs, on the smallest set; and on the first domain alone where
  # every domain pretrains a model of its own.
  once: tuple[str, ...] = ()
  budgets: tuple[float, ...] = (1,)  # shares of the pretraining after which models are specialised
  budgeted: tuple[str, ...] = ()  # by these methods, and on the smallest set
  eval_splits: tuple[str, ...] = ('test',)
  seeds: tuple[int, ...] = (0,)
  train: dict[str, Any] = dataclasses.field(default_factory=dict)


def _shape(embed: int, num_layers: int, heads: int, mlp: int) -> dict[str, int]:
  return {
    'embed': embed,
    'num_layers': num_layers,
    'num_heads': heads,
    'num_kv_heads': heads,
    'head_dim': embed // heads,
    'mlp': mlp,
  }


# 0.39M and 2.3M parameters at a vocabulary of 2,048: a ratio of 6, half of the SLM in its MLPs.
_SMALL, _LARGE = _shape(64, 4, 2, 256), _shape(192, 4, 6, 576)

QUICK = Scale(
  title='Licence texts from Python documentation',
  sources={'generic': 'python:docs?max_mb=8', 'licences': 'python:licences'},
  prepare={'tokenizer.vocab': 2048, 'context': 128, 'levels': (8, 32), 'fit_windows': 8000},
  domains=('licences',),
  sizes=(20_000, 80_000),
  small=_SMALL,
  large=_LARGE,
  steps=400,
  batch_size=16,
  peak=5e-3,
  large_peak=2.5e-3,
  clusters=8,
  selection_level=32,
  finetune_steps=(100, 300),
  finetune_batch=8,
)

_PLAIN = ('train', 'validation', 'test')
_DOMAIN = (*_PLAIN, 'test_ood')

CPU = Scale(
  title='Biomedical, law and news from general text',
  sources={
    'generic': {s: f'general/{s}.jsonl.gz' for s in _PLAIN},
    **{d: {s: f'{d}/{s}.jsonl.gz' for s in _DOMAIN} for d in ('biomedical', 'law', 'news')},
  },
  prepare={'tokenizer.vocab': 2048, 'context': 256, 'levels': (16, 128), 'fit_windows': 40_000},
  domains=('biomedical', 'law', 'news'),
  sizes=(20_000, 160_000, 1_280_000),
  small=_SMALL,
  large=_LARGE,
  steps=2400,
  batch_size=16,
  peak=5e-3,
  large_peak=2.5e-3,
  clusters=16,
  selection_level=128,
  finetune_steps=(100, 400, 1000),
  finetune_batch=8,
  eval_splits=('test', 'test_ood'),
)

# 99k and 578k parameters, trained for hundreds of tokens per parameter as the paper's are.
LONG = dataclasses.replace(
  CPU,
  title='Biomedical, law and news, trained far past compute-optimal',
  prepare={'tokenizer.vocab': 1024, 'context': 256, 'levels': (16, 64, 256), 'fit_windows': 40_000},
  sizes=(10_000, 80_000, 640_000),
  small=_shape(32, 4, 2, 128),
  large=_shape(96, 4, 3, 288),
  steps=9600,
  peak=1e-2,
  large_peak=5e-3,
  schedule='inverse_sqrt',
  selection_level=256,
  mixture_rows=4,
  finetune_steps=(150, 600, 2400),
  finetune_rate=0.3,
  budgets=(0.125, 0.25, 0.5, 1),
  budgeted=('slm', 'slm_noft', 'importance', 'distill', 'mixture', 'project', 'llm'),
  methods=EVERY,
  once=tuple(m for m in EVERY if m not in MAIN and not m.endswith('_noft')),
  seeds=(0, 1, 2),
)

# 7M and 42M parameters on C4, for one accelerator: as `long`, with text enough for its tokens.
GPU = dataclasses.replace(
  LONG,
  title='Biomedical, law and news from C4',
  sources={**CPU.sources, 'generic': 'tfds:c4/en?split=train'},
  prepare={
    'tokenizer.vocab': 8192, 'context': 512, 'levels': (16, 64, 1024), 'fit_windows': 400_000,
    'heldout': (0.00002, 0.00002), 'near_duplicates': 0.0,
  },
  sizes=(40_000, 320_000, 2_560_000),
  small=_shape(256, 6, 4, 704),
  large=_shape(704, 6, 11, 1888),
  steps=32_000,
  batch_size=128,
  peak=2e-3,
  large_peak=1e-3,
  selection_level=1024,
  mixture_rows=8,
  finetune_steps=(200, 1000, 4000),
  finetune_batch=16,
  train={'dtype': 'bfloat16'},
)  # fmt: skip

# The paper's own: Table 6, Table 8's 100, 200 and 400 GPU-hours, and the seven of its nine Pile
# subsets that a public mirror still holds, as DIR/<subset>/<split>.jsonl.zst. For a pod.
_PILE = ('arxiv', 'europarl', 'freelaw', 'gutenberg', 'pubmed', 'stackexchange', 'wikipedia')
PAPER = dataclasses.replace(
  LONG,
  title='Seven Pile subsets from C4, 121M and 756M parameters',
  sources={
    'generic': 'tfds:c4/en?split=train',
    **{d: {s: f'{d}/{s}*.jsonl.zst' for s in _PLAIN} for d in _PILE},
  },
  prepare={
    'tokenizer.vocab': 32_000, 'context': 1024, 'levels': (16, 32, 64, 1024),
    'fit_windows': 1_000_000, 'heldout': (0.00005, 0.00005),
  },
  domains=_PILE,
  sizes=(1_000_000, 8_000_000, 64_000_000),
  small=_shape(1024, 7, 8, 2736),
  large=_shape(2816, 7, 22, 7504),
  steps=2_780_000,
  batch_size=64,
  peak=1e-4,
  large_peak=1e-4,
  warmup=1000,
  schedule='constant',
  clusters=32,
  mixture_clusters=16,
  mixture_rows=4,
  projected_layers=5,
  selection_level=1024,
  finetune_steps=(2000, 4000, 30_000),
  finetune_rate=1.0,
  budgets=(0.25, 0.5, 1),
  eval_splits=('test',),
  train={
    'dtype': 'bfloat16', 'optim.clip': 5.0, 'optim.weight_decay': 0.0, 'optim.b2': 0.98,
    'mesh.data': -1, 'model.remat': 'dots',
  },
)  # fmt: skip

SCALES = {'quick': QUICK, 'cpu': CPU, 'long': LONG, 'gpu': GPU, 'paper': PAPER}

SMALLER = (
  'Models, corpora and budgets are orders of magnitude smaller than the paper (126M and 771M '
  'parameters, C4 and the Pile, 10 to 650 A100-hours).'
)
NOTES = (
  'TF-IDF + SVD embeddings instead of Sentence-BERT; coarse clusters are k-means over the fine '
  "clusters' centroids, so that levels nest.",
  'Pretraining budgets are equal in FLOPs, not GPU-hours. The mixture shares the budget of one SLM '
  'among its experts; the projected network takes the steps of one, and its projections (3 % more '
  'FLOPs, 8 % with 64 clusters) come on top.',
  'Validation text, used to stop fine-tuning, comes on top of the stated set sizes.',
  'The cluster histogram and the choice of expert use the smallest specialisation set for all '
  'sizes.',
)
