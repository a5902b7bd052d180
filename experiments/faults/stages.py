"""The commands that are killed, where they run, and whether they made what they should."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file

from slm.base import files
from slm.runs import checkpoint, load, rundir

# What other devices may change, as sums are rounded in another order; see `distances`.
TOLERANCE = {'losses': 1e-5, 'parameters': 1e-5}
# The order of the trials, over and over: what is made of saves most often, what takes long once.
TURNS = (
  'prepare', 'train', 'distil', 'evaluate', 'minitron', 'meshes', 'processes', 'train', 'meshes',
)  # fmt: skip
POSTTRAIN = ('dpo', 'grpo', 'dpo-cached', 'grpo-slots')
_HASHED = ('.array_record', '.npy', '.npz')  # JSON holds times and paths
_HASHED_NAMES = ('labels.jsonl',)
# Of a step and of held-out rows; those of answers tell what was drawn and what it was worth.
_FIGURES = (
  'loss', 'eval_loss', 'reward', 'rollout_tokens', 'undecided', 'eval_reward', 'margin',
  'eval_margin',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Place:
  """Devices that a run trains on: simulated ones of one process, or one of each process."""

  name: str = ''
  devices: int = 1  # of a process
  mesh: tuple[str, ...] = ()  # AXIS=SIZE
  processes: int = 1

  @property
  def flags(self) -> list[str]:
    """Return the flags of slm.train."""
    return [f'--config.mesh.{size}' for size in self.mesh]


ONE = Place()
FOUR = Place('-fsdp-4', 4, ('data=1', 'fsdp=4'))
EIGHT = Place('-data-2-fsdp-2-tensor-2', 8, ('data=2', 'fsdp=2', 'tensor=2'))
TWO_PROCESSES = Place('-processes-2', processes=2)


@dataclasses.dataclass(frozen=True)
class Stage:
  """A command that works in one directory from what the base directory holds of `needs`.

  Its starts take the places in turn. `like` is the stage whose result it should have, itself if
  that is ''. With `trained` its directory holds a copy of the trained run.
  """

  command: Callable[[Path, Path], list[str]]
  places: tuple[Place, ...] = (ONE,)
  like: str = ''
  trained: bool = False
  needs: tuple[str, ...] = ()


def stages(steps: int) -> dict[str, Stage]:
  """Return the stages by name, in an order in which each finds what it needs."""
  config = lambda keys: [f'--config.{key}={value}' for key, value in keys.items()]
  training = {
    'steps': steps, 'schedule.warmup': 2, 'tensorboard': False, 'data.batch_size': 8,
    'eval.every': 10, 'eval.max_rows': 32, 'checkpoint.every': 5, 'objective.chunk': 64,
    'log_every': 1,  # else the metrics have a line more where a signal made it save
  }  # fmt: skip
  shape = {'embed': 32, 'num_layers': 2, 'num_heads': 2, 'num_kv_heads': 2, 'head_dim': 16}
  model = {f'model.{key}': value for key, value in {**shape, 'mlp': 64}.items()}

  def train(name: str, *more: str, data: str = 'prepare') -> Callable[[Path, Path], list[str]]:
    """Return the command of a model of 30 thousand parameters, saved every fifth step."""
    keys = {**training, **model, 'checkpoint.keep': 2}
    return lambda here, base: [
      'slm.train', f'--config={name}', *config(keys), f'--config.data.path={base}/{data}/data',
      *(text.format(base=base) for text in more), f'--workdir={here}/run',
    ]  # fmt: skip

  def minitron(here: Path, base: Path) -> list[str]:
    """Return a recipe with all its parts: probe, correction, scores, cut, distillation, export."""
    short = training | {'steps': 10, 'schedule.warmup': 1, 'eval.every': 5}
    keys = {f'{part}.{k}': v for part in ('recover', 'correct') for k, v in short.items()}
    keys |= {'sizes': 'mlp=32', 'calibrate.rows': 32, 'probe.steps': 6, 'probe.worth': -1.0}
    keys |= {'teacher': here / 'run', 'data': base / 'prepare/data', 'cut.align': 8}
    return ['slm.minitron', '--config=minitron', *config(keys), f'--workdir={here}/recipe']

  prepare = lambda here, base: [
    'slm.data.prepare', f'--config=data:generic={base}/text.jsonl', f'--out={here}/data',
    '--config.tokenizer.vocab=320', '--config.context=64', '--config.levels=(2,)',
    '--config.dims=8', '--config.fit_windows=400', '--config.sizes=(2000,)',
  ]  # fmt: skip
  pretrain = train('pretrain')
  evaluate = lambda here, base: ['slm.evaluate', f'--run={here}/run', '--on=generic/test']
  distil = train('recover', *(f'--config.{k}={{base}}/train/run' for k in ('init', 'teacher')))
  after = {'needs': ('train',)}
  return {
    'prepare': Stage(prepare),
    'train': Stage(pretrain, needs=('prepare',)),
    'distil': Stage(distil, **after),
    'evaluate': Stage(evaluate, trained=True, **after),
    'minitron': Stage(minitron, trained=True, **after),
    'meshes': Stage(pretrain, (ONE, FOUR, EIGHT), 'train', **after),
    'processes': Stage(pretrain, (TWO_PROCESSES, TWO_PROCESSES, ONE), 'train', **after),
    **_posttraining(train),
  }


def _posttraining(train: Callable[..., Any]) -> dict[str, Stage]:
  """Return the stages of preference pairs and of rewards, by the function that makes commands."""

  def prepare(kind: str, context: int) -> Stage:
    command = lambda here, base: [
      'slm.data.prepare', f'--config=data:{kind}={base}/{kind}.jsonl', f'--out={here}/data',
      f'--config.chat.kind={kind}', '--config.chat.template=tulu', f'--config.context={context}',
      f'--config.tokenizer.path={base}/prepare/data/tokenizer', '--config.heldout=(0.2,0)',
    ]  # fmt: skip
    return Stage(command, needs=('train',))

  start = ('--config.init={base}/train/run', '--config.schedule.peak=1e-3')
  epochs = ('--config.epochs=0', '--config.schedule.warmup_share=0')
  dpo, cached = (
    train('dpo', *start, *epochs, *more, data='pairs')
    for more in ((), ('--config.teacher_cache={base}/reference/signals',))
  )
  answers = {'samples': 4, 'max_tokens': 10, 'score_unended': True}
  drawn = [f'--config.objective.{key}={value}' for key, value in answers.items()]
  grpo, slots = (
    train('grpo', *start, *drawn, *more, data='prompts')
    for more in ((), ('--config.objective.slots=8',))
  )
  reference = lambda here, base: [
    'slm.signals', f'--run={base}/train/run', f'--data={base}/pairs/data', '--on=pairs/train',
    '--mode=targets', f'--out={here}/signals',
  ]  # fmt: skip
  return {
    'pairs': prepare('pairs', 96),
    'prompts': prepare('prompts', 48),
    'reference': Stage(reference, needs=('pairs',)),
    'dpo': Stage(dpo, needs=('pairs',)),
    'dpo-cached': Stage(cached, needs=('reference',)),
    'grpo': Stage(grpo, needs=('prompts',)),
    'grpo-slots': Stage(slots, needs=('prompts',)),
  }


def _runs(here: Path) -> Iterator[Path]:
  """Yield the run directories below a directory."""
  yield from (path.parent for path in sorted(here.rglob('checkpoints')))


def _losses(run: Path) -> list[float]:
  """Return the losses and other figures of every step, and of held-out rows."""
  lines = rundir.read_metrics(run)
  return [line[key] for key in _FIGURES for line in lines if key in line]


def _parameters(run: Path) -> list[np.ndarray]:
  return [np.asarray(x) for x in jax.tree.leaves(load.load(run, load.mesh_for(run)).theta)]


def digests(here: Path) -> dict[str, str]:
  """Hash what a stage made: files of rows and numbers; of every run, parameters and losses."""
  found = {}
  for path in sorted(here.rglob('*')):
    name = str(path.relative_to(here))
    if path.suffix in _HASHED or path.name in _HASHED_NAMES:
      found[name] = files.sha256(path)
    elif path.suffix == '.safetensors':  # its header may hold times and paths
      found[name] = _hash(*(x for pair in sorted(load_file(path).items()) for x in pair))
  for run in _runs(here):
    found[f'{run.relative_to(here)} losses'] = _hash(json.dumps(_losses(run)))
    found[f'{run.relative_to(here)} parameters'] = _hash(*_parameters(run))
  return found


def _hash(*parts: str | np.ndarray) -> str:
  """Hash texts and arrays."""
  found = hashlib.sha256()
  for part in parts:
    found.update(part.encode() if isinstance(part, str) else part.tobytes())
  return found.hexdigest()


def distances(here: Path, base: Path) -> dict[str, float]:
  """Return how far a run is from another: largest difference of a loss, of parameters.

  That of losses above 1 is relative; that of parameters the norm of the difference over the norm.
  """
  a, b = np.array(_losses(here / 'run')), np.array(_losses(base / 'run'))
  if a.shape != b.shape:
    return dict.fromkeys(TOLERANCE, float('inf'))
  flat = lambda run: np.concatenate([x.ravel() for x in _parameters(run / 'run')])
  x, y = flat(here), flat(base)
  norm = lambda v: float(np.linalg.norm(v))
  losses = float(np.max(np.abs(a - b) / np.maximum(np.abs(b), 1)))
  return {'losses': losses, 'parameters': norm(x - y) / norm(y)}


def damaged(here: Path) -> list[str]:
  """Return what is wrong with the checkpoints below a directory."""
  return [wrong for run in _runs(here) for _, wrong in checkpoint.verify(run) if wrong]


def in_a_save(here: Path) -> bool:
  """Return whether the newest save of a run below a directory is not finished and sealed."""
  for run in _runs(here):
    folder = run / 'checkpoints'
    steps = checkpoint.saved_steps(folder)
    if any('tmp' in path.name for path in folder.iterdir()):
      return True
    if steps and not (folder / str(steps[0]) / 'checksums.json').exists():
      return True
  return False


def batches(notes: Path) -> dict[int, list[list[str]]]:
  """Return what `watched` noted: by step, the hashes of the groups that were taken, each time.

  The groups of several processes are joined, as far as all of them took the batch.
  """
  found = {}
  for start in sorted(notes.glob('start-*')):
    parts = [_noted(path) for path in sorted(start.glob('batches.*.jsonl'))]
    for step in set.intersection(*map(set, parts)) if parts else ():
      found.setdefault(step, []).append([group for part in parts for group in part[step]])
  return found


def _noted(path: Path) -> dict[int, list[str]]:
  texts = path.read_text().splitlines(keepends=True)
  lines: list[dict[str, Any]] = [json.loads(text) for text in texts if text.endswith('\n')]
  return {line['step']: line['groups'] for line in lines}
