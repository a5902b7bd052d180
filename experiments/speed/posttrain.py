"""Measure what post-training costs: steps on conversations beside text, and drawing answers.

    python -m experiments.speed.posttrain --out=runs/posttrain
    python -m experiments.speed.posttrain --out=runs/posttrain --run=models/smollm2-135m-instruct

The first measures 17M random weights, the second a run that has a chat template. Needs torch and
transformers, the extra slm[reference]. What OUT has of the same settings is not measured again.
"""

import dataclasses
import functools
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from experiments.speed import steps
from experiments.speed.run import decoder, machine
from slm import models
from slm.base import console, files, schema
from slm.data import chat, rows
from slm.data.loader import DataConfig
from slm.inference import latency, scoring
from slm.interchange import convert
from slm.objectives import answers
from slm.reporting import tables
from slm.runs import load
from slm.runs.config import PolicyConfig, RunConfig, section
from slm.weights import sharding
from slm.weights.axes import Params

RANDOM = '17M random weights'
# What answers them differs in length: a word, a line, a paragraph, and more than there is room for.
PROMPTS = (
  'What is the capital of France? Answer with one word.',
  'Write a story about a lighthouse keeper who finds a message in a bottle.',
  'Is 17 a prime number? Answer yes or no.',
  'Explain in two sentences why the sky is blue.',
  'Tom has 3 boxes of 12 pencils and gives away 7 of them. How many does he have left?',
  'List three fruits.',
  'Write a polite email that asks a colleague to move a meeting from Monday to Tuesday.',
  'Translate "good morning" into Spanish.',
)


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What is measured of a model.

  Attributes:
    rows, context: of a training step.
    answers: how many are drawn, `batch` of them at once, `samples` to each prompt.
    max_tokens: of an answer.
    rounds: of steps and of rollouts.
    shape: of random weights; None: that of a run.
  """

  rows: int
  context: int
  answers: int
  batch: int
  samples: int
  max_tokens: int
  rounds: tuple[int, int]
  shape: dict[str, Any] | None = None


SMALL = Sizes(8, 512, 64, 32, 4, 128, (10, 3), decoder(384, 8, 64, 1024))
REAL = Sizes(2, 512, 64, 32, 4, 96, (5, 2))


class Subject(NamedTuple):
  """A model, the ids that end its answers and those it may choose, prompts, and its export."""

  model: models.Model
  params: Params
  ends: frozenset[int]
  known: np.ndarray
  prompts: list[list[int]]
  exported: Path


def random_subject(sizes: Sizes, folder: Path) -> Subject:
  """Return random weights; a fiftieth of the ids end an answer, which makes it 50 tokens long."""
  model = models.build(section('model', sizes.shape))
  vocab, rng = model.cfg.vocab, np.random.default_rng(0)
  params = jax.jit(model.init)(jax.random.key(0))
  cfg = RunConfig(steps=0, context=sizes.context, model=model.cfg, data=DataConfig())
  load.write_dense(folder / 'run', cfg, params, [])
  convert.export_model(folder / 'run', folder / 'exported')
  ends = frozenset(rng.choice(vocab, vocab // 50, replace=False).tolist())
  lengths = rng.integers(16, 65, sizes.answers // sizes.samples)
  prompts = [rng.integers(0, vocab, n).tolist() for n in lengths]
  return Subject(model, params, ends, np.ones(vocab, bool), prompts, folder / 'exported')


def real_subject(run: str, sizes: Sizes, folder: Path) -> Subject:
  """Return a run that has a chat template, with PROMPTS in it."""
  mesh = sharding.make_mesh({'data': 1}, jax.devices()[:1])
  scorer = scoring.open_model(run, mesh, 1)
  tok = scorer.tok
  if not tok.chat_template:
    raise ValueError(f'--run={run}: expected a run whose tokenizer has a chat template')
  convert.export_model(run, folder / 'exported', 'float32')
  options = {'add_generation_prompt': True, **chat.variables(tok)}
  ask = lambda text: chat.render([{'role': 'user', 'content': text}], tok.chat_template, **options)
  asked = [chat.encode(tok, ask(text)) for text in PROMPTS]
  prompts = [asked[i % len(asked)] for i in range(sizes.answers // sizes.samples)]
  model = models.build(scoring.shape(run))
  return Subject(model, scorer.params, tok.ends, tok.known, prompts, folder / 'exported')


def training(subject: Subject, sizes: Sizes) -> tuple[dict[str, Callable], dict[str, Any]]:
  """Return a step on rows of text, and the same on rows of conversations, whose answers train."""
  size, rng = (sizes.rows, sizes.context), np.random.default_rng(0)
  cut = lambda length: np.cumsum(rng.random(size) < 1 / length, axis=-1, dtype=np.int32)
  text = {'tokens': rng.integers(0, subject.model.cfg.vocab, size, np.int32)}
  text['segments'] = cut(100) + 1  # texts of 100 tokens, turns of 50
  kinds = {'text': text, 'conversations': {**text, 'trained': (cut(50) % 2).astype(np.uint8)}}
  shape, entries, facts = schema.plain(subject.model.cfg), {}, {'tokens': {}, 'trained share': {}}
  for name, columns in kinds.items():
    batch = {name: x[None, :, None] for name, x in rows.batch(columns).items()}
    batch['condition'] = np.zeros((1, sizes.rows), np.int32)
    entries[name], about = steps.train_step(shape, *size, 'float32', batch=batch)
    facts['tokens'][name] = about['tokens']
    facts['trained share'][name] = float(batch['weights'].mean())
  return entries, facts


def rollouts(subject: Subject, sizes: Sizes) -> tuple[dict[str, Callable], dict[str, Any]]:
  """Return answers drawn in slots and in batches by slm, and in the same batches by transformers.

  Those of transformers end after as many tokens as those that slm drew in slots.
  """
  from experiments.speed import reference  # torch: ten seconds

  prompts, samples = subject.prompts, sizes.samples
  longest = max(map(len, prompts))
  batch = {
    'inputs': np.array([x + [0] * (longest - len(x)) for x in prompts], np.int32),
    'length': np.array([len(x) for x in prompts], np.int32),
    'row': np.arange(len(prompts), dtype=np.int32),
  }
  in_slots = _drawing(subject, sizes, sizes.batch)
  in_batches = _drawing(subject, sizes, 0)
  at_once = sizes.batch // samples
  parts = [
    {name: x[i : i + at_once] for name, x in batch.items()} for i in range(0, len(prompts), at_once)
  ]
  lengths = np.asarray(in_slots(batch)['lengths'])
  of_batches = np.concatenate([in_batches(part)['lengths'] for part in parts])
  repeated = [prompt for prompt in prompts for _ in range(samples)]
  facts = {
    'answers': lengths.size,
    'tokens': dict.fromkeys(('slots', 'transformers'), int(lengths.sum()))
    | {'batches': int(of_batches.sum())},
    'lengths (5 %, median, 95 %)': np.percentile(lengths, (5, 50, 95)).tolist(),
    'longest of each batch, mean': float(lengths.reshape(-1, sizes.batch).max(1).mean()),
    'prompt tokens': int(batch['length'].sum()) * samples,
  }
  return {
    'slots': lambda: jax.block_until_ready(in_slots(batch)),
    'batches': lambda: jax.block_until_ready([in_batches(part) for part in parts]),
    'transformers': reference.draw(
      subject.exported, repeated, lengths.ravel().tolist(), sizes.batch
    ),
  }, facts


def _drawing(subject: Subject, sizes: Sizes, slots: int) -> Callable[[rows.Rows], rows.Rows]:
  """Return a function that draws answers to prompts as objectives.answers does in training."""
  cfg = PolicyConfig(max_tokens=sizes.max_tokens, slots=slots)
  draw = functools.partial(answers.draw, cfg, subject.model, subject)
  jitted = jax.jit(lambda params, batch, key: draw(params, batch, key, sizes.samples))
  return lambda batch: jitted(subject.params, batch, jax.random.key(1))


# By part: what makes its contestants, and its ratios of seconds per token with their bars.
PARTS = {
  'steps': (training, {('conversations', 'text'): '<= 1.05'}),
  'rollouts': (
    rollouts,
    {('transformers', 'slots'): '>= 2', ('transformers', 'batches'): ''},
  ),
}  # fmt: skip


def measured(run: str, sizes: Sizes, part: str) -> dict[str, Any]:
  """Measure a part of a run, or of random weights where it is ''."""
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    subject = real_subject(run, sizes, folder) if run else random_subject(sizes, folder)
    entries, facts = PARTS[part][0](subject, sizes)
    times = latency.interleave(entries, sizes.rounds[list(PARTS).index(part)])
  return {'part': part, 'seconds': times, 'facts': facts, 'machine': machine()}


def ratios(entry: dict[str, Any]) -> list[list[str]]:
  """Return rows (what, median, least and most of the rounds, bar) of an entry."""
  found, tokens = [], entry['facts']['tokens']
  for (a, b), bar in PARTS[entry['part']][1].items():
    per_token = [
      (x / tokens[a]) / (y / tokens[b])
      for x, y in zip(entry['seconds'][a], entry['seconds'][b], strict=True)
    ]
    spread = f'{min(per_token):.3g} to {max(per_token):.3g}'
    found.append([f'{a} / {b}', f'{statistics.median(per_token):.3f}', spread, bar])
  return found


def table(entries: dict[str, dict[str, Any]]) -> str:
  """Write the markdown of what has been measured."""
  head = ['seconds per token', 'median of rounds', 'rounds', 'bar']
  found = [[f'{name}: {what}', *row] for name, e in entries.items() for what, *row in ratios(e)]
  taken = [
    [f'{name}: {who}', *(f'{fn(s):.3f}' for fn in (statistics.median, min, max))]
    for name, e in entries.items()
    for who, s in e['seconds'].items()
  ]
  lines = ['# What post-training costs', '', tables.markdown((head, found)), '']
  lines += [tables.markdown((['', 'median s', 'min s', 'max s'], taken)), '']
  for name, e in entries.items():
    lines += [f'- {name}: {key}: {value}' for key, value in (e['facts'] | e['machine']).items()]
  return '\n'.join([*lines, ''])


def write(
  out: Path, run: str, parts: Sequence[str], sizes: Sizes, measure: Callable = measured
) -> str:
  """Measure what is not in a directory with these sizes; write and return its table."""
  path = out / 'posttrain.json'
  entries = files.read_json(path) if path.exists() else {}
  asked = json.loads(json.dumps(dataclasses.asdict(sizes)))
  for part in parts:
    name = f'{Path(run).name or RANDOM}, {part}'
    if entries.get(name, {}).get('asked') != asked:
      entries[name] = {'asked': asked, **measure(run, sizes, part)}
      files.write_text(path, json.dumps(entries, indent=1) + '\n')
      files.write_text(path.with_suffix('.md'), table(entries))
  return table(entries)


def main(_: list[str]) -> None:
  """Measure what is not there yet, and print the table."""
  console.required('out')
  f = flags.FLAGS
  print(write(Path(f.out), f.run, f.part or list(PARTS), REAL if f.run else SMALL))


if __name__ == '__main__':
  flags.DEFINE_string('out', 'experiments/speed/results', 'Directory of the results.')
  flags.DEFINE_string('run', '', 'Run that has a chat template; none: random weights.')
  flags.DEFINE_multi_enum('part', [], list(PARTS), 'Measure this part alone.')
  console.run(main)
