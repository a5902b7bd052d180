"""What is compiled, as plain data: published models on slices of TPUs.

The specialised models are the runs of experiments/specialise at its `paper` scale, with as many
rows per step as the slice has chips times four and weights split over all chips. Rows are those of
the paper: 1,024 tokens, and 8,192 for Minitron, whose chips take one row at a time.
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
    job: of experiments/specialise, or a recipe of configs/minitron_published.py.
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
  job = runs.Study(scales.PAPER, '', _CONTEXT, _VOCAB).jobs[f'{cell.job}-0']
  rows = {'data.batch_size': _ROWS * chips, 'model.vocab': _VOCAB}
  if 'data.rows_per_group' in job['set']:
    groups = _EXPERTS if job['config'] == 'mixture' else chips
    rows['data.rows_per_group'] = _ROWS * chips // groups
  given = common.config(job['config'], job['set'] | rows | split)
  return config.without_data(config.complete(given), _CONTEXT), None
