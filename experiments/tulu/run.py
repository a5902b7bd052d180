"""Run the whole study: data, trainings, measurements, report. It continues where it stopped.

python -m experiments.tulu.run --scale=smoke --out=runs/tulu_smoke
python -m experiments.tulu.run --scale=cpu --out=runs/tulu
"""

import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import common
from experiments.tulu import measure, report, tasks
from experiments.tulu.results import Found
from experiments.tulu.runs import RUNS, SCALES, STAGES, Run, Scale
from slm.base import console, files
from slm.data import decontaminate, loader
from slm.inference import answering, rewards
from slm.objectives import heldout
from slm.training import loop
from slm.weights import sharding

CONTEXT = {'talks': 64, 'whole': 64, 'prompts': 10, 'facts': 34, 'questions': 34, 'pairs': 64}
MAX_TOKENS = {'sums': 4, 'rules': tasks.MAX_RULES, 'facts': 2}
ASK = {'sums': 'prompts/sums', 'rules': 'prompts/rules', 'facts': 'questions/facts'}
TESTS = ('sums', 'rules', 'copies')  # splits of the set of conversations: test_sums and so on
_SEED = 17  # of the data, which are the same for all seeds of trainings
_SPEAK = lambda row: {'prompt': row['prompt'], 'response': row['response']}
_ASKED = lambda row: {key: row[key] for key in ('prompt', 'verifier', 'label')}


class Study:
  """The study in a directory: what is there is not made again."""

  def __init__(self, scale: Scale, root: Path):
    self.scale, self.root, self.runs = scale, root, root / 'runs'
    self.text, self.mesh = root / 'text', sharding.make_mesh({'data': -1})
    self.path = Found(scale, root).path

  def prepare(self) -> None:
    """Write the tasks as text and prepare them, but for the pairs, which need a model."""
    s, seed = self.scale, _SEED
    tasks.write_tokenizer(self.root / 'tokenizer')
    sums = random.Random(seed).sample(tasks.sums(), s.sums)
    self.sums = tasks.split(sums, seed, *s.heldout)
    self.rules = tasks.split(tasks.ruled(), seed, *s.heldout_rules)
    self._talks()
    self._facts()
    for split in self.sums:
      made = {
        'sums': self.sums[split], 'rules': tasks.asked(self.rules[split], 'official'),
        'released': tasks.asked(self.rules[split], 'released'),
      }  # fmt: skip
      for name, rows in made.items():
        tasks.write(self.text / f'{name}-{split}.jsonl', rows, _ASKED)
    files_of = lambda name: {split: f'{name}-{split}.jsonl' for split in self.sums}
    self._prepare('prompts', 'prompts', {x: files_of(x) for x in ('sums', 'rules', 'released')})

  def _prepare(self, folder: str, kind: str, sources: dict[str, dict[str, str]]) -> None:
    changes = {
      'tokenizer.name': 'huggingface', 'tokenizer.path': str(self.root / 'tokenizer'),
      'chat.kind': kind, 'context': CONTEXT[folder.partition('-')[0]], 'workers': 1,
    }  # fmt: skip
    common.prepare_data(sources, changes, (), str(self.text), self.root / 'data' / folder)

  def _talks(self) -> None:
    """Prepare the demonstrations: of sums one right and one wrong, of rules half that obey."""
    s, rng, made = self.scale, random.Random(_SEED), {}
    copied = tasks.split(tasks.copies(s.copies, _SEED), _SEED, s.copies // 10, s.copies // 10)
    for split in self.sums:
      right = [{**x, 'response': x['answer']} for x in self.sums[split]]
      wrong = [{**x, 'response': tasks.corrupted(rng, x['answer'])} for x in self.sums[split]]
      rules = [
        {**x, 'response': tasks.obeying(rng, x['rules']) if i % 2 else tasks.text(rng)}
        for x in tasks.asked(self.rules[split], 'official')
        for i in range(2 * max(s.demonstrations // 2, 1))
      ]
      copies = [{**x, 'response': x['answer']} for x in copied[split]]
      parts = {'sums': right + wrong, 'rules': rules, 'copies': copies}
      if split == 'test':
        made |= {f'test_{name}': part for name, part in parts.items()}
      else:
        whole = {tuple(_SPEAK(x).values()): x for part in parts.values() for x in part}
        made[split] = rng.sample(list(whole.values()), len(whole))
    for name, rows in made.items():
      tasks.write(self.text / f'talks-{name}.jsonl', rows, _SPEAK)
    spoken = {name: f'talks-{name}.jsonl' for name in made}
    self._prepare('talks', 'conversations', {'sft': spoken})
    # The same tokens with an empty prompt: the template puts nothing between it and the answer.
    joined = lambda row: {'prompt': '', 'response': row['prompt'] + row['response']}
    tasks.write(self.text / 'whole-train.jsonl', made['train'], joined)
    self._prepare('whole', 'conversations', {'sft': {**spoken, 'train': 'whole-train.jsonl'}})

  def _facts(self) -> None:
    """Plant half of a test in training rows, and drop what the 8-gram rule finds."""
    s = self.scale
    rows = tasks.facts(s.facts + s.facts // 4 + s.heldout_facts, _SEED)
    test, rows = rows[: s.heldout_facts], rows[s.heldout_facts :]
    train, validation = rows[: s.facts], rows[s.facts :]
    planted = train + test[: s.heldout_facts // 2]
    planted = random.Random(_SEED).sample(planted, len(planted))
    tasks.write(self.text / 'facts-leaky.jsonl', planted, _SPEAK)
    tasks.write(self.text / 'facts-validation.jsonl', validation, _SPEAK)
    tasks.write(self.text / 'facts-test.jsonl', test, _ASKED)
    out = self.root / 'decontaminated'
    decontaminate.decontaminate(decontaminate.Request(
      train=(f'leaky={self.text / "facts-leaky.jsonl"}:prompt',),
      eval=(f'facts={self.text / "facts-test.jsonl"}:prompt',), out=str(out), action='drop-rows',
      workers=1,
    ))  # fmt: skip
    (clean,) = (out / 'clean').rglob('*.jsonl')
    kept = [row for _, row in measure.lines(clean)]
    tasks.write(self.text / 'facts-cleaned.jsonl', kept)
    asked, kept = ({x['prompt'] for x in rows} for rows in (test, kept))
    dropped = {row['prompt'] for row in planted} - kept
    counts = {'planted': len(test) // 2, 'dropped': len(dropped), 'right': len(dropped & asked)}
    files.write_json(self.root / 'leaks.json', counts)
    other = {'validation': 'facts-validation.jsonl'}
    sets = {x: {'train': f'facts-{x}.jsonl', **other} for x in ('leaky', 'cleaned')}
    self._prepare('facts', 'conversations', sets)
    self._prepare('questions', 'prompts', {'facts': {'train': 'facts-test.jsonl'}})

  def trained(self, run: Run, seed: int) -> None:
    """Train a run with all settings that it is tried with, and measure it."""
    if not run.grid:
      self._train(run, seed, {}, self.path(run.name, seed))
    elif seed == self.scale.seeds[0]:
      for cell in run.cells(self.scale.grids):
        path = self.runs / f'{run.name}-{seed}' / measure.label(cell)
        self._train(run, seed, cell, path)
        if run.asked:
          self._ask(path, None, run.asked[0], 'validation')
    else:
      path = self.path(run.name, seed)
      cells = {measure.label(cell): cell for cell in run.cells(self.scale.grids)}
      self._train(run, seed, cells[path.name], path)
    self.measured(run, seed)

  def _train(self, run: Run, seed: int, cell: dict[str, Any], path: Path) -> None:
    """Train a run with settings of its grid."""
    config, stage = STAGES[run.stage]
    folder, name = run.data.format(seed=seed).split('/')
    steps = self.scale.steps[run.stage]
    settings = {
      'seed': seed, 'steps': steps, 'data.path': str(self.root / 'data' / folder),
      'data.set': name, 'tensorboard': False, 'eval.every': 0, 'eval.max_rows': 64,
      'checkpoint.every': steps, **({'epochs': 0.0} if config != 'grpo' else {}),
      **self.scale.shape, **stage, **run.set, **cell,
    }  # fmt: skip
    if 'schedule.warmup' in settings:
      settings['schedule.warmup'] = min(settings['schedule.warmup'], steps - 1)
    if run.name == 'sft':
      settings['checkpoint.milestones'] = (max(steps // 4, 1),)
    settings['init'] = str(self.path(run.start, seed)) if run.start else ''
    loop.train(common.config(config, settings), path, reward=rewards.reward)

  def measured(self, run: Run, seed: int) -> None:
    """Answer test prompts, score held-out pairs, and take losses of held-out conversations."""
    path = self.path(run.name, seed)
    for task in run.asked:
      facts = task == 'facts'
      self._ask(path, None if facts else self.path('sft', seed), task, 'train' if facts else 'test')
    if run.stage != 'facts':
      names = [f'sft/test_{test}' for test in TESTS]
      heldout.run(path, str(self.root / 'data' / 'talks'), names, self.mesh, 64)
    if run.stage == 'dpo':
      for start in (path, self.path('sft', seed)):
        for kind in ('norm', 'plain'):
          self._score(start, f'own_{run.asked[0]}', seed, kind)

  def _ask(self, path: Path, start: Path | None, task: str, split: str) -> None:
    """Measure a run's answers to the prompts of a split."""
    folder, name = ASK[task].split('/')
    data = str(self.root / 'data' / folder)
    families = {'official': name, **({'released': 'released'} if task == 'rules' else {})}
    labels = {
      x: [entry['verifiers'] for entry in loader.Split(data, y, split).labels()]
      for x, y in families.items()
    }
    measure.keep(
      path / 'measured' / f'{task}-{split}.npz',
      lambda: measure.answer(
        path, start, data, f'{name}/{split}', labels, self.scale.samples, MAX_TOKENS[task],
        self.mesh,
      ),
    )  # fmt: skip

  def _score(self, path: Path, name: str, seed: int, kind: str) -> None:
    data = str(self.root / 'data' / f'pairs-{seed}')
    measure.keep(
      path / 'measured' / f'{name}-{kind}.npz',
      lambda: {'scores': measure.pairs(path, data, f'{name}/test', kind, self.mesh)},
    )

  def pairs(self, seed: int) -> None:
    """Prepare a seed's pairs: of its own answers, of a weaker model's, and of demonstrations."""
    s, start = self.scale, self.path('sft', seed)
    folder, rng = self.text / f'pairs-{seed}', random.Random(seed)
    asked = {
      'own_sums': (start, self.sums['train'][: s.asked], self.sums['test']),
      'own_rules': (start, tasks.asked(self.rules['train'], 'official') * s.repeats,
                    tasks.asked(self.rules['test'], 'official') * s.repeats),
    }  # fmt: skip
    asked['weak_rules'] = (f'{start}@{max(s.steps["sft"] // 4, 1)}', asked['own_rules'][1], None)
    found = {}
    for name, (run, *prompts) in asked.items():
      for split, rows in zip(('train', 'test'), prompts, strict=True):
        if rows:
          found[f'{name}-{split}'] = self._answered(run, folder / f'{name}-{split}', rows)
    found['made_rules-train'] = [self._made(rng, x) for x in asked['own_rules'][1]]
    fewest = min(len(rows) for name, rows in found.items() if name.endswith('rules-train'))
    sets: dict[str, dict[str, str]] = {}
    for name, rows in found.items():
      few = rows[:fewest] if name.endswith('rules-train') else rows
      tasks.write(folder / f'{name}.jsonl', few)
      sets.setdefault(name.partition('-')[0], {})[name.partition('-')[2]] = (
        f'pairs-{seed}/{name}.jsonl'
      )
    self._prepare(f'pairs-{seed}', 'pairs', sets)

  def _answered(self, run: str | Path, out: Path, rows: list[tasks.Row]) -> list[tasks.Row]:
    """Return the pairs of a model's own answers, one that passes and one that fails."""
    asked = tasks.write(out.with_name(f'{out.name}-asked.jsonl'), rows, _ASKED)
    answering.write(
      str(run), f'{asked}', str(out), count=self.scale.answers, max_tokens=tasks.MAX_RULES,
      temperature=1.0, top_p=1.0, seed=0, batch_size=192, relax=False,
    )  # fmt: skip
    return [row for _, row in measure.lines(out / 'pairs.jsonl')]

  def _made(self, rng: random.Random, row: tasks.Row) -> tasks.Row:
    """Return a pair of a demonstration and a text that violates a rule."""
    official = tuple(rule.official for rule in row['rules'])
    chosen = tasks.obeying(rng, row['rules'])
    while measure.passes(official, rejected := tasks.text(rng)):
      pass
    return {'prompt': row['prompt'], 'chosen': chosen, 'rejected': rejected}

  def run(self, chosen: Sequence[Run]) -> None:
    """Make runs; a seed at a time, so that all are there early."""
    jobs = [(seed, run) for seed in self.scale.seeds for run in chosen]
    for i, (seed, run) in enumerate(jobs, 1):
      print(f'[{i}/{len(jobs)}] {run.name}-{seed}', file=sys.stderr, flush=True)
      self.trained(run, seed)
      if run.name == 'sft':
        self.pairs(seed)


def main(_: list[str]) -> None:
  """Run the study that the flags name."""
  f = flags.FLAGS
  console.required('out')
  if f.scale not in SCALES:
    raise ValueError(f'--scale: expected one of {sorted(SCALES)}, found {f.scale!r}')
  if unknown := [name for name in f.only if name not in RUNS]:
    raise ValueError(f'--only: expected some of {", ".join(RUNS)}, found {unknown}')
  common.cache(f.cache)
  began = time.monotonic()
  scale = SCALES[f.scale]
  study = Study(scale, Path(f.out))
  study.prepare()
  study.run([RUNS[name] for name in RUNS if name in (f.only or scale.only or RUNS)])
  print(f'all runs done in {time.monotonic() - began:.0f} s', file=sys.stderr)
  report.write(Found(scale, study.root))


if __name__ == '__main__':
  flags.DEFINE_string('scale', 'smoke', f'One of {sorted(SCALES)}.')
  flags.DEFINE_string('out', 'runs/tulu', 'Where data, runs and the report go.')
  flags.DEFINE_list('only', [], 'Make these runs alone; the report says what was not run.')
  flags.DEFINE_string('cache', '~/.cache/slm/xla', "JAX's compilation cache.")
  console.run(main)
