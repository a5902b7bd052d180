"""Eight simulated CPU devices, strict rank promotion, one tiny data set and config."""

import gc
import importlib.metadata
import json
import os
import pathlib
import random
import shutil
import tempfile

# Runs of the same shapes recur in many tests: compile each program once. By environment, so that
# the workers of a parallel run and the processes that tests start share what is compiled.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  _CACHE = tempfile.TemporaryDirectory(prefix='slm-xla-', ignore_cleanup_errors=True)
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _CACHE.name
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'

# Most of the suite's time is compilation of what runs once: LLVM does not optimise it, and XLA's
# older emitters, which jaxlib 0.10 still has, take half the time of those built on MLIR.
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_backend_optimization_level=0'
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  os.environ['XLA_FLAGS'] += ' --xla_cpu_use_fusion_emitters=false'

import jax
import pytest

# Tracing allocates many objects: by default a tenth of the time is spent looking for cycles.
gc.set_threshold(50_000, 20, 50)

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')

from configs import base  # noqa: E402
from configs import data as data_config  # noqa: E402
from slm.base import schema  # noqa: E402
from slm.data import prepare, settings  # noqa: E402
from slm.training import loop  # noqa: E402
from slm.weights import sharding  # noqa: E402

TOPICS = {
  'river': 'water flows past the old mill and the boats drift slowly under grey willow trees',
  'court': 'the party shall indemnify the licensor against any claim arising under this agreement',
  'lab': 'cells were incubated at low temperature and the protein was measured in each sample',
  'market': 'shares fell as traders sold bonds and the bank raised its forecast for oil prices',
}


def document(rng: random.Random, topic: str, words: int = 60) -> str:
  """Write a document of random words of a topic."""
  return ' '.join(rng.choice(TOPICS[topic].split()) for _ in range(words))


# Files that take longest, in order: begun first, they leave no worker alone at the end.
SLOWEST = (
  'test_slurm', 'test_posttrain_processes', 'test_train', 'test_hf', 'test_minitron', 'test_stage',
  'test_prune_commands',
  'test_continuations', 'test_prune', 'test_reparam', 'test_specialise', 'test_plan', 'test_moe',
  'test_models', 'test_conversation', 'test_distill', 'test_signals', 'test_prune_scores',
  'test_data_prepare', 'test_search', 'test_objectives', 'test_harness', 'test_advise',
  'test_processes', 'test_launch',
)  # fmt: skip


def pytest_collection_modifyitems(items):
  place = {name: i for i, name in enumerate(SLOWEST)}
  items.sort(key=lambda item: place.get(item.path.stem, len(SLOWEST)))


@pytest.fixture(scope='module', autouse=True)
def forget_what_was_compiled():
  """Free programs after a file if there are many: a process has 65,530 memory maps on Linux."""
  yield
  maps = pathlib.Path('/proc/self/maps')
  if not maps.exists() or maps.read_bytes().count(b'\n') > 15_000:
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope='session')
def tiny_data(tmp_path_factory) -> str:
  """Prepare four generic topics and one domain (court), bytes, context 32, levels 2 and 4."""
  root, rng = tmp_path_factory.mktemp('tiny'), random.Random(0)
  for name, topics in (('generic', list(TOPICS)), ('court', ['court'])):
    for split, count in (('train', 80), ('validation', 8), ('test', 8)):
      lines = [json.dumps({'text': document(rng, topics[i % len(topics)])}) for i in range(count)]
      (root / f'{name}-{split}.jsonl').write_text('\n'.join(lines))
  c = data_config.get_config()
  splits = ('train', 'validation', 'test')
  c.sets = {s: {k: str(root / f'{s}-{k}.jsonl') for k in splits} for s in ('generic', 'court')}
  c.out = str(root / 'data')
  c.tokenizer.name = 'bytes'
  c.context, c.levels, c.fit_windows, c.dims = 32, (2, 4), 400, 8
  c.sizes, c.workers = (2000, 8000), 1
  prepare.prepare(schema.read(settings.PrepareConfig, c.to_dict()))
  return c.out


@pytest.fixture
def tiny_config(tiny_data):
  """Return a config that trains four steps of a two-layer model on `tiny_data`."""
  return _tiny_config(tiny_data)


@pytest.fixture(scope='session')
def tiny_config_of(tiny_data):
  """Return a function that makes such a config with changes: the plain dict."""

  def make(**changes):
    c = _tiny_config(tiny_data)
    c.update_from_flattened_dict(changes)
    return c.to_dict()

  return make


@pytest.fixture(scope='session')
def train_once(tmp_path_factory):
  """Return a function that puts a config's run at a path; a config is trained once and copied."""
  runs = {}

  def make(config, path):
    devices = sharding.make_mesh(config['mesh']).size  # tests make meshes of fewer than there are
    key = json.dumps([config, devices], sort_keys=True)
    if key not in runs:
      runs[key] = tmp_path_factory.mktemp('trained') / 'run'
      loop.train(config, runs[key])
    shutil.copytree(runs[key], path)

  return make


def _tiny_config(tiny_data):
  c = base.get_config()
  c.steps, c.log_every, c.tensorboard = 4, 1, False
  c.model.update(embed=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, mlp=32)
  c.data.update(path=tiny_data, batch_size=8)
  c.schedule.update(peak=1e-2, warmup=1)
  c.eval.update(every=2, max_rows=16, batch_size=8)
  c.checkpoint.every = 2
  c.objective.chunk = 64
  return c
