"""Studies whose runs are compiled for a slice of TPUs in place of running them."""

import concurrent.futures
import dataclasses
import json
import os
import subprocess
import sys

import pytest

from experiments import compiled
from experiments.minitron import run as minitron
from experiments.minitron import smollm2
from experiments.minitron.scales import SCALES as MINITRON
from experiments.minitron.students import STUDENTS
from experiments.specialise import run as specialise
from experiments.specialise.scales import SCALES
from slm.data.loader import DataConfig
from slm.models.config import DecoderConfig
from slm.reparam.projection import ProjectConfig
from slm.runs.config import RunConfig, write_run
from slm.training import aot, program

LIBTPU = os.environ.get('SLM_LIBTPU', '')


@pytest.mark.parametrize('scale', ['quick', 'paper'])
def test_every_training_of_a_scale_is_listed_with_its_own_step(scale):
  runs = {run.name: run for run in specialise.outline(SCALES[scale])}
  kinds = {run.cfg.reparam.name for run in runs.values()}
  assert kinds >= ({'mixture', 'project', 'code', 'lora', 'mask'} if scale == 'paper' else {'full'})
  domain = SCALES[scale].domains[0]
  size = SCALES[scale].sizes[0]
  assert runs[f'distill-{domain}-{size}-0'].teacher == runs['llm-0'].cfg.model
  for name, run in runs.items():
    if run.cfg.reparam.name == 'code':
      network = runs['project-0'].cfg
      assert (run.cfg.reparam.of, run.cfg.model) == (network.reparam, network.model), name
  programs = {compiled.digest(run) for run in runs.values()}
  assert len(programs) == {'quick': 7, 'paper': 20}[scale] < len(runs) / 2


def test_a_program_has_another_name_with_whatever_decides_it(monkeypatch):
  run = next(r for r in specialise.outline(SCALES['quick']) if r.teacher)
  cfg, name = run.cfg, compiled.digest(run)
  part = lambda section, **keys: {section: dataclasses.replace(getattr(cfg, section), **keys)}
  changes = [
    part('model', num_layers=9), part('objective', temperature=3.0), part('mesh', fsdp=2),
    {'reparam': ProjectConfig()}, {'context': 7}, {'dtype': 'bfloat16'}, part('optim', clip=0.0),
    *(part('data', **{key: 2 * getattr(cfg.data, key)}) for key in ('batch_size', 'accum')),
    part('data', level=2), part('data', level=2, rows_per_group=2),
    part('data', level=2, order='histogram'),
  ]  # fmt: skip
  others = [dataclasses.replace(run, cfg=dataclasses.replace(cfg, **change)) for change in changes]
  others += [dataclasses.replace(run, teacher=None), dataclasses.replace(run, teacher=cfg.model)]
  assert len({name, *map(compiled.digest, others)}) == 1 + len(others)
  rates = part('schedule', peak=1.0) | {'steps': 7, 'seed': 7}
  assert compiled.digest(compiled.Run('x', dataclasses.replace(cfg, **rates), run.teacher)) == name
  for made_by in ('libtpu', 'code', 'jax'):
    other = compiled._made_by() | {made_by: 'other'}
    monkeypatch.setattr(compiled, '_made_by', lambda other=other: other)
    assert compiled.digest(run) != name, made_by
    monkeypatch.undo()


def test_students_are_listed_with_those_that_they_are_cut_from():
  chosen = [s for s in STUDENTS if s.name in ('in_thirds', 'width_lm_equal', 'l2_l2')]
  runs = {run.name: run for run in minitron.outline(MINITRON['gpu'], chosen)}
  corrected = {'teacher', 'corrected', 'corrected_control'}
  students = {'in_thirds', 'in_thirds_1', 'in_thirds_2', 'width_lm_equal', 'width'}
  assert set(runs) == corrected | {f'{name}-{seed}' for name in students for seed in range(3)}
  assert runs['in_thirds-0'].cfg.model.num_layers == 6 and runs['width-0'].cfg.model.embed == 512
  assert runs['width_lm_equal-0'].cfg.steps > 1.3 * runs['width-0'].cfg.steps
  assert not runs['width_lm_equal-0'].teacher and runs['width-0'].teacher.embed == 768


def test_students_of_a_known_model_are_listed_from_its_config(tmp_path):
  shape = {'embed': 576, 'num_layers': 30, 'num_heads': 9, 'num_kv_heads': 3, 'head_dim': 64}
  write_run(tmp_path, RunConfig(model=DecoderConfig(vocab=49_152, **shape), data=DataConfig()))
  listed = smollm2.outline(smollm2.SCALES['smollm2_gpu'], str(tmp_path), smollm2.STUDENTS)
  runs = {run.name: run for run in listed}
  assert runs['vocabulary-0'].teacher.vocab == runs['vocabulary-0'].cfg.model.vocab == 16_384
  assert runs['depth-0'].teacher.num_layers == 2 * runs['depth-0'].cfg.model.num_layers == 30
  assert not runs['depth_lm-0'].teacher and runs['depth_lm-0'].cfg.data.accum == 4


def test_programs_are_compiled_once_on_the_slice_their_rows_divide_over(tmp_path, monkeypatch):
  monkeypatch.setattr(aot, 'devices', lambda topology: range(64))
  first = next(run for run in specialise.outline(SCALES['quick']) if run.name == 'slm-0')
  change = lambda cfg, **data: dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **data))
  longer = dataclasses.replace(first.cfg, steps=2 * first.cfg.steps, seed=5)
  runs = [
    first,
    compiled.Run('longer', longer),
    compiled.Run('wide', change(first.cfg, batch_size=64)),
    compiled.Run('odd', change(first.cfg, batch_size=3)),
  ]
  asked = []

  def keep(path, topology, run):
    cfg = run.cfg
    asked.append((topology, cfg.data.batch_size, path.parent.name))
    if cfg.data.batch_size == 3:
      return {'topology': topology, 'error': 'no'}
    seconds = {'compute': 0.5, 'memory': 2.0}
    return {'topology': topology, 'seconds': seconds, 'chips': 16, 'memory share': 0.5,
            'memory': {'weights': 1e9}}  # fmt: skip

  monkeypatch.setattr(compiled, 'keep', keep)
  table = compiled.study(runs, 'v5e:8x8', tmp_path)
  # 16 rows divide over 16 of 64 chips, 64 over all, and 3 over no slice: that is an error.
  assert asked == [
    ('v5e:4x4', 16, 'v5e-4x4'),
    ('v5e:8x8', 64, 'v5e-8x8'),
    ('v5e:8x8', 3, 'v5e-8x8'),
  ]
  lines = table.splitlines()
  assert len(lines) == 1 + 4 + 1
  hours = [program.run_cost(run.cfg, 2.0, 16)['chip-hours'] for run in runs[:3]]
  assert [line.split()[9] for line in lines[1:4]] == [f'{n:,.3g}' for n in hours]
  assert lines[4].split()[2] == 'no' and lines[4].endswith('no')
  total = f'at least {sum(hours):,.3g} chip-hours; 1 that do not compile or fit are left out'
  assert lines[-1] == f'in all 4 runs of 3 programs, {total}'
  assert (tmp_path / 'compiled-v5e-8x8.md').read_text().count('\n') == 2 + 4


class Pool:
  """In place of a process: what `run` is asked for, here."""

  def __init__(self, *_, **__):
    pass

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass

  def submit(self, function, *args):
    done = concurrent.futures.Future()
    done.set_result(function(*args))
    return done


@pytest.fixture
def small(monkeypatch):
  """Return a run whose compilation, as often as it is asked for, is a list's last entry."""
  answers = []

  def answer(*_):
    if isinstance(answers[-1], Exception):
      raise answers[-1]
    return answers[-1]

  monkeypatch.setattr(aot, 'devices', lambda topology: range(4))
  monkeypatch.setattr(aot, 'report', lambda *_: 'as text')
  monkeypatch.setattr(aot, 'compile_step', answer)
  shape = {'embed': 8, 'num_layers': 1, 'num_heads': 1, 'num_kv_heads': 1, 'head_dim': 8, 'mlp': 8}
  cfg = RunConfig(model=DecoderConfig(vocab=16, **shape), data=DataConfig())
  return compiled.Run('x', cfg), answers


def test_what_was_compiled_is_compiled_again_only_if_it_may_be_another(
  small, tmp_path, monkeypatch
):
  monkeypatch.setattr(concurrent.futures, 'ProcessPoolExecutor', Pool)
  (run, answers), path = small, tmp_path / 'x.json'
  step = lambda flops: aot.Compiled(1, {'weights': 1.0}, flops, 1.0, 1.0, [], 0)
  answers.append(ValueError('XLA: INTERNAL'))
  assert compiled.keep(path, 'v5e:2x2', run)['error'] == 'XLA: INTERNAL'
  answers.append(aot.DoesNotFitError('needs more'))  # the error was no final answer
  for _ in range(2):
    assert compiled.keep(path, 'v5e:2x2', run)['error'] == 'needs more'
    answers.append(step(2.0))
  assert not path.with_suffix('.txt').exists()
  wide = dataclasses.replace(run, cfg=dataclasses.replace(run.cfg, context=7))
  assert compiled.keep(path, 'v5e:2x2', wide)['flops'] == 2  # an edited cell of one name
  assert path.with_suffix('.txt').read_text() == 'as text\n'
  answers.append(step(3.0))
  assert compiled.keep(path, 'v5e:2x2', wide)['flops'] == 2
  assert compiled.keep(path, 'v5e:4x4', wide)['flops'] == 3
  answers.append(step(4.0))
  monkeypatch.setattr(compiled, '_made_by', lambda: {'libtpu': 'newer'})
  assert compiled.keep(path, 'v5e:4x4', wide)['flops'] == 4


def die(*_):
  """In place of a compilation that ends its process."""
  os.abort()


def test_a_compilation_that_dies_is_an_error_of_its_program_alone(small, tmp_path, monkeypatch):
  run, path = small[0], tmp_path / 'x.json'
  monkeypatch.setattr(compiled, '_compile', die)
  found = compiled.keep(path, 'v5e:2x2', run)
  assert found['error'] == 'the compiler ended its process' and found['trained'] == 600
  monkeypatch.setattr(concurrent.futures, 'ProcessPoolExecutor', Pool)
  monkeypatch.setattr(compiled, '_compile', lambda *_: ({'final': True}, ''))
  assert 'error' not in compiled.keep(path, 'v5e:2x2', run)  # it is asked again


@pytest.mark.skipif(not LIBTPU, reason='SLM_LIBTPU is not set: make libtpu')
def test_a_study_is_compiled_for_tpus_that_are_not_here(tmp_path):
  paths = os.pathsep.join(filter(None, [os.environ.get('PYTHONPATH', ''), LIBTPU]))
  env = os.environ | {'PYTHONPATH': paths, 'JAX_PLATFORMS': 'cpu'}
  command = [sys.executable, '-m', 'experiments.minitron.run', '--scale=smoke', f'--out={tmp_path}']
  command += ['--only=scratch_lm', '--topology=v5e:2x2']
  done = subprocess.run(command, capture_output=True, text=True, env=env)
  assert done.returncode == 0, done.stderr
  assert 'in all 4 runs of 2 programs, at least' in done.stdout and 'left out' not in done.stdout
  written = list((tmp_path / 'compiled/v5e-2x2').iterdir())
  assert len(written) == 4  # each as JSON and as text
  found = [json.loads(path.read_text()) for path in written if path.suffix == '.json']
  assert all(x['chips'] == 4 and x['memory']['XLA temporaries'] for x in found)
