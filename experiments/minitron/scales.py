"""The study's scales as plain data: the text, the teacher, the shapes it is cut to, the lengths."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Scale:
  """One size of the study."""

  title: str
  sources: dict[str, Any]  # set -> source, or {split: glob below the corpus directory}
  prepare: dict[str, Any]  # overrides of configs/data.py
  domain: str  # text that the teacher has not seen
  teacher: dict[str, Any]  # its shape
  teacher_steps: int
  teacher_peak: float
  shapes: dict[str, str]  # what is kept, by name
  grid: str  # sizes that the search tries
  steps: int  # of a recovery
  peak: float  # learning rate of every recovery
  scratch_peak: float  # of every training from nothing
  correct_peak: float  # of training a finished teacher on: a tenth, so that it loses nothing
  batch_size: int = 8
  calibration: int = 1024  # rows
  eval_rows: int = 128  # of the validation split, while a run trains
  test_rows: int = 1024  # evenly spaced, of the test split, for every model; 0: all
  align: int = 8  # of widths
  seeds: tuple[int, ...] = (0, 1, 2)
  tasks: tuple[str, ...] = ()  # files below the corpus directory, put to what is served
  train: dict[str, Any] = dataclasses.field(default_factory=dict)


_SPLITS = ('train', 'validation', 'test')
_general = {s: f'general/{s}.jsonl.gz' for s in _SPLITS}

# 0.71M parameters trained on 14.2M tokens, cut to 0.40M and to 0.18M; a recovery is 0.3M tokens,
# about as many a parameter as the ablations of arXiv 2407.14679 have.
CPU = Scale(
  title='Half of a small model, on general text',
  sources={'generic': _general, 'law': {s: f'law/{s}.jsonl.gz' for s in _SPLITS}},
  prepare={'tokenizer.vocab': 1024, 'context': 128, 'levels': (16,), 'fit_windows': 20_000},
  domain='law',
  teacher={
    'embed': 96, 'num_layers': 6, 'num_heads': 4, 'num_kv_heads': 2, 'head_dim': 24, 'mlp': 256,
  },
  teacher_steps=14_000,
  teacher_peak=3e-3,
  shapes={
    'width': 'embed=64,mlp=192',
    'depth': 'layers=3',
    'both': 'layers=4,embed=88,mlp=208',
    'mlp': 'mlp=80',
    'heads': 'heads=2,mlp=112',
    'near': 'embed=80,mlp=224',
    'quarter': 'embed=40,mlp=96',
    'minus_1': 'layers=5',
    'minus_2': 'layers=4',
  },
  grid='embed=96:88:80:72:64,mlp=256:224:192:160,layers=6:5:4',
  steps=320,
  peak=4e-3,  # see the README
  scratch_peak=1.2e-2,
  correct_peak=3e-4,
  tasks=tuple(f'eval/{name}.jsonl.gz' for name in ('arc_easy', 'piqa', 'lambada')),
)  # fmt: skip

# Seconds a row, on text that is on every machine: to see that all of it works.
SMOKE = dataclasses.replace(
  CPU,
  title='A check that everything runs',
  sources={'generic': 'python:docs?max_mb=1', 'law': 'python:licences?max_mb=1'},
  prepare={'tokenizer.name': 'bytes', 'context': 64, 'levels': (4,), 'fit_windows': 500, 'dims': 8},
  teacher_steps=30,
  steps=4,
  calibration=32,
  seeds=(0,),
  tasks=(),
)

# 88M parameters on C4, for one accelerator.
GPU = dataclasses.replace(
  CPU,
  title='Half of an 88M model, on C4',
  sources={**CPU.sources, 'generic': 'tfds:c4/en?split=train'},
  prepare={
    'tokenizer.vocab': 16_384, 'context': 1024, 'levels': (16,), 'fit_windows': 100_000,
    'heldout': (0.00002, 0.00002),
  },
  teacher={
    'embed': 768, 'num_layers': 12, 'num_heads': 12, 'num_kv_heads': 4, 'head_dim': 64, 'mlp': 2048,
  },
  teacher_steps=40_000,
  teacher_peak=1e-3,
  shapes={
    'width': 'embed=512,mlp=1536',
    'depth': 'layers=6',
    'both': 'layers=9,embed=640,mlp=1536',
    'mlp': 'mlp=640',
    'heads': 'heads=4,mlp=960',
    'near': 'embed=640,mlp=1792',
    'quarter': 'embed=320,mlp=896',
    'minus_1': 'layers=10',
    'minus_2': 'layers=8',
  },
  grid='embed=768:704:640:576:512,mlp=2048:1792:1536:1280,layers=12:10:8',
  steps=3000,
  peak=4e-4,
  scratch_peak=1e-3,
  correct_peak=4e-5,
  batch_size=64,
  eval_rows=512,
  test_rows=0,
  align=64,
  train={'dtype': 'bfloat16'},
)  # fmt: skip

SCALES = {'smoke': SMOKE, 'cpu': CPU, 'gpu': GPU}
