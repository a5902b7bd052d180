"""Rules about the code itself: configs build, imports point one way, errors are one line."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs import base, minitron
from experiments.specialise import runs, scales
from slm import objectives
from slm.models.config import DecoderConfig
from slm.runs import load
from slm.runs.config import read
from slm.training import optim
from slm.weights.count import num_params

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(
  p.stem
  for p in (ROOT / 'configs').glob('*.py')
  if p.stem not in ('__init__', 'data') and not p.stem.startswith(('minitron', 'tulu'))
)

# The packages of slm from the ground up: each may import those before it. A file directly in
# slm/ is a command: it may import every package, and nothing imports it.
ORDER = (
  'base', 'weights', 'models', 'data', 'reparam', 'runs', 'objectives', 'interchange', 'reporting',
  'training', 'inference', 'pruning', 'posttraining',
)  # fmt: skip
# Library -> the only packages (or files of them) that may import it.
ONLY = {
  'flax.linen': {'models'},
  'orbax': {'runs/checkpoint.py'},
  'grain': {'data'},
  'sentencepiece': {'data'},
  'tokenizers': {'data'},
  'sklearn': {'data'},
  'optax': {'training'},
  'jinja2': {'data'},
  'gguf': {'interchange/gguf.py'},
  'lm_eval': {'inference/harness.py', 'harness.py'},
  'matplotlib': {'reporting', 'data'},
  'sympy': {'inference/verifiers/worker.py'},
  'math_verify': {'inference/verifiers/worker.py'},
  'jsonschema': {'inference/verifiers/worker.py'},
  'langdetect': {'inference/verifiers/words.py'},
  'yaml': {'runs/launch.py'},
  'apache_beam': {'data/distributed.py', 'data/remote.py'},
}


def imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (a.name for a in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield node.module
      yield from (f'{node.module}.{a.name}' for a in node.names)


def modules(path):
  """Yield the dotted names of slm that a file imports: ('runs', 'load') for slm.runs.load."""
  for name in imports(path):
    if name.startswith('slm.') and name != 'slm.__version__':
      yield tuple(name.split('.')[1:])


@pytest.mark.parametrize('path', sorted((ROOT / 'slm').rglob('*.py')), ids=str)
def test_imports_point_one_way(path):
  place = path.relative_to(ROOT / 'slm').parts
  assert not {n for n in imports(path) if n.split('.')[0] in ('configs', 'experiments')}
  allowed = ORDER if len(place) == 1 else ORDER[: ORDER.index(place[0]) + 1]
  for name in modules(path):
    assert name[0] in allowed, f'{"/".join(place)} imports slm.{".".join(name)}'
  for library, places in ONLY.items():
    if any(n == library or n.startswith(library + '.') for n in imports(path)):
      assert {place[0], '/'.join(place)} & places, f'{library} is imported by {path}'


def test_packages_are_in_the_table_and_commands_say_how_they_are_called():
  packages = {p.parent.name for p in (ROOT / 'slm').glob('*/*.py')}
  assert packages == set(ORDER)
  for path in (ROOT / 'slm').glob('*.py'):
    if path.stem not in ('__init__', '__main__'):
      text = path.read_text()
      assert f'python -m slm.{path.stem}' in ast.get_docstring(ast.parse(text))
      assert "if __name__ == '__main__':" in text


def test_what_is_not_python_ships_too():
  call = next(n for n in ast.walk(ast.parse((ROOT / 'setup.py').read_text()))
              if isinstance(n, ast.keyword) and n.arg == 'package_data')  # fmt: skip
  patterns = ast.literal_eval(call.value)
  shipped = {p for name, globs in patterns.items() for glob in globs
             for p in (ROOT / name.replace('.', '/')).glob(glob)}  # fmt: skip
  tracked = {p for p in (ROOT / 'slm').rglob('*.*') if p.suffix not in ('.py', '.pyc')}
  assert shipped == tracked


def test_no_pickle_and_no_swallowed_failures():
  for path in (ROOT / 'slm').rglob('*.py'):
    tree = ast.parse(path.read_text())
    assert not {'pickle', 'cloudpickle', 'joblib', 'dill'} & set(imports(path)), path
    for node in ast.walk(tree):
      if isinstance(node, ast.ExceptHandler):
        broad = node.type is None or getattr(node.type, 'id', '') == 'Exception'
        assert not broad or isinstance(node.body[-1], ast.Raise), path


@pytest.mark.parametrize('name', CONFIGS)
def test_config_builds_and_adds_no_unknown_key(name):
  config = importlib.import_module(f'configs.{name}').get_config().to_dict()
  assert set(config) == set(base.get_config().to_dict())
  for key in ('data', 'eval', 'optim', 'checkpoint', 'mesh', 'model'):
    assert set(config[key]) == set(base.get_config()[key])
  config['model']['vocab'] = 100
  if name == 'code':  # init decides what it tunes
    network = importlib.import_module('configs.project').get_config().reparam.to_dict()
    config['reparam'] |= {'of': network, 'histogram': (1 / 16,) * 16}
  cfg = read(config)
  load.build(cfg)
  objectives.build(cfg.objective, {})
  optim.schedule(cfg.schedule, cfg.steps)


def test_recipes_train_by_known_keys():
  for name in ('minitron', 'minitron_quick', 'minitron_published'):
    config = importlib.import_module(f'configs.{name}').get_config().to_dict()
    assert set(config) == set(minitron.get_config().to_dict())
    assert set(config['recover']) == set(base.get_config().to_dict())


@pytest.mark.parametrize('name', sorted(scales.SCALES))
def test_study_jobs_come_after_what_they_need_and_cover_the_table(name):
  scale = scales.SCALES[name]
  study = runs.Study(scale, 'data', 256, scale.prepare['tokenizer.vocab'])
  seen = set()
  for job in study.jobs.values():
    settings = job.get('set', {})
    for needed in (settings.get('init'), settings.get('teacher'), job.get('run')):
      assert not needed or needed.partition('@')[0] in seen, job
      run, _, step = (needed or '').partition('@')
      assert not step or int(step) in study.jobs[run]['set']['checkpoint.milestones']
    if settings.get('data.index') and settings.get('data.set', 'generic') == 'generic':
      assert settings['data.index'] in seen
    seen.add(job['name'])
  for row in study.rows:
    for run in (row['run'], *row['generic_runs'], *row['specialise_runs']):
      assert run.removeprefix('runs/').partition('@')[0] in seen


def test_seeds_apart_are_the_whole_study():
  make = lambda *seeds: runs.Study(scales.LONG, 'data', 256, 1024, seeds)
  whole, parts = make(), [make(0), make(2, 1)]
  assert whole.jobs == parts[0].jobs | parts[1].jobs
  assert len(whole.rows) == sum(len(p.rows) for p in parts)


def test_every_run_a_method_needs_is_paid_for():
  study = runs.Study(scales.QUICK, 'data', 128, 2048)
  rows = {r['method']: r for r in study.rows if r['size'] == 20_000}
  paid = {m: (r['generic_runs'], r['specialise_runs']) for m, r in rows.items()}
  names = lambda *found: [f'runs/{n}-0' for n in found]
  tuned = lambda m: f'{m}-licences-20000'
  assert paid == {
    'slm': (names('slm'), names(tuned('slm'))),
    'slm_noft': (names('slm'), []),
    'slm_nopt': ([], names(tuned('slm_nopt'))),
    'importance': ([], names('importance-licences', tuned('importance'))),
    'distill': (names('slm', 'llm'), names(tuned('llm'), tuned('distill'))),
    'mixture': (names('mixture'), names('mixture-licences', tuned('mixture'))),
    'project': (names('project'), names('project-licences', tuned('project'))),
    'llm': (names('llm'), names(tuned('llm'))),
  }


@pytest.mark.parametrize('name', sorted(scales.SCALES))
def test_study_keeps_the_papers_ratios(name):
  """The LLM has about six times the parameters, and the MLP holds about half of the SLM's."""

  scale = scales.SCALES[name]
  count = lambda shape: num_params(DecoderConfig(vocab=scale.prepare['tokenizer.vocab'], **shape))
  small, large = count(scale.small), count(scale.large)
  assert 5.5 < sum(large.values()) / sum(small.values()) < 6.5
  assert 0.42 < small['mlp'] / sum(small.values()) < 0.52


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['slm.train', '--config=configs/base.py', '--config.nope=1', '--workdir=x'],
     'error: --config.nope: configs/base.py has no such key'),
    (['slm.train', '--config=configs/base.py'], '--workdir'),
    (['slm.train', '--config=configs/base.py', '--config.model.tied', 'False', '--workdir=x'],
     "unexpected argument 'False'"),
    (['slm.train', '--config=configs/base.py', '--config.data.path=/nowhere', '--workdir=x'],
     '/nowhere/manifest.json'),
    (['slm.data.prepare', '--config=configs/data.py:generic=/no/*.txt', '--out=x'], '/no/*.txt'),
    (['slm.data.prepare', '--config=configs/data.py:nonsense', '--out=x'], 'nonsense'),
    (['slm.evaluate', '--run=/nowhere'], '/nowhere'),
    (['experiments.specialise.report', '--study=/nowhere'], '/nowhere'),
    (['slm.report', '--study=S'], 'experiments.specialise.report --study=S'),
    (['slm.compare', '--run=A', '--on=law/test'], 'at least two runs'),
    (['slm.specialise'], '--run'),
  ],
)  # fmt: skip
def test_entry_points_fail_with_one_line(arguments, message, tmp_path):
  arguments = [a.replace('configs/', f'{ROOT}/configs/') for a in arguments]
  done = subprocess.run(
    [sys.executable, '-m', *arguments], capture_output=True, text=True, cwd=tmp_path,
    env={'PYTHONPATH': str(ROOT), 'PATH': ''},
  )  # fmt: skip
  assert done.returncode != 0
  assert 'Traceback' not in done.stderr
  assert done.stderr.strip().splitlines()[-1].startswith('error: ')
  assert message in done.stderr.strip().splitlines()[-1]
  assert not (tmp_path / 'x').exists()


@pytest.mark.parametrize('path', sorted((ROOT / 'slm').rglob('*.py')), ids=str)
def test_functions_are_short(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.FunctionDef):
      length = node.end_lineno - node.lineno + 1
      assert length <= 60, f'{path}:{node.lineno} {node.name} has {length} lines'


def test_the_ranges_and_the_pins_name_the_same_packages():
  setup = ast.parse((ROOT / 'setup.py').read_text())
  call = next(x for x in ast.walk(setup) if isinstance(x, ast.Call) and x.keywords)
  ranges = next(k.value for k in call.keywords if k.arg == 'install_requires')
  pins = [x for x in (ROOT / 'requirements.txt').read_text().splitlines() if x[0] != '#']
  name = lambda requirement: re.split('[=>]', requirement)[0]
  assert sorted(map(name, ast.literal_eval(ranges))) == sorted(map(name, pins))
