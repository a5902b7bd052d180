r"""Compile a run's training step, or its decoding, for TPUs that are not here; print what it takes.

    python -m slm.compile --topology=v5e:16x16 --config=configs/pretrain.py \
      --config.mesh.fsdp=-1 --config.mesh.data=1 --config.model.vocab=32000 --context=1024
    python -m slm.compile --topology=v5p:4x4x4 --config=configs/minitron_published.py:nemo_8b
    python -m slm.compile --topology=v5p:4x4x4 --config=configs/tulu3.py:8b --stage=dpo

Needs libtpu, the extra slm[tpu], and neither data nor weights; a teacher may be named by its run. A
step that does not fit ends with exit status 1; --autotune then looks for a setting of
rematerialisation, accumulation and mesh with which it does, from what should cost least time on.
"""

from absl import flags

from slm.base import console
from slm.posttraining import planning, settings
from slm.pruning import recipe
from slm.runs import config
from slm.training import aot


def main(_: list[str]) -> None:
  """Compile, and print the report."""
  f = flags.FLAGS
  console.required('topology')
  if f.decode and f.autotune:
    raise ValueError('--autotune: looks for settings of a training step: leave out --decode')
  given, section = f.config.to_dict(), ''
  if 'sizes' in given:  # a recipe of slm.minitron
    section = 'recover.'
    planned = recipe.outline(given)
    cfg, teacher = planned.recover, planned.teacher
  elif 'rlvr' in given:  # a recipe of slm.tulu
    section, stages = f'{f.stage}.', planning.outlines(settings.read(given))
    if f.stage not in stages:
      raise ValueError(f'--stage={f.stage}: expected one of {", ".join(stages)}')
    cfg, teacher = stages[f.stage], None
  else:
    given = config.complete(given)
    data = given['data']['path']
    cfg = config.resolve(given) if data else config.without_data(given, f.context)
    teacher = config.of(cfg.teacher).model if cfg.teacher else None
  chips = aot.devices(f.topology)
  try:
    if f.decode:
      step = aot.compile_decoding(cfg, chips, f.decode)
    else:
      step = aot.compile_step(cfg, chips, teacher)
  except aot.DoesNotFitError as e:
    more = 'take fewer rows' if f.decode else advice(cfg, chips, teacher, f.autotune, section)
    raise ValueError(f'{f.topology}: {e}; {more}') from None
  print(aot.report(cfg, step, f.topology, len(chips), f.decode))


def advice(cfg, chips, teacher, search: bool, section: str = '') -> str:
  """Return the first settings that fit, or those to try; `section` of the config has their keys."""
  options = [
    (' '.join(f'--config.{section}{setting}' for setting in settings), changed)
    for settings, changed in aot.smaller(cfg, len(chips))
  ]
  if not options:
    return 'no other model.remat, data.accum or mesh takes less: take more chips'
  if not search:
    return f'--autotune tries {len(options)} settings, from {options[0][0]}'
  with console.Progress('autotune', len(options), 'settings') as progress:
    for name, changed in options:
      progress.say(name)
      try:
        aot.compile_step(changed, chips, teacher)
      except ValueError:  # not this one either, or the mesh does not divide the weights
        progress.update(1)
      else:
        return f'it fits with {name}'
  return f'nor does it with any of {len(options)} settings: take more chips'


if __name__ == '__main__':
  flags.DEFINE_string('topology', '', 'KIND:SHAPE of a slice, such as v5e:16x16 or v5p:4x4x4.')
  flags.DEFINE_string('stage', 'sft', 'Of a recipe of slm.tulu: the stage that is compiled.')
  flags.DEFINE_integer('context', 0, 'Tokens per row, without data.', 0)
  flags.DEFINE_integer('decode', 0, 'Rows to decode, in place of a training step.', 0)
  flags.DEFINE_bool('autotune', False, 'Look for a setting that fits, if this one does not.')
  console.run(main, config='base', keys=config.RunConfig)
