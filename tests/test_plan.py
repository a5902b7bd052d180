"""Plans: published parameter counts, memory against XLA's, meshes larger than the machine."""

import subprocess
import sys

import jax
import jax.extend
import pytest

from configs import base, lora, mask
from slm.base import arguments
from slm.data import loader
from slm.runs.config import RunConfig, section, without_data, write_run
from slm.training import plan
from slm.weights import chips, count, sharding

# Grangier et al., tables 1, 6 and 7. Their MLPs have two matrices of width 4d; a gated one of 8d/3
# has as many parameters. Their totals imply 37.1k embedding rows, more than the 32k tokens stated.
PAPER = {'vocab': 37_120, 'num_layers': 7, 'head_dim': 128}
SMALL = {**PAPER, 'embed': 1024, 'num_heads': 8, 'num_kv_heads': 8, 'mlp': 2731}
LARGE = {**PAPER, 'embed': 2816, 'num_heads': 22, 'num_kv_heads': 22, 'mlp': 7509}


def config(model, rep=None, **more):
  c = base.get_config()
  c.model.update(model)
  if rep:
    c.reparam = rep
  c.update_from_flattened_dict(more)
  return c.to_dict()


def planned(cfg, devices=1, context=1024):
  return plan.plan(without_data(cfg, context), devices, 'a100', 0.4)


def project(clusters):
  # h = k with the last five of the seven blocks projected fits all three published totals.
  leaves = ('w_gate', 'w_up', 'w_down')
  sizes = {'clusters': clusters, 'capacity': clusters, 'code': clusters, 'last_layers': 5}
  return {'name': 'project', 'leaves': leaves, 'shared_mix': True, **sizes}


@pytest.mark.parametrize(
  ('model', 'rep', 'millions'),
  [
    (SMALL, None, 126),
    (LARGE, None, 771),
    (SMALL, {'name': 'mixture', 'clusters': 16}, 2016),
    (SMALL, project(16), 756),
    (SMALL, project(32), 1422),
    (SMALL, project(64), 2770),
  ],
)
def test_published_parameter_counts(model, rep, millions):
  groups = {}
  if rep:
    order = 'every' if rep['name'] == 'mixture' else 'proportional'
    clusters = rep['clusters']
    groups = {'data.level': clusters, 'data.batch_size': clusters, 'data.order': order}
  result = planned(config(model, rep, **groups))
  assert sum(result['trained parameters'].values()) == pytest.approx(millions * 1e6, rel=4e-3)
  served = sum(result['served parameters'].values())
  assert served == pytest.approx((771 if model is LARGE else 126) * 1e6, rel=4e-3)


def beside_xlas(cfg):
  """Return a plan's bytes by kind, its estimates, and the temporaries of XLA on this machine.

  The step is compiled without donation: with it XLA on CPU also holds the optimiser's updates,
  which are formed in place on an accelerator.
  """
  result = plan.plan(cfg, 1, 'a100', 0.4)
  outline, compiled = plan._compile(cfg, None)
  kinds = sum(result['bytes per device'].values())
  # The number of the step, and conditions that a dense model does not use.
  assert compiled.memory_analysis().argument_size_in_bytes == pytest.approx(kinds, abs=256)
  mesh = sharding.make_mesh({'data': 1}, jax.devices()[:1])
  where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    jaxpr = outline.trace().jaxpr
    whole = jax.jit(jax.extend.core.jaxpr_as_fun(jaxpr))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where) for x in jaxpr.in_avals]
    stats = whole.lower(*shapes).compile().memory_analysis()
  return kinds, sum(result['estimated bytes per device'].values()), stats.temp_size_in_bytes


@pytest.mark.parametrize('remat', ['none', 'dots', 'full'])
def test_memory_beside_xlas(remat):
  """Gradients and kept activations make up most of what XLA adds to the arguments."""
  cfg = config({'vocab': 512, 'num_layers': 8, 'remat': remat}, **{'data.batch_size': 8})
  cfg |= {'mesh': {'data': 1}}
  cfg['objective'] = {'name': 'next_token', 'chunk': 64}
  _, estimated, temporaries = beside_xlas(without_data(cfg, 256))
  assert 0.85 < estimated / temporaries < 1.05


@pytest.mark.parametrize('name', ['lora', 'mask'])
def test_memory_of_a_tuned_frozen_model_beside_xlas(name):
  config = {'lora': lora, 'mask': mask}[name].get_config().to_dict()
  config['model'] |= {'vocab': 512, 'embed': 512, 'num_layers': 4, 'head_dim': 128, 'mlp': 1024}
  config['data'] |= {'batch_size': 2}
  cfg = without_data(config | {'mesh': {'data': 1}, 'init': '', 'seed': 0}, 64)
  kinds, estimated, temporaries = beside_xlas(cfg)
  assert 0.7 < (kinds + estimated) / (kinds + temporaries) < 1.3


def test_what_training_refuses_is_not_planned():
  for changes, message in (
    ({'data.level': 8}, 'needs rows grouped by as many clusters'),
    ({'data.accum': 0}, 'batch_size and accum of at least 1'),
  ):
    cfg = config(SMALL, project(32), **{'data.level': 32, 'data.batch_size': 32} | changes)
    with pytest.raises(ValueError, match=message):
      planned(cfg | {'mesh': {'data': 1}})


def test_experts_that_are_computed_and_not_chosen_take_time():
  make = lambda dispatch: planned(
    config({**SMALL, 'num_experts': 8, 'dispatch': dispatch}) | {'mesh': {'data': 1}}
  )
  all_of_them, chosen = make('einsum'), make('ragged')
  assert all_of_them['FLOPs'] == chosen['FLOPs']
  assert all_of_them['hours'] > 1.5 * chosen['hours']


def test_a_mesh_larger_than_the_machine():
  more = {'data.level': 32, 'data.batch_size': 256, 'model.mlp': 2732, 'dtype': 'bfloat16'}
  cfg = config(SMALL, project(32), **more)
  one, many = dict(cfg), dict(cfg)
  one['mesh'] = {'data': 1}
  many['mesh'] = {'data': -1, 'fsdp': 8, 'tensor': 4}
  alone, spread = planned(one), planned(many, 256)
  assert spread['mesh'] == {'data': 8, 'fsdp': 8, 'tensor': 4, 'expert': 1}
  assert spread['hours'] == pytest.approx(alone['hours'] / 256)
  assert spread['FLOPs'] == alone['FLOPs']
  share = {k: spread['bytes per device'][k] / alone['bytes per device'][k] for k in ('weights',)}
  assert 1 / 32 < share['weights'] < 1 / 30  # norms and codes are not split
  with pytest.raises(ValueError, match='256 groups of rows .* do not divide over 96'):
    planned({**many, 'mesh': {'data': 96}}, 96)


def test_distillation_pays_for_the_teacher(tmp_path):
  cfg = config(SMALL)
  plain = planned(cfg)
  teacher = section('model', {'name': 'decoder', **LARGE})
  write_run(tmp_path, RunConfig(model=teacher, data=loader.DataConfig()))
  distil = {**cfg['objective'], 'name': 'distill'}
  cfg = {**cfg, 'objective': distil}
  taught = planned({**cfg, 'teacher': str(tmp_path)})
  extra = taught['training FLOPs per token'] - plain['training FLOPs per token']
  assert extra == count.forward_flops(teacher, 1024)
  frozen = taught['bytes per device']['frozen weights']
  assert frozen == pytest.approx(4 * 771e6, rel=4e-3)
  estimated = lambda result, name: result['estimated bytes per device'][name]
  logits = lambda result: estimated(result, 'logits of a chunk')
  assert logits(taught) - logits(plain) == 4 * cfg['objective']['chunk'] * teacher.vocab
  half = planned({**cfg, 'teacher': str(tmp_path), 'dtype': 'bfloat16'})
  assert half['bytes per device']['frozen weights'] == frozen
  copy = estimated(half, 'compute copy of weights')
  assert copy == pytest.approx(2 * (771e6 + 126e6), rel=4e-3)


def test_a_teacher_is_split_over_every_axis_of_the_mesh(tmp_path):
  model = section('model', {**SMALL, 'num_experts': 8})
  write_run(tmp_path, RunConfig(model=model, data=loader.DataConfig()))
  cfg = config(SMALL | {'mlp': 2732}, **{'data.batch_size': 8})
  cfg |= {'objective': {'name': 'distill'}, 'teacher': str(tmp_path)}
  alone = planned(cfg)['bytes per device']['frozen weights']
  split = planned(cfg | {'mesh': {'data': 1, 'expert': 4}}, 4)['bytes per device']['frozen weights']
  assert split == alone / 4


def test_dry_run_needs_no_data_and_writes_nothing(tmp_path):
  command = [sys.executable, '-m', 'slm.train', '--config=configs/project.py', '--dry_run']
  command += ['--config.model.vocab=32000', f'--workdir={tmp_path / "run"}']
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 1 and 'expected --config.model.vocab and --context' in done.stderr
  more = ['--context=1024', '--devices=64', '--config.data.batch_size=256', '--chip=tpu-v5e']
  done = subprocess.run([*command, *more], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert 'data 64' in done.stdout and 'GB' in done.stdout and 'on 64 tpu-v5e' in done.stdout
  assert not (tmp_path / 'run').exists()


def test_this_machine_is_timed(monkeypatch):
  monkeypatch.setattr(plan, '_MEASURED_SECONDS', 1e-9)
  tiny = {'embed': 16, 'num_layers': 1, 'num_heads': 1, 'num_kv_heads': 1, 'mlp': 16, 'vocab': 64}
  cfg = config(SMALL | tiny, **{'mesh.data': 1})
  result = plan.plan(without_data(cfg, 32), 1, 'cpu', 0.4)
  rate, memory = result['chip FLOP/s'], result['bytes per device']
  assert memory['XLA temporaries'] > memory['weights'] and not result['estimated bytes per device']
  assert 'estimated' not in plan.text(result)
  assert 1e3 < rate < 1e15 and result['assumed MFU'] == 1
  assert result['hours'] == pytest.approx(result['FLOPs'] / rate / 3600)
  assert f'here, at the {rate:.3g} FLOP/s of a timed step' in plan.text(result)
  with pytest.raises(ValueError, match='--chip=cpu times a step on this machine, one device'):
    plan.plan(without_data(config(SMALL | tiny, **{'mesh.data': 2}), 32), 2, 'cpu', 0.4)


def test_the_command_that_replaces_estimates_is_named(monkeypatch):
  """Where libtpu is installed, for as many chips as a slice has."""
  found = planned(config(SMALL, **{'data.batch_size': 32}), 32) | {'chip': 'tpu-v5p'}
  argv = [f'--config={arguments.CONFIGS}/lora.py', '--dry_run', '--config.name=a b', '--devices']
  argv += ['32', '--context', '64', '--workdir=x', '--chip=tpu-v5p']
  for libtpu, line in (
    (None, ''),
    (True, "\nexact, in place of estimates: python -m slm.compile --topology=v5p:2x4x4 "
      "--config=configs/lora.py '--config.name=a b' --context 64"),
  ):  # fmt: skip
    monkeypatch.setattr(plan.importlib.util, 'find_spec', lambda _, found=libtpu: found)
    assert plan.exact(found, argv) == line
  assert not plan.exact(found | {'chip': 'h100'}, argv)
  shapes = {4: '2x2x1', 8: '2x2x2', 4096: '16x16x16', 2: None, 96: None, 8192: None}
  for number, shape in shapes.items():
    assert chips.slice_of('tpu-v4', number) == (f'v4:{shape}' if shape else '')
  for number, shape in {4: '2x2', 8: '2x4', 256: '16x16', 512: None}.items():
    assert chips.slice_of('tpu-v6e', number) == (f'v6e:{shape}' if shape else '')


@pytest.mark.parametrize(('scale', 'count'), [('quick', 19), ('long', 448)])
def test_a_study_is_planned_before_it_is_run(scale, count):
  """Equal FLOPs for every family, within what whole steps allow; every run is counted once."""
  from experiments.specialise import run, scales

  lines = run.dry_run(scales.SCALES[scale], 8, 'h100', 0.4).split('\n')
  flops = {line.split()[0]: float(line.split()[6]) for line in lines[1:-1]}
  each = {line.split()[0]: int(line.split()[1]) for line in lines[1:-1]}
  for name in ('mixture', 'project', 'llm', 'importance'):
    assert flops[name] / each[name] == pytest.approx(flops['slm'] / each['slm'], rel=0.03)
  assert lines[-1].startswith(f'in all {count} runs, ')
  assert float(lines[-1].split()[4]) == pytest.approx(sum(flops.values()), rel=0.01)


def test_a_distillation_is_not_planned_without_its_teacher():
  cfg = config(SMALL)
  cfg['objective'] = {**cfg['objective'], 'name': 'distill'}
  with pytest.raises(ValueError, match='teacher: a distillation needs the shape of its teacher'):
    planned(cfg)


def test_the_peak_of_a_device_is_known_by_its_kind():
  assert chips.peak('TPU v5 lite') == chips.CHIPS['tpu-v5e'].flops
  assert chips.peak('NVIDIA H100 80GB HBM3') == chips.CHIPS['h100'].flops
  assert chips.peak('NVIDIA H100 PCIe') is chips.peak(jax.devices()[0].device_kind) is None
