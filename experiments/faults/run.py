"""Kill commands at random moments, and compare what they make with an undisturbed run, bit by bit.

    python -m experiments.faults.run --scale=smoke --out=runs/faults

Every trial starts a command, ends it by SIGKILL or SIGTERM at moments drawn from (seed, trial) over
most of the time that it took undisturbed, starts it again each time, and lets it finish at last.
OUT/trials.jsonl gets a line as each trial ends; trials that have one are not done again.
"""

import collections
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from slm.base import console, files
from slm.runs import checkpoint, load, rundir

SIGNALS = (signal.SIGKILL, signal.SIGTERM)
WORDS = """ship sail harbour wave anchor tide island storm rope court party clause tenant lease
  statute breach notice butter onion simmer pepper roast flour garlic planet orbit comet nebula
  gravity"""


@dataclasses.dataclass(frozen=True)
class Scale:
  """How much is done: kills in all are about trials * kills."""

  documents: int
  steps: int  # of 8 rows; a document fills about five
  trials: int
  kills: int  # in each trial


SCALES = {
  'smoke': Scale(documents=200, steps=30, trials=4, kills=1),
  'full': Scale(documents=200, steps=200, trials=48, kills=3),
}


def write_text(folder: Path, documents: int) -> None:
  """Write documents of random words as JSON lines."""
  rng, lines = np.random.default_rng(0), []
  for _ in range(documents):
    words = rng.choice(WORDS.split(), int(rng.integers(20, 90)))
    lines.append(json.dumps({'text': ' '.join(words)}))
  files.write_text(folder / 'text.jsonl', '\n'.join(lines))


def train(config: str, scale: Scale, here: Path, base: Path, *more: str) -> list[str]:
  """Return the command that trains a model of 30 thousand parameters, saved every fifth step."""
  keys = {
    'data.path': base / 'data', 'data.batch_size': 8, 'steps': scale.steps, 'schedule.warmup': 2,
    'log_every': 1, 'tensorboard': False, 'eval.every': 10, 'eval.max_rows': 32,
    'checkpoint.every': 5, 'checkpoint.keep': 2, 'objective.chunk': 64, 'model.embed': 32,
    'model.num_layers': 2, 'model.num_heads': 2, 'model.num_kv_heads': 2, 'model.head_dim': 16,
    'model.mlp': 64,
  }  # fmt: skip
  options = [f'--config.{key}={value}' for key, value in keys.items()]
  return ['slm.train', f'--config={config}', *options, *more, f'--workdir={here / "run"}']


def stages(scale: Scale) -> dict[str, Callable[[Path, Path], list[str]]]:
  """Return by name the command that works in one directory from what the base directory holds."""
  distil = lambda base: [f'--config.{key}={base / "train/run"}' for key in ('init', 'teacher')]
  return {
    'prepare': lambda here, base: [
      'slm.data.prepare', f'--config=data:generic={base / "text.jsonl"}', f'--out={here / "data"}',
      '--config.tokenizer.name=bytes', '--config.context=64', '--config.levels=(2,)',
      '--config.dims=8', '--config.fit_windows=400', '--config.sizes=(2000,)',
    ],
    'train': lambda here, base: train('pretrain', scale, here, base / 'prepare'),
    'distil': lambda here, base: train('recover', scale, here, base / 'prepare', *distil(base)),
    'evaluate': lambda here, base: ['slm.evaluate', f'--run={here / "run"}', '--on=generic/test'],
  }  # fmt: skip


def digest(here: Path) -> str:
  """Hash what a stage made: rows, parameters, the losses of every step and held-out row."""
  found = hashlib.sha256()
  for path in sorted(here.rglob('*')):
    if path.suffix in ('.array_record', '.npy', '.npz', '.safetensors'):
      found.update(f'{path.relative_to(here)} {files.sha256(path)}'.encode())
  if (here / 'run').exists():
    found.update(json.dumps([x['loss'] for x in rundir.read_metrics(here / 'run')]).encode())
    for leaf in jax.tree.leaves(load.load(here / 'run', load.mesh_for(here / 'run')).theta):
      found.update(np.asarray(leaf).tobytes())
  return found.hexdigest()


class Study:
  """The trials of a scale in a directory."""

  def __init__(self, scale: Scale, out: Path, seed: int):
    self._scale, self._out, self._seed = scale, out.resolve(), seed
    self._base, self._stages = self._out / 'undisturbed', stages(scale)
    cache = {'JAX_COMPILATION_CACHE_DIR': str(self._out / 'cache')}
    self._env = os.environ | cache | {'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}

  def _start(self, stage: str, here: Path) -> subprocess.Popen:
    command = [sys.executable, '-m', *self._stages[stage](here, self._base)]
    return subprocess.Popen(
      command, env=self._env, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )

  def _place(self, stage: str, here: Path) -> None:
    """Make a stage's directory; evaluation works in a copy of the trained run."""
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    if stage == 'evaluate':
      shutil.copytree(self._base / 'train/run', here / 'run')

  def undisturbed(self, stage: str) -> dict[str, Any]:
    """Return {'seconds', 'digest'} of a stage that nothing disturbs; done once."""
    record = self._base / f'{stage}.json'
    if not record.exists():
      self._place(stage, self._base / stage)
      began, process = time.monotonic(), self._start(stage, self._base / stage)
      _, errors = process.communicate()
      if process.returncode:
        raise ValueError(f'{stage}: {errors.strip().splitlines()[-1]}')
      seconds = time.monotonic() - began
      files.write_json(record, {'seconds': seconds, 'digest': digest(self._base / stage)})
    return files.read_json(record)

  def trial(self, number: int) -> dict[str, Any]:
    """Run a trial; return its line: what was sent when, how the command ended, what it made."""
    rng = np.random.default_rng([self._seed, number])
    stage = [*self._stages][number % len(self._stages)]
    expected, here = self.undisturbed(stage), self._out / 'trial'
    self._place(stage, here)
    kills, errors = [], []
    for kill in range(self._scale.kills):
      sent = SIGNALS[(number + number // len(self._stages) + kill + 1) % 2]
      # With programs compiled before, a command is faster than the undisturbed one was.
      moment = float(rng.uniform(0, 0.7 * expected['seconds']))
      process = self._start(stage, here)
      try:
        process.wait(moment)
        sent = 0  # it was faster still
      except subprocess.TimeoutExpired:
        process.send_signal(sent)
      errors.append(process.communicate()[1])
      kills.append({'signal': int(sent), 'seconds': moment, 'status': process.returncode})
    final = self._start(stage, here)
    errors.append(final.communicate()[1])
    damaged = [p for _, p in checkpoint.verify(here / 'run') if p] if stage != 'prepare' else []
    same = not final.returncode and digest(here) == expected['digest']
    return {
      'trial': number, 'stage': stage, 'kills': kills, 'status': final.returncode, 'same': same,
      'tracebacks': sum('Traceback' in text for text in errors), 'damaged': damaged,
    }  # fmt: skip

  def run(self) -> list[dict[str, Any]]:
    """Run the trials that OUT/trials.jsonl lacks; return the lines of all."""
    write_text(self._base, self._scale.documents)
    for stage in self._stages:
      self.undisturbed(stage)
    record = self._out / 'trials.jsonl'
    lines = [json.loads(x) for x in record.read_text().splitlines()] if record.exists() else []
    with console.Progress('trials', self._scale.trials, 'trial') as bar:
      bar.skip(len(lines))
      for number in range(len(lines), self._scale.trials):
        lines.append(self.trial(number))
        files.write_text(record, ''.join(json.dumps(line) + '\n' for line in lines))
        bar.update(1)
    return lines


def table(lines: Sequence[dict[str, Any]]) -> str:
  """Return a table of kills and results by stage."""
  by_stage = collections.defaultdict(list)
  for line in lines:
    by_stage[line['stage']].append(line)
  rows = [
    '| stage | trials | SIGKILL | SIGTERM | same as undisturbed | tracebacks |',
    '| --- | --- | --- | --- | --- | --- |',
  ]
  for stage, trials in {**by_stage, 'all': lines}.items():
    sent = [kill['signal'] for line in trials for kill in line['kills']]
    same, wrong = sum(x['same'] for x in trials), sum(x['tracebacks'] for x in trials)
    counts = [sent.count(int(s)) for s in SIGNALS]
    rows.append(f'| {stage} | {len(trials)} | {counts[0]} | {counts[1]} | {same} | {wrong} |')
  return '\n'.join(rows) + '\n'


def main(_: list[str]) -> None:
  """Run the trials and print the table; fail if one made anything else."""
  f = flags.FLAGS
  out = Path(f.out)
  lines = Study(SCALES[f.scale], out, f.seed).run()
  files.write_text(out / 'table.md', table(lines))
  print(table(lines), end='')
  if wrong := [line['trial'] for line in lines if not line['same'] or line['tracebacks']]:
    raise ValueError(f'{out}/trials.jsonl: trials {wrong} ended otherwise than undisturbed')


if __name__ == '__main__':
  flags.DEFINE_enum('scale', 'smoke', sorted(SCALES), 'How many trials, and of what size.')
  flags.DEFINE_string('out', 'runs/faults', 'Directory of the trials and the table.')
  flags.DEFINE_integer('seed', 0, 'Seed of the moments and signals.')
  console.run(main)
