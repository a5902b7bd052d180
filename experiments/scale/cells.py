"""What is compiled, as plain data: published models on slices of TPUs.

The specialised models are the runs of experiments/specialise at its `paper` scale, with as many
rows per step as the slice has chips times four and weights split over all chips. Rows are those of
the paper: 1,024 tokens, and 8,192 for Minitron, whose chips take one row at a time. Batches and
lengths of Tülu 3 are those of its tables 11 and 18 (arXiv 2411.15124), and of Tülu 3.1's GRPO.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from configs import minitron_published
from experiments import common
from experiments.specialise import runs, scales
from slm.models.config import DecoderConfig
from slm.pruning import recipe
from slm.runs import config
from slm.runs.config import RunConfig

# Google's name of a slice -> its topology. The number in v5p-64 counts cores, two per chip.
SLICES = {
  'v5e-256': 'v5e:16x16',
  'v5p-64': 'v5p:2x4x4',
  'v6e-64': 'v6e:8x8',
  'v5e-128': 'v5e:8x16',
}
_ROWS = 4  # of a step on one chip
_CONTEXT, _VOCAB = 1024, 32_000


@dataclasses.dataclass(frozen=True)
class Cell:
  """A model whose step is compiled.

  Attributes:
    title: what the table calls it.
    job: of experiments/specialise, a recipe of configs/minitron_published.py, or one of STAGES.
    set: dotted config keys on top.
    decode: rows on each chip that are decoded, in place of a training step.
    slices: that it is compiled for.
  """

  title: str
  job: str
  set: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  decode: int = 0
  slices: tuple[str, ...] = ('v5e-256', 'v5p-64', 'v6e-64')


_EXPERTS = 16
_WHOLE = {'mesh.data': -1, 'mesh.fsdp': 1}  # every chip holds all weights
# As many active parameters as the small model has.
_ROUTED = {
  'model.num_experts': _EXPERTS, 'model.experts_per_token': 2, 'model.mlp': 1368,
  'model.dispatch': 'ragged', 'mesh.expert': _EXPERTS,
}  # fmt: skip
# A stage of Tülu 3: its config, the tokens of a row (of a prompt, where it is answered), keys. A
# row of pairs holds one, each of its answers after the prompt.
STAGES = {
  'sft': ('sft', 4096, {'data.batch_size': 128, 'objective.reduction': 'sum'}),
  'dpo': ('dpo', 2 * 2048, {'data.batch_size': 128}),
  'rlvr': (
    'grpo',
    2048,
    {
      'data.batch_size': 48,
      'objective.samples': 16,
      'objective.max_tokens': 2048,
      'objective.minibatches': 1,
    },
  ),
}
_8B = minitron_published.RECIPES['llama31_4b_width'][0]  # Llama 3.1
_70B = _8B | {'embed': 8192, 'mlp': 28_672, 'num_layers': 80, 'num_heads': 64}
_V5P = ('v5p-64',)
# 48 prompts do not divide over 32 chips: 16 at a time over as many pairs of them.
_PAIRS = {'mesh.tensor': 2, 'data.accum': 3}


def _tulu(model: Mapping[str, Any], steps: int, **more: Any) -> dict[str, Any]:
  """Return the keys of a stage on a shape."""
  shape = {f'model.{name}': value for name, value in model.items()}
  run = {'dtype': 'bfloat16', 'model.remat': 'full', 'init': '', 'epochs': 0.0, 'steps': steps}
  return {**shape, **run, **more}


CELLS = {
  'slm': Cell('specialised 121M', 'slm'),
  'llm': Cell('specialised 756M', 'llm'),
  'project': Cell('projected, 32 clusters', 'project'),
  'project_64': Cell('projected, 64 clusters', 'project_64'),
  # A step has one group of rows per expert, so that the batch is split 16 times; and 8 heads.
  'mixture': Cell(
    'mixture 16 x 121M',
    'mixture',
    {'mesh.fsdp': 1, 'mesh.tensor': -1, 'mesh.expert': _EXPERTS},
    slices=('v5e-128', 'v5p-64', 'v6e-64'),
  ),
  'moe': Cell('token-routed, 16 experts', 'slm', _ROUTED),
  # Its 1,152 rows divide over half of 256 chips.
  'minitron_4b': Cell('Minitron 8B to 4B', 'llama31_4b_width', {'mesh.tensor': 2}),
  # Without the axis XLA fails (RET_CHECK in while_loop_all_reduce_code_motion).
  'minitron_8b': Cell('Minitron 12B to 8B', 'nemo_8b', {'mesh.tensor': 2}),
  'slm_decode': Cell('specialised 121M, decoding', 'slm', _WHOLE, decode=8),
  'llm_decode': Cell('specialised 756M, decoding', 'llm', _WHOLE, decode=8),
  # Two epochs of 939,344 conversations, one of 271,409 and 334,302 pairs, and three of 29,946
  # prompts.
  'tulu3_8b_sft': Cell('Tülu 3 8B, SFT', 'sft', _tulu(_8B, 14_678), slices=_V5P),
  'tulu3_8b_dpo': Cell('Tülu 3 8B, DPO', 'dpo', _tulu(_8B, 2121), slices=_V5P),
  'tulu3_8b_rlvr': Cell('Tülu 3 8B, GRPO', 'rlvr', _tulu(_8B, 1872, **_PAIRS), slices=_V5P),
  'tulu3_8b_answers': Cell(
    'Tülu 3 8B, answers', 'sft', _tulu(_8B, 1872, **_WHOLE), decode=24, slices=_V5P
  ),
  'tulu3_70b_sft': Cell('Tülu 3 70B, SFT', 'sft', _tulu(_70B, 14_678), slices=_V5P),
  'tulu3_70b_dpo': Cell('Tülu 3 70B, DPO', 'dpo', _tulu(_70B, 2612), slices=_V5P),
  'tulu3_70b_rlvr': Cell('Tülu 3 70B, GRPO', 'rlvr', _tulu(_70B, 1872, **_PAIRS), slices=_V5P),
}


def training(cell: Cell, chips: int) -> tuple[RunConfig, DecoderConfig | None]:
  """Return the config of a cell's training on a slice, and the shape of its teacher if any."""
  split = {'mesh.data': 1, 'mesh.fsdp': -1, **cell.set}
  if cell.job in minitron_published.RECIPES:
    given = minitron_published.get_config(cell.job)
    split['data.accum'] = given.recover.data.batch_size * split.get('mesh.tensor', 1) // chips
    given.recover.update_from_flattened_dict(split)
    planned = recipe.outline(given.to_dict())
    return planned.recover, planned.teacher
  if cell.job in STAGES:
    name, context, keys = STAGES[cell.job]
    given = common.config(name, {**keys, **split})
    return config.without_data(config.complete(given), context), None
  job = runs.Study(scales.PAPER, '', _CONTEXT, _VOCAB).jobs[f'{cell.job}-0']
  rows = {'data.batch_size': _ROWS * chips, 'model.vocab': _VOCAB}
  if 'data.rows_per_group' in job['set']:
    groups = _EXPERTS if job['config'] == 'mixture' else chips
    rows['data.rows_per_group'] = _ROWS * chips // groups
  given = common.config(job['config'], job['set'] | rows | split)
  return config.without_data(config.complete(given), _CONTEXT), None
