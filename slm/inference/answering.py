"""Answers of a model to prompts with labels, checked, and what is kept of them: no judge."""

import functools
import hashlib
import json
import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from slm.base import artifact, console, files, stage
from slm.data import chat, conversations, sources
from slm.data.settings import ChatConfig
from slm.inference import scoring, verifiers
from slm.models.decode import sampled
from slm.runs import ledger
from slm.weights import sharding, tree
from slm.weights.count import forward_flops

_ABOUT = 'answers.json'
_SHARD = 32  # prompts
KEPT = ('best', 'passing', 'pairs', 'relaxed')  # files of conversations, and of pairs


class Prompt(NamedTuple):
  """A prompt with its label; `relaxed` lacks the constraint number `dropped` (-1: none does)."""

  messages: list[dict[str, Any]]
  checks: tuple[verifiers.Check, ...]
  tools: list[dict[str, Any]] | None
  dropped: int
  relaxed: list[dict[str, Any]]


@artifact.writes('out')
def write(
  run: str, spec: str, out: str, *, count: int, max_tokens: int, temperature: float, top_p: float,
  seed: int, batch_size: int, relax: bool,
) -> dict[str, int]:  # fmt: skip
  """Sample `count` answers to each prompt, check them, and write what is kept; return its counts.

  The answers and their verdicts are in answers-*.jsonl, a shard at a time: a second call
  continues. With `relax` prompts that state two constraints or more are also answered without one
  of them. What is kept is in KEPT: `select` says what. summary.json has the counts and the cost.

  Raises:
    ValueError: if a prompt has no label that can be checked, the model has no chat template, a
      number is out of range, or the directory holds other answers.
  """
  folder, prompts = Path(out), read(spec, seed, relax)
  mesh = sharding.fit_mesh(scoring.shape(run).embed)
  if min(count, max_tokens, batch_size) < 1 or not 0 < temperature < math.inf or not 0 < top_p <= 1:
    raise ValueError(
      'expected --answers, --max_tokens and --batch_size of at least 1, --temperature above 0 and '
      '0 < --top_p <= 1'
    )
  scorer = scoring.open_model(run, mesh, batch_size)
  if not scorer.tok.chat_template:
    raise ValueError(f'{run}: its tokenizer holds no chat template, which answers to prompts need')
  if max_tokens >= scorer.context:
    raise ValueError(f'--max_tokens={max_tokens}: expected 1 to {scorer.context - 1} (context - 1)')
  lines = [json.dumps([p.messages, p.checks, p.tools]) for p in prompts]
  about = {
    'run': stage.absolute(run), 'step': scorer.step, 'weights': tree.weights_hash(scorer.params),
    'prompts_sha256': hashlib.sha256('\n'.join(lines).encode()).hexdigest(),
    'prompts': len(prompts), 'answers': count, 'max_tokens': max_tokens,
    'temperature': temperature, 'top_p': top_p, 'seed': seed, 'batch_size': batch_size,
    'relax': relax,
  }  # fmt: skip
  artifact.claim(folder / _ABOUT, about, 'other answers')
  sampler = functools.partial(sampled, temperature=temperature, top_k=0, top_p=top_p)
  ask = functools.partial(_ask, scorer, count=count, max_tokens=max_tokens, sampler=sampler)
  with jax.set_mesh(mesh), console.Progress('answer', len(prompts), 'prompts') as progress:
    for start in range(0, len(prompts), _SHARD):
      path, part = folder / f'answers-{start:08d}.jsonl', prompts[start : start + _SHARD]
      if not path.exists():
        began, key = time.monotonic(), jax.random.fold_in(jax.random.key(seed), start)
        made, heard = ask(part, key)
        files.write_text(path, ''.join(json.dumps(x) + '\n' for x in made))
        seconds = (time.monotonic() - began) * jax.device_count()
        sizes = [a['tokens'] for x in made for a in x['answers'] + x['relaxed']]
        tokens = sum(sizes) + heard
        flops = tokens * forward_flops(scoring.shape(run), tokens // len(sizes) if sizes else 1)
        ledger.spend(folder, 'answer', sum(sizes), flops, seconds, ancestors=[about['run']])
      progress.update(len(part))
  counts = select(folder, seed)
  phases = ledger.read_ledger(folder)['phases']
  cost = {name: sum(p[name] for p in phases) for name in ('tokens', 'flops', 'device_seconds')}
  files.write_json(folder / 'summary.json', {'counts': counts, 'cost': cost})
  return counts


def read(spec: str, seed: int, relax: bool) -> list[Prompt]:
  """Read prompts with labels; with `relax` a seeded constraint is dropped where two are stated.

  Raises:
    ValueError: naming the line, if its label cannot be checked; if a library is missing; or if
      `relax` finds no prompt.
  """
  conversations.whole(spec)
  kind, prompts = ChatConfig('prompts'), []
  for path in conversations.expand(spec, kind):
    rows = zip(
      conversations.read(path, spec, kind, ''), sources.records(conversations.file(path)),
      strict=True,
    )  # fmt: skip
    for (text, _), (line, record) in rows:
      found = json.loads(text)
      try:
        checks = verifiers.read(found['verifiers'])
      except ValueError as e:
        raise ValueError(f'{conversations.file(path)}:{line}: {e}') from None
      rng = random.Random(f'{seed} {len(prompts)}')
      relaxed = _relaxed(found['prompt'], record, len(checks), rng) if relax else (-1, [])
      prompts.append(Prompt(found['prompt'], checks, found.get('tools'), *relaxed))
  if not prompts:
    raise ValueError(f'{spec}: holds no prompt')
  verifiers.ready([p.checks for p in prompts])
  if relax and not any(p.relaxed for p in prompts):
    raise ValueError(
      f'{spec}: --relax: no prompt states two constraints or more: make them with '
      'slm.synthesise constraints --least=2'
    )
  return prompts


def _relaxed(
  messages: Sequence[Mapping[str, Any]], record: Mapping[str, Any], count: int, rng: random.Random
) -> tuple[int, list[dict[str, Any]]]:
  """Return the number of a dropped constraint and the messages without its sentence."""
  request, sentences = record.get('request'), record.get('sentences') or []
  whole = ' '.join([request or '', *sentences])
  if len(sentences) != count or count < 2 or messages[-1]['content'] != whole:
    return -1, []
  dropped = rng.randrange(count)
  text = ' '.join([request, *(x for i, x in enumerate(sentences) if i != dropped)])
  return dropped, [*messages[:-1], {**messages[-1], 'content': text}]


def _ask(
  scorer: scoring.Scorer, prompts: Sequence[Prompt], key: jax.Array, *, count: int,
  max_tokens: int, sampler: Any,
) -> tuple[list[dict[str, Any]], int]:  # fmt: skip
  """Return a line for every prompt, with checked answers, and how many tokens were read."""
  special, tok = chat.variables(scorer.tok), scorer.tok
  room = scorer.context - max_tokens
  asked, requests = [], []
  for i, prompt in enumerate(prompts):
    for name, messages in (('answers', prompt.messages), ('relaxed', prompt.relaxed)):
      if messages:
        options = {'tools': prompt.tools, 'add_generation_prompt': True}
        ids = chat.encode(tok, chat.render(messages, tok.chat_template, **options, **special))
        copies = count if len(ids) <= room else 0
        asked += [(i, name)] * copies
        requests += [ids] * copies
  texts = _sample(scorer, requests, key, max_tokens, sampler, room)
  labels = [prompts[i].checks for i, _ in asked]
  scores = verifiers.scores([text for text, *_ in texts], labels)
  lines = [
    {
      'prompt': p.messages, 'verifiers': [{'id': c.id, 'args': c.args} for c in p.checks],
      'answers': [], 'dropped': p.dropped, 'relaxed': [],
    } for p in prompts
  ]  # fmt: skip
  for (i, name), (text, size, ended), score in zip(asked, texts, scores, strict=True):
    lines[i][name].append({
      'text': text, 'tokens': size, 'ended': ended,
      'values': [v.value for v in score.verdicts],
      'undecided': sum(bool(v.undecided) for v in score.verdicts),
    })  # fmt: skip
  return lines, sum(map(len, requests))


def _sample(
  scorer: scoring.Scorer, requests: Sequence[Sequence[int]], key: jax.Array, max_tokens: int,
  sampler: Any, room: int,
) -> list[tuple[str, int, bool]]:  # fmt: skip
  """Return the text that follows each request, its number of tokens, and whether it ended."""
  texts: list[Any] = [None] * len(requests)
  where = sharding.batch_sharding(scorer.mesh)
  groups = scoring.batches([len(r) for r in requests], scorer.batch_size, room)
  for number, (size, members) in enumerate(groups):
    padded = scoring.left_padded([requests[i] for i in members], scorer.batch_size, size)
    how = max_tokens, sampler, jax.random.fold_in(key, number)
    out = scorer.generate(scorer.params, *jax.device_put(padded, where), *how)
    for i, ids, n in zip(members, np.asarray(out.tokens), np.asarray(out.lengths), strict=False):
      ended = int(ids[n - 1]) in scorer.tok.ends
      text = scorer.tok.continued(requests[i], ids[: n - ended].tolist())
      texts[i] = text, int(n), ended
  return texts


def select(folder: Path, seed: int) -> dict[str, int]:
  """Write what is kept of the answers in a directory; return counts of prompts and of answers.

  Answers that did not end, or are blank, are not kept. `best` has for each prompt the conversation
  with the answer that satisfies most of its label; `passing` all different answers that satisfy
  all of it; `pairs` a passing and a failing answer; `relaxed` a passing answer and, rejected, one
  to the prompt without a constraint, which violates that constraint and fewest of the others.

  Every prompt is counted once: too_long, unusable (no answer is kept), none_pass, all_pass, or
  mixed, of which there are `pairs`; and every answer: cut, blank, passing or failing.
  """
  kept: dict[str, list[dict[str, Any]]] = {name: [] for name in KEPT}
  names = (
    'prompts', 'too_long', 'unusable', 'none_pass', 'all_pass', 'mixed', 'answers', 'cut', 'blank',
    'passing', 'failing', 'undecided', 'relaxable', 'relaxed_none_pass', 'relaxed_none_violates',
  )  # fmt: skip
  counts = Counter(dict.fromkeys(names, 0))
  for number, line in enumerate(_lines(folder)):
    counts.update(_tally(line))
    rng = random.Random(f'{seed} {number}')
    for name, rows in _keep(line, rng).items():
      kept[name] += rows
    if line['relaxed']:
      outcome = _relaxed_outcome(line)
      counts.update({'relaxable': 1, **({outcome: 1} if outcome else {})})
  for name, rows in kept.items():
    files.write_text(folder / f'{name}.jsonl', ''.join(json.dumps(x) + '\n' for x in rows))
    counts[f'kept_{name}'] = len(rows)
  return dict(counts)


def _lines(folder: Path) -> Iterator[dict[str, Any]]:
  for path in sorted(folder.glob('answers-*.jsonl')):
    for _, line in sources.records(str(path)):
      yield line


def _usable(answers: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  return [a for a in answers if a['ended'] and a['text'].strip()]


def _passes(answer: Mapping[str, Any]) -> bool:
  return all(value >= 1 for value in answer['values'])


def _tally(line: Mapping[str, Any]) -> dict[str, int]:
  """Return the counts of one prompt and of its answers."""
  answers, usable = line['answers'], _usable(line['answers'])
  passing = sum(map(_passes, usable))
  if not answers:
    state = 'too_long'
  elif not usable:
    state = 'unusable'
  elif passing == 0:
    state = 'none_pass'
  else:
    state = 'all_pass' if passing == len(usable) else 'mixed'
  cut = sum(not a['ended'] for a in answers)
  return {
    'prompts': 1, state: 1, 'answers': len(answers), 'cut': cut,
    'blank': len(answers) - cut - len(usable), 'passing': passing,
    'failing': len(usable) - passing,
    'undecided': sum(a['undecided'] for a in answers + line['relaxed']),
  }  # fmt: skip


def _violating(line: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  """Return the usable answers to the relaxed prompt that violate what it lacks."""
  return [a for a in _usable(line['relaxed']) if a['values'][line['dropped']] < 1]


def _relaxed_outcome(line: Mapping[str, Any]) -> str:
  """Return why a prompt gives no relaxed pair, '' if it gives one."""
  if not any(map(_passes, _usable(line['answers']))):
    return 'relaxed_none_pass'
  return '' if _violating(line) else 'relaxed_none_violates'


def _keep(line: Mapping[str, Any], rng: random.Random) -> dict[str, list[dict[str, Any]]]:
  """Return the rows of every file that one prompt gives."""
  usable = _usable(line['answers'])
  passing, failing = [a for a in usable if _passes(a)], [a for a in usable if not _passes(a)]
  said = lambda answer: {'role': 'assistant', 'content': answer['text']}
  talk = lambda answer: {'messages': [*line['prompt'], said(answer)]}
  kept: dict[str, list[dict[str, Any]]] = {}
  if usable:
    kept['best'] = [talk(max(usable, key=lambda a: sum(a['values'])))]
  kept['passing'] = [talk(a) for a in {a['text']: a for a in passing}.values()]
  chosen = rng.choice(passing) if passing else None
  pair = lambda rejected: {
    'prompt': line['prompt'], 'chosen': [said(chosen)], 'rejected': [said(rejected)]
  }  # fmt: skip
  if chosen and failing:
    kept['pairs'] = [pair(rng.choice(failing))]
  violating = _violating(line)
  if chosen and violating:
    kept['relaxed'] = [pair(max(violating, key=lambda a: sum(a['values'])))]
  return kept
