"""Studies whose runs are compiled for a slice of TPUs in place of running them."""

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
from slm.base import files
from slm.data.loader import DataConfig
from slm.models.config import DecoderConfig
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
  assert len({compiled.digest(run) for run in runs.values()}) < len(runs) / 2


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

  def keep(path, topology, cfg, teacher):
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


def test_what_was_compiled_is_not_compiled_again(tmp_path):
  files.write_json(tmp_path / 'x.json', {'chips': 4})
  assert compiled.keep(tmp_path / 'x.json', 'v5e:2x2', None, None) == {'chips': 4}


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
