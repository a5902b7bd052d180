"""Conversations as tokens, with a proved mask of what the model writes.

A turn of the assistant is what follows the template's generation prompt, up to the end-of-turn
token. Its place is that of characters in the rendered text, and it is proved token by token: the
trained tokens of a turn decode to its text and end with that token.
"""

import collections
import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slm.base import files
from slm.data import chat, documents, tokenizer
from slm.data.settings import ChatConfig

Messages = Sequence[Mapping[str, Any]]
Masked = tuple[np.ndarray, np.ndarray]  # tokens (int32) and which are trained (uint8)

# Why a conversation is not prepared, and what a reader is told.
REASONS = {
  'refused': 'the template refuses the messages',
  'unproved': 'the trained tokens are not proved to be the answers',
  'untrained': 'no token would be trained',
  'everything': 'nothing comes before the answer, so every token would be trained',
  'doubled_begin': 'two begin tokens',
  'too_long': 'longer than the context',
  'tied': 'the chosen answer is the rejected one',
}
# What is prepared although something is lost.
NOTES = {'truncated': 'cut at the context', 'cut_answers': 'of them an answer lost its end'}
_CONTEXT = 8  # tokens before an answer with which it is decoded
_SAY = lambda role, text: {'role': role, 'content': text}
_PROBES = (
  [_SAY('user', 'Say yes.'), _SAY('assistant', 'Yes.')],
  [
    _SAY('user', 'One?'), _SAY('assistant', 'Two\nlines, '), _SAY('user', ''),
    _SAY('assistant', ''), _SAY('user', 'More?'), _SAY('assistant', 'No.'),
  ],
)  # fmt: skip


class Dropped(Exception):
  """A conversation that is not prepared: one of REASONS, and the details."""

  def __init__(self, reason: str, detail: str = ''):
    super().__init__(f'{REASONS[reason]}: {detail}' if detail else REASONS[reason])
    self.reason = reason


class Masker:
  """Renders conversations by a tokenizer's template and marks what the model writes.

  Attributes:
    stop: the id of the end-of-turn token, which is trained.
  """

  def __init__(self, tok: tokenizer.Tokenizer, name: str = ''):
    """Check the template of a tokenizer, called `name`, with fixed conversations.

    Raises:
      ValueError: if there is no template, or the masks under it cannot be proved.
    """
    self.tok, self._name = tok, f'the template {name}' if name else "the tokenizer's chat template"
    if not tok.chat_template:
      names = ', '.join(chat.TEMPLATES)
      raise ValueError(f'the tokenizer has no chat template: expected chat.template of {names}')
    self._special = chat.variables(tok)
    try:
      self.stop, self._stop_text = self._find_stop()
      for probe in _PROBES:
        self.conversation(probe)
    except Dropped as e:
      raise ValueError(f'{self._name}: {e}') from None

  def _find_stop(self) -> tuple[int, str]:
    """Return the end-of-turn token that the template writes after an answer, and its text."""
    text = self.render(_PROBES[0])
    before = self.render(_PROBES[0][:1], prompt=True)
    turn = text.removeprefix(before).lstrip()
    answer = _PROBES[0][1]['content']
    self._begins(text, before)
    if not turn.startswith(answer):
      raise Dropped(
        'unproved', f'before the answer {answer!r} its generation prompt ends with '
        f'{before[-20:]!r}, and the text goes on with {turn[:20]!r}'
      )  # fmt: skip
    tail = turn.removeprefix(answer).strip()
    ids = chat.encode(self.tok, tail) if tail else []
    if len(ids) != 1:
      raise Dropped(
        'unproved', f'an answer ends with {tail!r}, expected the text of one end-of-turn token'
      )
    if ids[0] not in self.tok.ends:
      raise Dropped(
        'unproved', f'an answer ends with {tail!r}, at which generation does not stop: name its id '
        'as eos_token_id in the generation_config.json beside the tokenizer'
      )  # fmt: skip
    return ids[0], tail

  def render(self, messages: Messages, tools: Any = None, prompt: bool = False) -> str:
    """Render messages; `prompt` ends the text where an answer begins."""
    try:
      return chat.render(messages, self.tok.chat_template, tools, prompt, **self._special)
    except ValueError as e:
      raise Dropped('refused', str(e)) from None

  def prompt(self, messages: Messages, tools: Any = None) -> np.ndarray:
    """Return the tokens of what comes before an answer, int32."""
    if messages[-1]['role'] == 'assistant':
      raise Dropped('refused', 'a prompt ends with an answer')
    text = self.render(messages, tools, prompt=True)
    if tools and text == self.render(messages, prompt=True):
      raise Dropped('refused', 'it has no place for tools')
    return self._checked(chat.encode(self.tok, text))

  def _checked(self, ids: Sequence[int]) -> np.ndarray:
    if len(ids) > 1 and ids[0] == ids[1] == self.tok.ids.bos:
      raise Dropped('doubled_begin')
    return np.array(ids, np.int32)

  def conversation(self, messages: Messages, tools: Any = None, first: int = 0) -> Masked:
    """Return the tokens (int32) of messages and which are trained (uint8).

    They are those of the assistant's turns from message number `first` on.

    Raises:
      Dropped: saying why, if they cannot be trained on.
    """
    text = self.render(messages, tools)
    if tools and text == self.render(messages):
      raise Dropped('refused', 'it has no place for tools')
    ids, spans = chat.encode_spans(self.tok, text)
    tokens, trained = self._checked(ids), np.zeros(len(ids), np.uint8)
    for i, message in enumerate(messages):
      if i >= first and message['role'] == 'assistant':
        begin, end = self._turn(messages, tools, i, text)
        trained[self._tokens(ids, spans, begin, end, text[begin:end])] = 1
    if not trained[1:].any():
      raise Dropped('untrained', 'there is no answer')
    if trained[0]:
      raise Dropped('everything')
    return tokens, trained

  def _turn(self, messages: Messages, tools: Any, i: int, text: str) -> tuple[int, int]:
    """Return the first character of an answer in a text, and that of its end-of-turn token."""
    before = self.render(messages[:i], tools, prompt=True)
    upto = text if i == len(messages) - 1 else self.render(messages[: i + 1], tools)
    self._begins(text, before)
    self._begins(text, upto)
    end = upto.rfind(self._stop_text, len(before))
    if end < 0 or upto[end + len(self._stop_text) :].strip():
      raise Dropped('unproved', f'an answer does not end with {self._stop_text!r}')
    wanted, found = messages[i].get('content') or '', text[len(before) : end]
    same = found.strip() == wanted.strip()
    if messages[i].get('tool_calls'):
      if same:
        raise Dropped('refused', 'it leaves out the calls of tools')
    elif not same:
      raise Dropped('unproved', f'{wanted[:40]!r} is rendered as {found[:40]!r}')
    return len(before), end

  def _begins(self, text: str, part: str) -> None:
    """Check that a text begins with the rendered text of its first messages."""
    if not text.startswith(part):
      same = len(os.path.commonprefix([part, text]))
      around = slice(max(same - 20, 0), same + 20)
      raise Dropped(
        'unproved', f'{part[around]!r} is rendered as {text[around]!r} once messages follow'
      )  # fmt: skip

  def _tokens(
    self, ids: Sequence[int], spans: np.ndarray, begin: int, end: int, answer: str
  ) -> slice:
    """Return the tokens of an answer and its end-of-turn token, once they are proved."""
    (stops,) = np.nonzero((np.array(ids) == self.stop) & (spans[:, 0] <= end) & (spans[:, 1] > end))
    start = int(np.argmax(spans[:, 1] > begin))
    if len(stops) != 1 or spans[start, 0] < begin and start != stops[0]:
      raise Dropped(
        'unproved', f'a token holds the beginning of {answer[:40]!r} and text before it'
      )
    stop = int(stops[0])
    decoded = self.tok.continued(ids[max(start - _CONTEXT, 0) : start], ids[start:stop])
    if decoded != answer:
      raise Dropped('unproved', f'{answer[:40]!r} is decoded as {decoded[:40]!r}')
    return slice(start, stop + 1)


def dtype(c: ChatConfig) -> np.dtype:
  """Return the fields of a token of a window."""
  if c.kind == 'prompts':
    return np.dtype([('tokens', '<i4')])
  fields = [('tokens', '<i4'), ('trained', 'u1')]
  fields += [('weights', '<f4')] if c.weight else []
  return np.dtype(fields + ([('segments', '<i4')] if c.kind == 'pairs' else []))


def window(
  document: Mapping[str, Any], masker: Masker, c: ChatConfig, context: int
) -> tuple[np.ndarray, list[str]]:
  """Return a document as tokens with fields, as `dtype` says, and those of NOTES that apply.

  A pair is the prompt with the chosen answer and then with the rejected one: segments 1 and 2.

  Raises:
    Dropped: saying why, if it is not prepared.
  """
  tools, notes = document.get('tools'), []
  if c.kind == 'prompts':
    parts = [(masker.prompt(document['prompt'], tools),)]
    if len(parts[0][0]) > context:
      raise Dropped('too_long')
  elif c.kind == 'pairs':
    parts, notes = _fit(_pair(document, masker, tools), c, context)
    if np.array_equal(parts[0][0], parts[1][0]):  # also of two answers that differ beyond the cut
      raise Dropped('tied')
  else:
    parts, notes = _fit([masker.conversation(document['messages'], tools)], c, context)
  made = np.zeros(sum(len(part[0]) for part in parts), dtype(c))
  values = {
    'tokens': [part[0] for part in parts],
    'trained': [part[-1] for part in parts],
    'segments': [np.full(len(part[0]), number) for number, part in enumerate(parts, 1)],
    'weights': [np.full(len(made), document.get('weight', 1.0))],
  }
  for name in made.dtype.names:
    made[name] = np.concatenate(values[name])
  return made, notes


def _fit(parts: list[Masked], c: ChatConfig, context: int) -> tuple[list[Masked], list[str]]:
  """Cut the end of parts that are together longer than the context; return NOTES too."""
  sizes = [len(tokens) for tokens, _ in parts]
  if sum(sizes) <= context:
    return parts, []
  if c.too_long == 'drop':
    raise Dropped('too_long')
  share = context // len(parts)
  most = [max(share, context - (sum(sizes) - size)) for size in sizes]
  cut = [(tokens[:n], trained[:n]) for (tokens, trained), n in zip(parts, most, strict=True)]
  if not all(trained[1:].any() for _, trained in cut):
    raise Dropped('untrained', 'the context ends before the answer')
  lost = any(a[1].sum() < b[1].sum() for a, b in zip(cut, parts, strict=True))
  return cut, ['truncated', 'cut_answers'] if lost else ['truncated']


def _pair(document: Mapping[str, Any], masker: Masker, tools: Any) -> list[Masked]:
  """Return tokens and mask of the prompt with either answer."""
  prompt = list(document['prompt'])
  for key in ('chosen', 'rejected'):  # as where an answer repeats the prompt in other words
    if (role := document[key][0]['role']) != 'assistant':
      raise Dropped('unproved', f'after the prompt the {key} answer begins with a turn of {role!r}')
  both = [
    masker.conversation([*prompt, *document[key]], tools, len(prompt))
    for key in ('chosen', 'rejected')
  ]
  (chosen, trained), (rejected, _) = both
  n = int(np.argmax(trained))
  if n != int(np.argmax(both[1][1])) or not np.array_equal(chosen[:n], rejected[:n]):
    raise Dropped('unproved', 'the two answers do not follow the same prompt')
  return both


@functools.cache
def load(folder: Path, name: str) -> Masker:
  """Return the masker of the tokenizer in a folder, loaded once per process."""
  return Masker(documents.load_tokenizer(folder), name)


def cut(task: documents.Cut) -> dict[str, Any]:
  """Encode a shard's documents as `documents.cut` does, and write their labels beside them."""
  cfg = task.cfg
  masker = load(Path(cfg.out) / 'tokenizer', cfg.chat.template)
  made, counts, labels = encode(
    documents.kept(task), masker, cfg.chat, cfg.context, task.num_splits
  )
  documents.save_windows(task.out, made)
  written = [task.out.name]
  if cfg.chat.kind == 'prompts':
    path = task.out.with_suffix('.labels.jsonl')
    files.write_text(path, ''.join(f'{label}\n' for label in labels))
    written.append(path.name)
  splits, taken = documents.document_splits(task.shard), np.array(task.copies)
  by_split = lambda weights: np.bincount(splits, weights, task.num_splits).astype(int).tolist()
  return counts | {
    'files': written,
    'source': task.source,
    'kept': by_split(task.kept),
    'taken': by_split(taken),
    'duplicates': documents.duplicates_by_split(task),
  }


def encode(
  kept: Iterable[tuple[str, int]], masker: Masker, c: ChatConfig, context: int, num_splits: int
) -> tuple[documents.Windows, dict[str, Any], list[str]]:
  """Encode (JSON, split) of a shard's documents; return windows, counts and labels.

  A document is a window. `tokens` counts the trained ones and `bytes` their text; of prompts, all.
  `dropped` and `notes` count by split what REASONS and NOTES name, `why` has an example of each
  reason. A label is the JSON of a prompt's verifiers, in the order of the windows.
  """
  made, splits, owners, labels = [np.zeros(0, dtype(c))], [], [], []
  count = collections.defaultdict(lambda: [0] * num_splits)
  why: dict[str, str] = {}
  for text, split in kept:
    document = json.loads(text)
    try:
      tokens, notes = window(document, masker, c, context)
    except Dropped as e:
      count[e.reason][split] += 1
      why.setdefault(e.reason, str(e))
      continue
    made.append(tokens)
    splits.append(split)
    owners.append(count['documents'][split])
    labels += [json.dumps(document['verifiers'], ensure_ascii=False)] if c.kind == 'prompts' else []
    trained = tokens['tokens']
    if 'trained' in tokens.dtype.names:
      trained = trained[tokens['trained'] > 0]
    count['documents'][split] += 1
    count['tokens'][split] += len(trained)
    count['positions'][split] += len(tokens)
    count['bytes'][split] += len(masker.tok.decode(trained).encode())
    for note in notes:
      count[note][split] += 1
  windows = documents.Windows(
    np.concatenate(made),
    np.cumsum([0, *map(len, made[1:])], dtype=np.int64),
    np.array(splits, np.int32),
    np.array(owners, np.int32),
  )
  return windows, _counts(count, why), labels


def _counts(count: Mapping[str, list[int]], why: dict[str, str]) -> dict[str, Any]:
  plain = {key: count[key] for key in ('documents', 'bytes', 'tokens', 'positions')}
  return plain | {
    'windows': count['documents'],
    'dropped': {reason: count[reason] for reason in REASONS},
    'notes': {note: count[note] for note in NOTES},
    'why': why,
  }
