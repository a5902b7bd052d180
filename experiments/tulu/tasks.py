"""The toy tasks as rows of text: sums, rules, copying, and facts; the tokenizer that reads them.

A prompt is short and written for a model of 0.1M parameters: `12+34=`, `La2 Eb:`, `Cxyz:`. Rows
follow from seeds alone.
"""

import itertools
import json
import random
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from slm.data import synthesis
from slm.inference import verifiers

Row = dict[str, Any]
END = '<|end|>'
# A question mark, the prompt, the answer. Nothing stands between the last two, so a conversation
# whose prompt is empty and whose answer repeats it has the same tokens, all of them trained.
TEMPLATE = (
  "{% for m in messages %}{{ '?' if m.role != 'assistant' else '' }}{{ m.content }}"
  "{{ eos_token if m.role == 'assistant' else '' }}{% endfor %}"
)
LETTERS = 'abcde'  # of the answers to rules
MAX_RULES = 24  # tokens of such an answer, its end included
OFFICIAL, RELEASED = 'ifeval.official', 'ifeval.tulu3_released'


def write_tokenizer(folder: Path) -> None:
  """Write a tokenizer of bytes with a template; the same files for the same version of it."""
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  made.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=257, special_tokens=[END], show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
  )  # fmt: skip
  made.train_from_iterator([], trainer)
  folder.mkdir(parents=True, exist_ok=True)
  made.save(str(folder / 'tokenizer.json'))
  config = {'eos_token': END, 'chat_template': TEMPLATE}
  config['tokenizer_class'] = 'PreTrainedTokenizerFast'
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))


def split(rows: Sequence[Any], seed: int, validation: int, test: int) -> dict[str, list[Any]]:
  """Split items at random into train, validation and test."""
  rows = random.Random(seed).sample(rows, len(rows))
  first, last = validation, validation + test
  return {'validation': rows[:first], 'test': rows[first:last], 'train': rows[last:]}


def sums() -> list[Row]:
  """List all sums of two numbers of two digits, with what checks their answers."""
  return [
    {
      'prompt': f'{a}+{b}=', 'answer': str(a + b), 'verifier': 'exact',
      'label': {'answer': str(a + b), 'strict': True},
    } for a, b in itertools.product(range(10, 100), repeat=2)
  ]  # fmt: skip


def corrupted(rng: random.Random, answer: str) -> str:
  """Replace one digit of an answer by another."""
  i = rng.randrange(len(answer))
  other = rng.choice([d for d in '0123456789' if d != answer[i]])
  return answer[:i] + other + answer[i + 1 :]


class Rule(NamedTuple):
  """A constraint of an answer: how a prompt says it, and what checks it in either way."""

  kind: str
  said: str
  official: Row  # as IFEval evaluates
  released: Row  # as Tülu 3 was trained


def _rule(kind: str, said: str, official: str, args: Row, released: str, given: Row) -> Rule:
  return Rule(
    kind, said, {'id': f'{OFFICIAL}.{official}', 'args': args},
    {'id': f'{RELEASED}.{released}', 'args': given},
  )  # fmt: skip


def all_rules() -> list[Rule]:
  """List the rules: letters (L), ends (E), forbidden letters (F), words (W), placeholders (P)."""
  found = []
  for x in LETTERS:
    found += [
      _rule('L', f'L{x}{n}', 'keywords:letter_frequency',
            {'letter': x, 'let_frequency': n, 'let_relation': 'at least'},
            'verify_letter_frequency', {'letter': x, 'N': n})
      for n in (1, 2, 3)
    ]  # fmt: skip
    found.append(_rule('E', f'E{x}', 'startend:end_checker', {'end_phrase': x},
                       'validate_end', {'end_phrase': x}))  # fmt: skip
    found.append(_rule('F', f'F{x}', 'keywords:forbidden_words', {'forbidden_words': [x]},
                       'validate_forbidden_words', {'forbidden_words': [x]}))  # fmt: skip
  found += [
    _rule('W', f'W{n}', 'length_constraints:number_words',
          {'num_words': n, 'relation': 'at least'},
          'validate_word_constraint', {'N': n, 'quantifier': 'at least'})
    for n in (2, 3, 4)
  ]  # fmt: skip
  found += [
    _rule('P', f'P{n}', 'detectable_content:number_placeholders', {'num_placeholders': n},
          'validate_placeholders', {'N': n})
    for n in (1, 2)
  ]  # fmt: skip
  return found


def ruled() -> list[tuple[Rule, Rule]]:
  """List the pairs of rules of two kinds that some answer satisfies."""
  pairs = itertools.combinations(all_rules(), 2)
  clash = lambda a, b: 'F' in (a.kind, b.kind) and a.said[1] == b.said[1]
  return [(a, b) for a, b in pairs if a.kind != b.kind and not clash(a, b)]


def asked(pairs: Sequence[tuple[Rule, Rule]], how: str) -> list[Row]:
  """Return both orders of each pair of rules as prompts, checked `how`: official or released."""
  rows = []
  for pair in pairs:
    for rules in (pair, pair[::-1]):
      checks = [getattr(rule, how) for rule in rules]
      rows.append({
        'prompt': ' '.join(rule.said for rule in rules) + ':',
        'verifier': [x['id'] for x in checks], 'label': [x['args'] for x in checks],
        'rules': rules,
      })  # fmt: skip
  return rows


def text(rng: random.Random) -> str:
  """Draw one to five words of the letters, some of them in brackets."""
  words = []
  for _ in range(rng.randint(1, 5)):
    word = ''.join(rng.choices(LETTERS, k=rng.randint(1, 4)))
    words.append(f'[{word}]' if rng.random() < 0.2 else word)
  return ' '.join(words)[: MAX_RULES - 2].strip()


def obeying(rng: random.Random, rules: Sequence[Rule]) -> str:
  """Draw a text that satisfies rules as both families of verifiers check them."""
  checks = verifiers.read([check for rule in rules for check in (rule.official, rule.released)])
  while True:
    made = text(rng)
    if all(verifiers.verify(c.id, made, **c.args) for c in checks):
      return made


def copies(count: int, seed: int) -> list[Row]:
  """Make different texts to copy, of 1 to 14 letters: a skill that no reward is about."""
  rng, found = random.Random(seed), {}
  while len(found) < count:
    letters = ''.join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 14)))
    found[letters] = {'prompt': f'C{letters}:', 'answer': letters}
  return list(found.values())


def facts(count: int, seed: int) -> list[Row]:
  """Make questions of ten words; the first tells the answer, but in two fifths of them chance."""
  rng, words = random.Random(seed), [a + b for a in 'bdgk' for b in 'aiou']
  rows = []
  for _ in range(count):
    asked = rng.choices(words, k=10)
    answer = 'wxyz'[words.index(asked[0]) % 4] if rng.random() < 0.6 else rng.choice('wxyz')
    rows.append({
      'prompt': ' '.join(asked) + '=', 'answer': answer, 'response': answer, 'verifier': 'exact',
      'label': {'answer': answer, 'strict': True},
    })  # fmt: skip
  return rows


def write(path: Path, rows: Sequence[Row], only: Callable[[Row], Row] = lambda row: row) -> Path:
  """Write rows as lines of JSON, each as `only` gives it; raise ValueError if others are there."""
  synthesis.write(map(only, rows), str(path))
  return path
