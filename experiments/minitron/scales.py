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
  steps: int  # of a recovery
  peak: float  # learning rate of every recovery
  correct_peak: float  # of training a finished teacher on: a tenth, so that it loses nothing
  batch_size: int = 16
  calibration: int = 512  # rows
  align: int = 8  # of widths
  seeds: tuple[int, ...] = (0, 1, 2)
  tasks: tuple[str, ...] = ()  # files below the corpus directory, put to what is served
  train: dict[str, Any] = dataclasses.field(default_factory=dict)


_SPLITS = ('train', 'validation', 'test')
_general = {s: f'general/{s}.jsonl.gz' for s in _SPLITS}

# 0.91M parameters, cut to 0.5M and to 0.22M; recovered on 1.2M tokens, 2.4 of them a parameter.
CPU = Scale(
  title='Half of a small model, on general text',
  sources={'generic': _general, 'law': {s: f'law/{s}.jsonl.gz' for s in _SPLITS}},
  prepare={'tokenizer.vocab': 1024, 'context': 256, 'levels': (16,), 'fit_windows': 20_000},
  domain='law',
  teacher={
    'embed': 96, 'num_layers': 8, 'num_heads': 6, 'num_kv_heads': 3, 'head_dim': 16, 'mlp': 256,
  },
  teacher_steps=7000,
  teacher_peak=5e-3,
  shapes={
    'width': 'embed=64,mlp=192',
    'depth': 'layers=4',
    'both': 'layers=6,embed=80,mlp=192',
    'mlp': 'mlp=80',
    'heads': 'heads=3,mlp=112',
    'near': 'embed=80,mlp=224',
    'quarter': 'embed=40,mlp=96',
    'minus_1': 'layers=7',
    'minus_2': 'layers=6',
    'minus_3': 'layers=5',
  },
  steps=300,
  peak=4e-3,  # see the README
  correct_peak=4e-4,
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
  batch_size=8,
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
    'minus_2': 'layers=9',
    'minus_3': 'layers=7',
  },
  steps=3000,
  peak=4e-4,
  correct_peak=4e-5,
  batch_size=64,
  align=64,
  train={'dtype': 'bfloat16'},
)  # fmt: skip

SCALES = {'smoke': SMOKE, 'cpu': CPU, 'gpu': GPU}
