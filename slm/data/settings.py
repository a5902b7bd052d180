"""The config of `slm.data.prepare`, checked before any work."""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from pathlib import Path

from slm.data import chat

# Where Apache Beam may run, and its names. Its default local runner may download a program; the one
# here is part of the package.
RUNNERS = {
  'direct': 'FnApiRunner',
  'flink': 'FlinkRunner',
  'spark': 'SparkRunner',
  'dataflow': 'DataflowRunner',
}
_RESERVED = ('windows', 'tokenizer', 'clusters', 'index')
PLAIN = ('train', 'validation', 'test')
ALL = 'all'  # the split name of a source whose documents are split by hash


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
  """A tokenizer to train, or the one at `path`."""

  name: str = 'sentencepiece'  # sentencepiece | bytes | huggingface (the one at path)
  vocab: int = 4096  # pieces of a SentencePiece model trained on generic/train
  path: str = ''  # a .model, a tokenizer.json or a folder with one to use, whatever the name

  def __post_init__(self) -> None:
    names = ('sentencepiece', 'bytes', 'huggingface')
    if self.name not in names:
      raise ValueError(f'tokenizer.name={self.name!r}: expected one of {", ".join(names)}')
    if self.name == 'huggingface' and not self.path:
      raise ValueError(
        "tokenizer.name='huggingface' needs tokenizer.path: a tokenizer.json or a folder with one"
      )
    if self.name == 'bytes' and self.path:
      raise ValueError(f"tokenizer.path={self.path}: tokenizer.name='bytes' reads no file")
    if self.path and not Path(self.path).exists():
      raise FileNotFoundError(f'tokenizer.path={self.path}: no such file or folder')


KINDS = ('conversations', 'pairs', 'prompts')


@dataclasses.dataclass(frozen=True)
class ChatConfig:
  """Sets of conversations instead of text; a source may name its own fields (conversations.py)."""

  kind: str = ''  # conversations | pairs | prompts; '': the sets are text
  template: str = ''  # tulu | chatml | llama3; '': the tokenizer's own
  too_long: str = 'truncate'  # conversations and pairs over the context: truncate (right) | drop
  # Fields of a JSON line. A conversation is in `messages`, or in `prompt` and `response`; what
  # comes before an answer is in `prompt` or `messages`.
  messages: str = 'messages'
  prompt: str = 'prompt'
  response: str = 'response'
  chosen: str = 'chosen'
  rejected: str = 'rejected'
  label: str = 'label'  # of a prompt: the arguments of its verifier, or a list, one for each
  verifier: str = 'verifier'  # the id of its verifier, or a list ...
  verifier_id: str = ''  # ... or the one of all prompts
  tools: str = 'tools'  # schemas of functions; need not be there
  weight: str = ''  # of the example in the loss; '': all are 1

  def __post_init__(self) -> None:
    if self.kind not in ('', *KINDS):
      raise ValueError(f'chat.kind={self.kind!r}: expected one of {", ".join(KINDS)}')
    if self.template not in ('', *chat.TEMPLATES):
      names = ', '.join(chat.TEMPLATES)
      raise ValueError(
        f"chat.template={self.template!r}: expected one of {names}, or '' for the tokenizer's own"
      )
    if self.too_long not in ('truncate', 'drop'):
      raise ValueError(f'chat.too_long={self.too_long!r}: expected truncate or drop')

  def __bool__(self) -> bool:
    return bool(self.kind)


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
  """The config of a prepared directory."""

  out: str = ''  # directory to write to (or --out)
  # Set -> split, or 'all' (split by hash) -> source.
  sets: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
  tokenizer: TokenizerConfig = TokenizerConfig()
  chat: ChatConfig = ChatConfig()  # conversations, pairs or prompts instead of text
  context: int = 256  # tokens in a row
  levels: tuple[int, ...] = (16, 64)  # numbers of clusters; coarser ones are unions of finer ones
  fit_windows: int = 20_000  # windows of generic/train that the clusters are fitted on
  dims: int = 64  # of a window's embedding by TF-IDF and SVD
  sbert: str = ''  # directory of a sentence-transformers model to embed windows with instead
  sizes: tuple[int, ...] = (20_000, 80_000)  # tokens of each domain's nested specialisation sets
  text_field: str = 'text'  # field of a JSON line that holds the document
  id_field: str = ''  # field whose hash chooses the split; '': the text's hash
  heldout: tuple[float, float] = (0.05, 0.1)  # shares of documents for validation and test
  near_duplicates: float = 0.0  # drop training documents this similar (Jaccard); 0: exact only
  workers: int = 0  # processes; 0: one per usable core
  seed: int = 0  # of samples, clusters and nested sets

  def __post_init__(self) -> None:
    if not self.out:
      raise ValueError('out is empty: expected the directory to write to (--out=DIR)')
    if self.chat:
      self._check_chat()
    elif 'generic' not in self.sets:
      raise ValueError(f"sets: one must be named 'generic', found {', '.join(self.sets)}")
    for name, splits in self.sets.items():
      self._check_set(name, splits)
    if self.context < 2:
      raise ValueError(f'context={self.context}: expected at least 2')
    if not self.levels or min(self.levels) < 1 or len(set(self.levels)) < len(self.levels):
      raise ValueError(f'levels={self.levels}: expected distinct numbers of clusters')
    if min(self.fit_windows, self.dims) < 1 or self.workers < 0 or min(self.sizes, default=1) < 1:
      raise ValueError('expected fit_windows, dims and sizes of at least 1, workers of at least 0')
    if not 0 <= self.near_duplicates <= 0.98:  # above, MinHashLSH finds no two bands
      raise ValueError(
        f'near_duplicates={self.near_duplicates}: expected a similarity up to 0.98, or 0 (off)'
      )
    if len(self.heldout) != 2 or min(self.heldout) < 0 or sum(self.heldout) >= 1:
      raise ValueError(f'heldout={self.heldout}: expected two shares with a sum below 1')

  def _check_chat(self) -> None:
    if not self.sets:
      raise ValueError('sets: expected one, found none')
    if not self.tokenizer.path and self.tokenizer.name != 'bytes':
      raise ValueError(
        f'tokenizer.path is empty: {self.chat.kind} need the tokenizer of the model that they are '
        'for, such as RUN/tokenizer'
      )

  def _check_set(self, name: str, splits: Mapping[str, str]) -> None:
    words = [name, *splits]
    if name in _RESERVED or not all(re.fullmatch(r'[A-Za-z0-9_-]+', word) for word in words):
      raise ValueError(f'sets: {name}.{"/".join(splits)}: not usable as a folder name')
    for split in splits:
      similar = [plain for plain in PLAIN if plain.startswith(split)]
      similar += difflib.get_close_matches(split, PLAIN)
      has_suffix = any(split.startswith(f'{plain}_') for plain in PLAIN)
      if similar and split not in (ALL, *PLAIN) and not has_suffix:
        raise ValueError(
          f'sets: {name}.{split}: did you mean {name}.{similar[0]}? Other splits are named with a '
          'suffix, such as test_ood, or differently'
        )
    if ALL in splits and len(splits) > 1 or not {ALL, 'train'}.intersection(splits):
      raise ValueError(f'sets.{name}: expected one source, or a train split and others')

  def splits(self, name: str) -> tuple[str, ...]:
    """Return a set's splits in the order of their numbers; training is 0."""
    splits = self.sets[name]
    return PLAIN if ALL in splits else ('train', *(s for s in splits if s != 'train'))

  def made(self, name: str) -> list[tuple[int, str]]:
    """Return (number, name) of the splits that may not be empty."""
    shares = (1.0, *self.heldout) if ALL in self.sets[name] else None
    return [(i, s) for i, s in enumerate(self.splits(name)) if shares is None or shares[i] > 0]
