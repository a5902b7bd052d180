"""Programs compiled ahead of time: what is read from HLO, what a step takes, what does not fit."""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from experiments import common
from slm.base import arguments
from slm.models import flash
from slm.models.config import DecoderConfig
from slm.runs import config
from slm.training import aot, hlo, plan, program
from slm.weights import chips, sharding
from slm.weights.count import num_params

AXES, SHAPE = ('data', 'fsdp', 'tensor', 'expert'), (2, 4, 1, 1)
PROGRAM = """HloModule jit_step, is_scheduled=true

%body (p.1: (u32[], bf16[8,16])) -> (u32[], bf16[8,16]) {
  %two = u32[]{:T(128)} constant(2)
  %p.1 = (u32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p.1), index=0
  %x = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%p.1), index=1
  %next = u32[]{:T(128)} add(%i, %two), metadata={op_name="jit(step)/while/body/add"}
  %permute = (bf16[8,16]{1,0}, bf16[8,16]{1,0:S(1)}, u32[], u32[]) collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}, metadata={op_name="jit(step)/while/body/mlp/dot"}
  %y = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} collective-permute-done(%permute)
  ROOT %both = (u32[]{:T(128)}, bf16[8,16]{1,0}) tuple(%next, %y)
}

%condition (p.2: (u32[], bf16[8,16])) -> pred[] {
  %p.2 = (u32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %j = u32[]{:T(128)} get-tuple-element(%p.2), index=0
  %limit = u32[]{:T(128)} constant(7)
  ROOT %less = pred[]{:T(512)} compare(%j, %limit), direction=LT
}

%scatter (p.3: f32[64,16]) -> f32[16,16] {
  %p.3 = f32[64,16]{1,0} parameter(0)
  %sum = f32[64,16]{1,0} all-reduce(%p.3), channel_id=5, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %mine = f32[16,16]{1,0} dynamic-slice(%sum, %zero, %zero), dynamic_slice_sizes={16,16}
}

%taken (p.4: f32[100,16], p.5: s32[]) -> f32[1,16] {
  %p.4 = f32[100,16]{1,0} parameter(0)
  %p.5 = s32[] parameter(1)
  ROOT %row = f32[1,16]{1,0} dynamic-slice(%p.4, %p.5, %zero), dynamic_slice_sizes={1,16}
}

%nested (p.6: f32[100,16], p.7: s32[]) -> f32[1,16] {
  %p.6 = f32[100,16]{1,0} parameter(0)
  %p.7 = s32[] parameter(1)
  %same = f32[1600]{0} bitcast(%p.6)
  ROOT %fused = f32[1,16]{1,0} fusion(%same, %p.7), kind=kLoop, calls=%taken
}

ENTRY %main (a: bf16[8,16], b: f32[64,16], c: f32[100,16], n: s32[]) -> f32[] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = f32[64,16]{1,0} parameter(1)
  %c = f32[100,16]{1,0} parameter(2)
  %n = s32[] parameter(3)
  %start = (u32[], bf16[8,16]{1,0}) tuple(%zero, %a)
  %loop = (u32[], bf16[8,16]{1,0}) while(%start), condition=%condition, body=%body
  %known = (u32[], bf16[8,16]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %gathered = bf16[32,16]{1,0} all-gather(%a), channel_id=2, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}, metadata={op_name="jit(step)/head/gather"}
  %reduced = f32[64,16]{1,0} all-reduce(%b), channel_id=3, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  %crossed = f32[64,16]{1,0} all-reduce(%b), channel_id=4, replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  %all-reduce-scatter = f32[16,16]{1,0} fusion(%b), kind=kCustom, calls=%scatter
  %pair = ((f32[2,16], f32[4,16]), (f32[8,16], f32[16,16])) all-gather-start(%n, %c), channel_id=6, replica_groups=[2,4]<=[8], dimensions={0}
  %kernel = (f32[8,16]{1,0}, f32[4,4]{1,0:S(1)}) custom-call(%b, %a), custom_call_target="tpu_custom_call"
  %taken.1 = f32[1,16]{1,0} fusion(%c, %n), kind=kLoop, calls=%taken
  %nested.1 = f32[1,16]{1,0} fusion(%c, %n), kind=kLoop, calls=%nested
  ROOT %end = f32[] constant(0)
}
"""  # noqa: E501


def test_collectives_are_counted_as_often_as_they_run_and_named_by_their_axes():
  found = hlo.Program(PROGRAM).collectives(AXES, SHAPE)
  by_kind = {}
  for c in found:
    by_kind.setdefault((c.kind, c.axes), []).append((c.count, c.bytes))
  half, whole = 8 * 16 * 2, 64 * 16 * 4
  assert by_kind == {
    # From 0 by 2 while below 7: four times; and three times where XLA says so.
    ('collective-permute', ('fsdp',)): [(4 + 3, (4 + 3) * half)],
    ('all-gather', ('fsdp',)): [(1, (8 + 16) * 16 * 4 * 3 / 4), (1, 32 * 16 * 2 * 3 / 4)],
    ('all-reduce', ('data',)): [(2, 2 * (2 * whole * 1 / 2))],  # by list and by iota
    ('reduce-scatter', ('fsdp',)): [(1, whole * 3 / 4)],
  }
  assert [c.bytes for c in found] == sorted((c.bytes for c in found), reverse=True)
  assert {c.source for c in found} == {'mlp/dot', 'head/gather', ''}


@pytest.mark.parametrize(
  ('groups', 'axes'),
  [
    ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ('fsdp',)),
    ("mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", ('fsdp',)),
    ("mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", ('data',)),
    ('[4,2]<=[2,4]T(1,0)', ('data',)),
    ('[2,4]<=[8]', ('fsdp',)),
    ('{}', ('data', 'fsdp')),
  ],
)
def test_every_notation_of_groups_of_devices_is_read(groups, axes):
  assert hlo._members(f'replica_groups={groups}, dimensions={{0}}', AXES, SHAPE)[0] == axes


@pytest.mark.parametrize('groups', ['replica_groups=@all', 'source_target_pairs=<0,1>'])
def test_an_unknown_notation_of_groups_is_not_taken_for_all_devices(groups):
  with pytest.raises(ValueError, match=f'^HLO: {groups}.*: is no known notation of groups'):
    hlo._members(f'channel_id=1, {groups}, dimensions={{0}}', AXES, SHAPE)


def test_memory_traffic_leaves_out_what_stays_on_the_chip_and_counts_slices():
  program = hlo.Program(PROGRAM)
  by_name = {x.name: x for x, _ in program.executed()}
  permute, taken = by_name['permute'], by_name['taken.1']
  assert program._written(permute) == 0 and program._read(permute, by_name) == 8 * 16 * 2
  assert program._written(taken) == 16 * 4
  assert program._read(taken, by_name) == 16 * 4 + 4  # a row of 100, and its number
  assert program._read(by_name['nested.1'], by_name) == 16 * 4 + 4
  kernel = by_name['kernel']
  moved = program._written(kernel) + program._read(kernel, by_name)
  assert moved == 8 * 16 * 4 + 64 * 16 * 4 + 8 * 16 * 2
  without = hlo.Program(PROGRAM.replace('tpu_custom_call', 'AllocateBuffer'))
  assert program.traffic() - without.traffic() == moved


def test_a_loop_whose_length_is_not_known_is_said_to_count_once():
  program = hlo.Program(PROGRAM.replace('direction=LT', 'direction=NE'))
  assert [c.count for c in program.collectives(AXES, SHAPE) if 'permute' in c.kind] == [1 + 3]
  assert program.unknown == {'loop'}
  assert not hlo.Program(PROGRAM).unknown


TINY = {
  'model.vocab': 256, 'model.embed': 64, 'model.num_layers': 2, 'model.num_heads': 4,
  'model.num_kv_heads': 2, 'model.head_dim': 16, 'model.mlp': 128, 'data.batch_size': 16,
  'objective.chunk': 64, 'steps': 100, 'schedule.warmup': 10, 'mesh.data': 1, 'mesh.fsdp': -1,
}  # fmt: skip


def tiny(name='pretrain', context=32, **changes):
  given = common.config(name, TINY | {key.replace('__', '.'): x for key, x in changes.items()})
  return config.without_data(config.complete(given), context)


def compile_step(cfg, teacher=None):
  """Compile a step for the devices here; what it takes in as slm.train --dry_run says."""
  step = aot.compile_step(cfg, jax.devices(), teacher)
  planned = plan.plan(cfg, len(jax.devices()), 'tpu-v5e', 0.4, teacher)
  assert planned['bytes per device'] == {
    name: n for name, n in step.memory.items() if not name.startswith('XLA')
  }
  assert planned['FLOPs'] == step.model_flops * len(jax.devices()) * cfg.steps
  assert planned['tokens'] == step.tokens * cfg.steps
  return step


NO_RUNS = {
  '__init__', 'base', 'data', 'minitron', 'minitron_published', 'minitron_quick', 'tulu',
  'tulu_quick', 'tulu_smollm2', 'tulu3',
}  # fmt: skip
CONFIGS = sorted({path.stem for path in arguments.CONFIGS.glob('*.py')} - NO_RUNS)


@pytest.mark.parametrize('name', CONFIGS)
def test_a_plan_and_the_compiled_step_take_the_same_arguments(name, monkeypatch):
  """Of every config: counted on a mesh of devices, and on one of names."""
  given = common.config(name, TINY | {'init': '', 'teacher': '', 'data.batch_size': 128})
  if name == 'code':
    network = common.config('project', {})['reparam']
    given['reparam'] |= {
      'of': network,
      'histogram': [1 / network['clusters']] * network['clusters'],
    }
  cfg = config.without_data(config.complete(given), 32)
  compiled = {}
  monkeypatch.setattr(aot, '_compile', lambda _, kinds, *more: compiled.update(kinds) or more)
  _, flops, tokens = aot.compile_step(cfg, jax.devices(), cfg.model)
  planned = plan.plan(cfg, len(jax.devices()), 'tpu-v5e', 0.4, cfg.model)
  assert planned['bytes per device'] == program.memory(compiled)
  assert (planned['FLOPs'], planned['tokens']) == (flops * cfg.steps, tokens * cfg.steps)


def test_a_step_is_compiled_from_shapes():
  cfg = tiny()
  step = compile_step(cfg)
  # The head's gradient costs 3 products as every other does: nothing is computed twice but
  # attention's scores, in the backward pass.
  assert 1 <= step.flops / step.model_flops < 1.15
  weights = step.memory['weights']
  assert step.memory['optimiser moments'] == pytest.approx(2 * weights, abs=16)
  assert weights * 8 == pytest.approx(4 * sum(num_params(cfg.model).values()), rel=0.01)
  text = aot.report(cfg, step, 'v5e:2x4', 8)
  assert 'mesh fsdp 8' in text and 'v5e:2x4, 8 chips' in text
  least = max(aot.seconds(step, chips.CHIPS['tpu-v5e']).values())
  assert f'{least * cfg.steps / 3600 * 8:,.3g} chip-hours' in text


@pytest.mark.parametrize('name', ['pretrain', 'dpo', 'grpo'])
def test_the_head_is_gathered_and_its_gradient_reduced_once_a_step(name):
  """However many chunks the loss has."""
  sent = {}
  for chunk in (512, 16):
    changes = {} if name == 'pretrain' else {'init': '', 'model__num_layers': 1}
    step = compile_step(tiny(name, objective__chunk=chunk, **changes))
    sent[chunk] = sum(c.bytes for c in step.collectives)
  assert sent[16] == pytest.approx(sent[512], rel=0.02)


def test_a_projected_network_sends_matrices_of_its_models_size():
  """However many bases they are sums of."""
  sent = {}
  for capacity in (2, 16):
    changes = {'reparam.capacity': capacity, 'reparam.clusters': 4, 'data.level': 4}
    step = compile_step(tiny('project', data__rows_per_group=2, **changes))
    sent[capacity] = sum(c.bytes for c in step.collectives)
  assert sent[16] == pytest.approx(sent[2], rel=0.02)


def test_a_step_in_bfloat16_is_compiled_on_cpus_too():
  """XLA aborted the process here."""
  step = aot.compile_step(tiny(dtype='bfloat16', mesh__data=2, mesh__fsdp=4), jax.devices())
  assert step.flops / step.model_flops > 1


def test_a_teacher_needs_no_run():
  teacher = dataclasses.replace(tiny().model, num_layers=3)
  cfg = tiny('recover', init='', teacher='', objective__states=('-1:-1',))
  step = compile_step(cfg, teacher)
  assert step.memory['frozen weights'] > step.memory['weights']
  corrected = dataclasses.replace(cfg, objective=dataclasses.replace(cfg.objective, correct=0.5))
  assert compile_step(corrected, teacher).memory['weights trained beside'] > 0
  with pytest.raises(ValueError, match='teacher: a distillation needs the shape'):
    aot.compile_step(cfg, jax.devices())


def test_decoding_is_compiled_from_shapes():
  cfg = tiny(mesh__data=-1, mesh__fsdp=1)
  found = aot.compile_decoding(cfg, jax.devices(), 16)
  assert found.tokens == 16 * 16  # half of the context, of every row
  assert found.memory['weights'] == 4 * sum(num_params(cfg.model).values())
  # The head only for the last token of the prompt; the keys of the whole cache, masked or not.
  assert 0.5 < found.flops / found.model_flops < 1.5
  with pytest.raises(ValueError, match='--decode=9: expected a multiple of the 8 chips'):
    aot.compile_decoding(cfg, jax.devices(), 9)
  with pytest.raises(ValueError, match='--decode: expected a context of a prompt and .* found 1 t'):
    aot.compile_decoding(dataclasses.replace(cfg, context=1), jax.devices(), 8)


def test_errors_of_the_compiler_are_one_line():
  used = 'RESOURCE_EXHAUSTED: Ran out of memory\nUsed 20.10G of 15.75G hbm. Exceeded by 4.35G.'
  error = aot._explained(RuntimeError(used))
  assert isinstance(error, aot.DoesNotFitError) and '20.10G of 15.75G bytes' in str(error)
  used = 'memory required for HLO temporaries (124.85G) exceeds available HBM (95.74G).'
  assert '124.85G of 95.74G bytes' in str(aot._explained(RuntimeError(used)))
  assert str(aot._explained(RuntimeError('INTERNAL: no\nmore'))) == 'XLA: INTERNAL: no'


def test_smaller_settings_are_tried_in_the_order_of_the_time_that_they_cost():
  whole = 'mesh.data=1 mesh.fsdp=-1'
  once = ['', whole, 'data.accum=2', f'{whole} data.accum=2']
  expected = once[1:]
  for remat in ('dots', 'full'):
    at = lambda x, remat=remat: x.replace('data.accum', f'model.remat={remat} data.accum')
    expected += [at(x) if 'accum' in x else f'{x} model.remat={remat}'.strip() for x in once]
  found = aot.smaller(tiny(mesh__data=-1, mesh__fsdp=1), 8)
  assert [' '.join(settings) for settings, _ in found] == expected


@pytest.mark.parametrize(
  ('mesh', 'rows', 'first'),
  [
    ({'data': -1, 'fsdp': 1}, 16, ['mesh.data=1', 'mesh.fsdp=-1']),
    # Fewer rows than chips: four of the eight split them, and two each head.
    ({'data': -1, 'fsdp': 1, 'tensor': 2}, 4, ['mesh.data=1', 'mesh.fsdp=-1']),
    ({'data': 1, 'fsdp': -1, 'tensor': 2}, 4, ['model.remat=dots']),
    ({'data': 2, 'fsdp': 1, 'tensor': -1}, 8, ['mesh.data=1', 'mesh.fsdp=-1', 'mesh.tensor=4']),
  ],
)
def test_smaller_settings_are_those_of_the_config_that_is_tried(mesh, rows, first):
  given = {f'mesh.{axis}': n for axis, n in mesh.items()} | {'data.batch_size': rows}
  found = aot.smaller(tiny(**given), 8)
  assert found[0][0] == first
  assert {c.model.remat for _, c in found} >= {'dots', 'full'}
  for settings, tried in found:
    pairs = [setting.split('=') for setting in settings]
    assert tiny(**given | {key: int(x) if x[-1].isdigit() else x for key, x in pairs}) == tried
    shards = sharding.batch_devices(sharding.make_mesh(vars(tried.mesh)))
    assert rows // tried.data.accum % shards == 0
  assert len({c for _, c in found}) == len(found)


def test_nothing_is_smaller_than_the_smallest():
  assert not aot.smaller(tiny(model__remat='full', data__batch_size=8), 8)


@pytest.mark.parametrize(
  ('topology', 'message'),
  [
    ('v5e', 'expected KIND:SHAPE'),
    ('h100:8x8', 'expected KIND:SHAPE'),
    ('v5e:0', 'expected KIND'),
    ('v5e:2x2x2', 'two sides for v5e'),
    ('v6e:4', 'two sides'),
    ('v5p:4x4', 'three for v4 and v5p'),
    ('v5e:0x4', 'expected KIND:SHAPE'),
  ],
)
def test_an_unknown_slice_is_refused(topology, message):
  with pytest.raises(ValueError, match=message):
    aot.devices(topology)


def test_bounds_take_a_chip_to_send_over_all_its_links():
  """Rates of an axis, both directions: 9e10 bytes/s in v4 and v5e, twice that in v5p and v6e."""
  one = hlo.Collective('all-reduce', ('fsdp',), '', 1, 1.08e12)
  step = aot.Compiled(1, {}, 1.0, 1.0, 1.0, [one], 0)
  times = {kind: aot.seconds(step, chips.of_slice(f'{kind}:2x2'))['network'] for kind in chips.TPUS}
  assert times == pytest.approx({'v4': 4, 'v5e': 6, 'v5p': 2, 'v6e': 3})


LIBTPU = os.environ.get('SLM_LIBTPU', '')  # a directory of pip install --target, see the Makefile


def compiled(*flags):
  command = [sys.executable, '-m', 'slm.compile', *flags]
  paths = os.pathsep.join(filter(None, [os.environ.get('PYTHONPATH', ''), LIBTPU]))
  env = os.environ | {'PYTHONPATH': paths, 'JAX_PLATFORMS': 'cpu'}
  return subprocess.run(command, capture_output=True, text=True, env=env)


needs_libtpu = pytest.mark.skipif(not LIBTPU, reason='SLM_LIBTPU is not set: make libtpu')


@needs_libtpu
def test_a_step_that_does_not_fit_tpus_that_are_not_here_is_refused():
  flags = [f'--config.{key}={value}' for key, value in TINY.items()]
  big = ['--config.model.embed=4096', '--config.model.num_layers=64', '--config.model.mlp=16384']
  done = compiled('--topology=v5e:2x2', '--config=pretrain', '--context=128', *flags, *big)
  assert done.returncode == 1 and 'of memory on a chip; --autotune tries' in done.stderr


# What experiments/scale compiles, in small.
EVERY = """
import json
from test_compile import tiny
from slm.training import aot
from slm.weights import sharding
clusters = {'reparam.clusters': 4, 'data.level': 4}
wide = {'dtype': 'bfloat16', 'context': 128, 'model__head_dim': 128}
configs = {
  'dense': tiny(**wide),
  'projected': tiny('project', data__rows_per_group=2, **clusters, **wide),
  'mixture': tiny('mixture', data__rows_per_group=4, mesh__fsdp=1, mesh__expert=4, **clusters, **wide),
  'routed': tiny('moe', model__dispatch='ragged', mesh__expert=2, **wide),
  'distilled': tiny('recover', init='', teacher='', **wide),
}
chips = aot.devices('v5e:2x2')
for name, cfg in configs.items():
  step = aot.compile_step(cfg, chips, cfg.model if name == 'distilled' else None)
  gathers = [c.bytes / c.count for c in step.collectives if c.kind == 'all-gather']
  activations = cfg.data.batch_size // cfg.data.accum * cfg.context * cfg.model.embed * 2
  ratios = step.flops / step.model_flops, max(gathers, default=0) / activations
  print(name, json.dumps([*ratios, step.memory, step.unknown]))
assert len(aot.devices('v4:2x2x1')) == 4  # not 8: the two cores of a chip are one device
# 8 is no product of sides of 4x4.
sharding.make_mesh({'fsdp': 2, 'data': 1, 'expert': 8}, aot.devices('v5e:4x4'))
print(aot.report(configs['dense'], aot.compile_decoding(configs['dense'], chips, 8), 'v5e:2x2', 4, 8))
"""  # noqa: E501


@needs_libtpu
def test_every_kind_of_model_is_compiled_for_tpus_that_are_not_here(tmp_path):
  paths = os.pathsep.join([LIBTPU, str(pathlib.Path(__file__).parent), '.'])
  env = os.environ | {'PYTHONPATH': paths, 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run([sys.executable, '-c', EVERY], capture_output=True, text=True, env=env)
  assert done.returncode == 0, done.stderr
  *steps, report = done.stdout.split('\n', 5)
  for line in steps:
    name, _, found = line.partition(' ')
    ratio, gathered, memory, unknown = json.loads(found)
    assert 1 <= ratio < 1.6 and memory['XLA temporaries'] and not unknown, name
    assert gathered < 0.5, f'{name} gathers activations of a layer'
    assert memory['XLA padding of arguments'], name  # 64 columns take the place of 128
  assert 'compiled for                 v5e:2x2, 4 chips; mesh fsdp 4' in report
  assert 'decoding                     at least' in report


def test_without_libtpu_the_extra_is_named():
  done = subprocess.run(
    [sys.executable, '-m', 'slm.compile', '--topology=v5e:2x2', '--config.model.vocab=9',
     '--context=8'], capture_output=True, text=True, env=os.environ | {'JAX_PLATFORMS': 'cpu'},
  )  # fmt: skip
  assert done.returncode == 1
  assert done.stderr.endswith("needs libtpu: pip install 'slm[tpu]'\n")


def test_flops_of_the_splash_kernel_are_those_of_the_blocks_that_it_computes():
  b, heads, t, c = 2, 4, 1024, 32
  shape = lambda n: jax.ShapeDtypeStruct((b, n, t, c), jnp.float32)
  inputs = (shape(heads), shape(2), shape(2), jax.ShapeDtypeStruct((b, t), jnp.int32))
  cfg = DecoderConfig(vocab=1, head_dim=c, attention='splash')
  attend = lambda *x: flash.attention(cfg, *x).sum()
  product = 2 * b * heads * c * 3 * 512**2  # three of four blocks
  assert aot.flops(jax.make_jaxpr(attend)(*inputs).jaxpr) == 2 * product
  gradient = jax.make_jaxpr(jax.grad(attend, (0, 1, 2)))(*inputs)
  assert aot.flops(gradient.jaxpr) == pytest.approx((2 + 3 + 4) * product, rel=1e-3)


def test_flops_count_products_as_often_as_loops_run():
  w = jnp.ones((8, 8))

  def fn(x):
    return jax.lax.scan(lambda c, _: (jax.checkpoint(jnp.dot)(c, w), None), x, length=5)[0].sum()

  forward = jax.make_jaxpr(fn)(jnp.ones((4, 8)))
  assert aot.flops(forward.jaxpr) == 5 * 2 * 4 * 8 * 8
  choose = lambda p, x: jax.lax.cond(p, lambda x: x @ w, lambda x: x, x)
  assert aot.flops(jax.make_jaxpr(choose)(True, jnp.ones((4, 8))).jaxpr) == 2 * 4 * 8 * 8
  assert math.isclose(aot.flops(jax.make_jaxpr(jax.grad(fn))(jnp.ones((4, 8))).jaxpr), 2 * 2560)
