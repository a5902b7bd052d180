"""Plan a recipe from shapes alone: what each stage takes, and what drawing answers adds."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from slm.base import console, schema
from slm.inference import scoring
from slm.models.config import DecoderConfig
from slm.posttraining import settings
from slm.posttraining.settings import STAGES, TuluConfig
from slm.reporting import tables
from slm.runs.config import RunConfig
from slm.training import plan
from slm.weights.chips import CHIPS
from slm.weights.count import forward_flops, num_params

_ROOM = 0.6  # share of a group's memory that weights may take where answers are drawn


class Rollouts(NamedTuple):
  """Answers that a stage draws: their number, tokens at most, FLOPs, and hours at least."""

  answers: int
  tokens: int
  flops: float
  hours: float


def shape(cfg: TuluConfig) -> DecoderConfig:
  """Return the shape of the model that a recipe trains.

  Raises:
    ValueError: if it is not known without data.
  """
  if cfg.start:
    return scoring.shape(Path(cfg.start))
  given = cfg.model or cfg.sft.get('model', {})
  if not given.get('vocab'):
    raise ValueError('model: expected a start, or the shape of a model with its vocabulary')
  return schema.read(DecoderConfig, given, 'model')


def outlines(cfg: TuluConfig) -> dict[str, RunConfig]:
  """Return the training config of every stage, with steps of `epochs` left as `steps`."""
  whole = schema.plain(shape(cfg))
  computed = ('remat', 'attention', 'unroll', 'dispatch')
  found = {}
  for stage in cfg.stages:
    given = cfg.stages[stage].get('model', {})
    own = {name: given[name] for name in computed if name in given}
    found[stage] = settings.outline(cfg, stage, whole | own)
  return found


def rollouts(cfg: RunConfig, devices: int, chip: str, mfu: float) -> Rollouts:
  """Estimate what a run draws; the time is what reading weights and caches takes at least.

  Answers are spread over groups of as few chips as hold the weights in two bytes each.
  """
  o, model = cfg.objective, cfg.model
  count = cfg.data.batch_size * o.samples
  tokens = count * o.max_tokens
  flops = (tokens + count * cfg.context) * forward_flops(model, cfg.context + o.max_tokens)
  hardware = CHIPS.get(chip)
  seconds = 0.0
  if hardware and hardware.bandwidth:
    weights = 2.0 * sum(num_params(model).values())
    group = min(2 ** math.ceil(math.log2(max(weights / (_ROOM * hardware.bytes), 1))), devices)
    cache = 4.0 * model.num_layers * model.num_kv_heads * model.head_dim
    held = count * group / devices * (cfg.context + o.max_tokens / 2) * cache
    reading = (weights + held) / (group * hardware.bandwidth) * o.max_tokens
    seconds = max(reading, flops / (devices * hardware.flops * mfu))
  return Rollouts(count * cfg.steps, tokens * cfg.steps, flops * cfg.steps,
                  seconds * cfg.steps / 3600)  # fmt: skip


def dry_run(given: Mapping[str, Any], devices: int, chip: str, mfu: float) -> str:
  """Plan the stages of a recipe: parameters, tokens, FLOPs, memory and time of each, as text."""
  cfg = settings.read(given)
  whole = shape(cfg)
  lines = [f'{"parameters":28} {sum(num_params(whole).values()):,}']
  rows, notes, hours = [], [], 0.0
  for stage, run in outlines(cfg).items():
    planned = plan.plan(run, devices, chip, mfu)
    chips = math.prod(planned['mesh'].values())
    held = sum(planned['bytes per device'].values())
    held += sum(planned['estimated bytes per device'].values())
    if held > planned['chip bytes']:
      notes.append(f'{stage}: does not fit: raise {stage}.mesh.fsdp or data.accum, or model.remat')
    if run.epochs:
      notes.append(f'{stage}: {run.epochs:g} epochs decide its steps once there are rows')
    rows.append(_row(stage, STAGES[stage], run, planned['FLOPs'], held, planned['hours'], chips))
    hours += planned['chip-hours']
    if run.objective.answers:
      drawn = rollouts(run, chips, chip, mfu)
      rows.append(_row('  its answers', f'{tables.count(drawn.answers)} answers', run, drawn.flops,
                       0.0, drawn.hours, chips, drawn.tokens))  # fmt: skip
      hours += drawn.hours * chips
  head = ['stage', 'rows', 'steps', 'tokens', 'FLOPs', 'GB/device', 'time', 'chip-hours']
  lines += ['', tables.text((head, rows)), '']
  lines += [f'{hours:,.1f} chip-hours; training at {mfu:.0%} of the peak of {chip}', *notes]
  if any(run.objective.answers for run in outlines(cfg).values()):
    lines.append(
      'answers: as many tokens as max_tokens allows, in the time that reading weights and caches '
      'takes: no faster than this'
    )
  return '\n'.join(lines)


def _row(
  stage: str, rows: str, run: RunConfig, flops: float, held: float, hours: float, chips: int,
  tokens: int = 0,
) -> list[str]:  # fmt: skip
  tokens = tokens or run.steps * run.data.batch_size * run.context
  return [
    stage, rows, f'{run.steps:,}', tables.count(tokens), tables.number(flops),
    f'{held / 1e9:.3g}' if held else '', console.duration(3600 * hours), f'{hours * chips:,.1f}',
  ]  # fmt: skip
