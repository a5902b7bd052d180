"""SentencePiece, byte and Hugging Face tokenizers behind one interface."""

import abc
import dataclasses
import hashlib
import io
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import sentencepiece
import tokenizers

from slm.base import files
from slm.data import sidecars

# SentencePiece writes a space as U+2581, so U+2581 in a text is encoded as its three bytes.
_SPACE = '\u2581'
_MOST = 1 << 24  # ids; what a damaged file says must not take all memory
_LINE = 2000  # characters per training sentence; SentencePiece drops sentences over 4192 bytes
# Usual texts of special tokens, tried in this order where no file names one.
_USUAL = {
  'bos': ('<s>', '<bos>', '<|begin_of_text|>', '<|im_start|>', '[CLS]', '<|endoftext|>'),
  'eos': ('</s>', '<eos>', '<|end_of_text|>', '<|im_end|>', '[SEP]', '<|endoftext|>'),
  'pad': ('<pad>', '[PAD]'),
}


@dataclasses.dataclass(frozen=True)
class Ids:
  """Ids of special tokens; None where the tokenizer has no such token."""

  pad: int | None
  bos: int | None
  eos: int  # written after every text in training


class Tokenizer(abc.ABC):
  """Text to token ids and back.

  `fingerprint` is the SHA-256 of the tokenizer's file and of the changes that the files beside it
  make to the ids of a text.
  """

  name: str
  fingerprint: str
  ids: Ids
  ends: frozenset[int]  # each of these ids ends a generated text
  begins: bool  # whether every text begins with the begin token
  known: np.ndarray  # bool [vocab]: ids that have a token; there may be gaps
  prefix_space: bool = False  # whether a space is put before every text
  chat_template: str | None = None  # Jinja source, as transformers stores it
  _printed: np.ndarray  # bool [vocab]: ids that `decode` turns into text
  _unk: int | None = None
  _token: Callable[[int], str | None]  # the text of an id

  @property
  def vocab(self) -> int:
    """Return the number of ids, gaps included; a model may have more embeddings."""
    return len(self.known)

  @property
  def begin(self) -> tuple[int, ...]:
    """Return the ids that every text begins with: the begin token, or none."""
    return (self.ids.bos,) if self.begins else ()

  @property
  def start(self) -> int:
    """Return the id that stands for an empty context: the begin token, or else the end token."""
    return self.ids.eos if self.ids.bos is None else self.ids.bos

  @abc.abstractmethod
  def encode(self, text: str) -> list[int]:
    """Encode without begin or end tokens."""

  @abc.abstractmethod
  def encode_spans(self, text: str) -> tuple[list[int], np.ndarray]:
    """Encode as `encode` does; return the ids and the characters of each, int64 [tokens, 2].

    A span is [first, past the last). Tokens that share a character have it in the span of each.
    """

  @abc.abstractmethod
  def decode(self, ids: Sequence[int]) -> str:
    """Decode, skipping special tokens and ids without a token."""

  def written(self, ids: Sequence[int]) -> str:
    """Decode for a reader, with special tokens as their text."""
    parts = []
    for printed, group in itertools.groupby(map(int, ids), lambda i: bool(self._printed[i])):
      part = [*group]
      parts.append(self.decode(part) if printed else ''.join(self._token(i) or '' for i in part))
    return ''.join(parts)

  def begun(self, text: str, begin: Sequence[int]) -> list[int]:
    """Encode, with the ids `begin` first unless the text itself starts with the begin token."""
    ids = self.encode(text)
    return ids if ids[:1] == [self.ids.bos] else [*begin, *ids]

  def continued(self, context: Sequence[int], continuation: Sequence[int]) -> str:
    """Return the text that a continuation adds to a context.

    Both are decoded together: decoded alone, a continuation could lose its first space or a part of
    a character.
    """
    texts = [self.decode(context), self.decode([*context, *continuation])]
    return texts[1][len(os.path.commonprefix(texts)) :]

  def special(self) -> dict[str, str]:
    """Return the text of each special token by its role ('bos', 'eos', 'pad', 'unk')."""
    return {role: text for role, (_, text) in self.marks().items()}

  def marks(self) -> dict[str, tuple[int, str]]:
    """Return the id of each special token by its role, and what a rendered conversation has for it.

    That is its text, which `encode` may not read as the token: see slm/data/chat.py.
    """
    ids = dataclasses.asdict(self.ids) | {'unk': self._unk}
    return {role: (i, self._token(i)) for role, i in ids.items() if i is not None}

  def _set_special(
    self,
    path: pathlib.Path,
    sidecar: sidecars.Sidecars,
    find: Callable[[str], int | None],
    **own: int,
  ) -> None:
    """Set the ids of special tokens, and all ids that end a text.

    The first source that names a role decides: the settings beside the tokenizer (where they name
    an end token, a role that they leave out is absent), the tokenizer's `own` ids, the configs of
    its model, the usual texts.

    Raises:
      ValueError: if a named begin or end token is not in the vocabulary, or no source names an end
        token.
    """

    def choose(role: str) -> int | None:
      if text := sidecar.named.get(role):
        if (i := find(text)) is None and role != 'pad':
          settings = path.parent / sidecars.SETTINGS
          raise ValueError(f'{settings}: {role}_token is {text!r}, which is not in the vocabulary')
        return i
      if role in sidecar.named and role != 'eos':
        return None
      if role in own or sidecar.named.get('eos'):
        return own.get(role)
      configured = [i for i in sidecar.ids[role] if i < self.vocab and self.known[i]]
      usual = (find(text) for text in _USUAL[role])
      return next((i for i in (*configured, *usual) if i is not None), None)

    pad, bos, eos = (choose(role) for role in ('pad', 'bos', 'eos'))
    if eos is None:
      usual = ', '.join(_USUAL['eos'])
      raise ValueError(
        f'{path}: no file names an end token, and the vocabulary has none of {usual}'
      )
    self.ids, self.ends = Ids(pad, bos, eos), frozenset([eos, *sidecar.ids['eos']])
    self.chat_template = sidecar.chat_template

  def _hide_special(self, special: Iterable[int] = ()) -> None:
    """Keep `decode` from printing begin, end and other `special` tokens."""
    hidden = [i for i in {*special, *self.ends, self.ids.bos} if i is not None]
    self._printed = self.known & ~np.isin(np.arange(self.vocab), hidden)

  def _printable(self, ids: Sequence[int]) -> list[int]:
    values = np.asarray(ids, np.int64)
    values = values[(values >= 0) & (values < self.vocab)]
    return values[self._printed[values]].tolist()


class Bytes(Tokenizer):
  """UTF-8 bytes, which encode any text without training."""

  name = 'bytes'
  begins = True
  ids = Ids(pad=0, bos=1, eos=2)
  ends = frozenset([2])
  _offset = 3
  known = np.ones(256 + _offset, bool)
  _token = staticmethod({0: '<|pad|>', 1: '<|bos|>', 2: '<|eos|>'}.get)  # in conversations alone

  def __init__(self, path: pathlib.Path):
    content = files.read_json(path)
    if content != BYTES:
      raise ValueError(f'{path}: expected {BYTES}, found {content}')
    self.fingerprint = files.sha256(path)
    template = path.parent / sidecars.TEMPLATE
    self.chat_template = template.read_text() if template.exists() else None
    self._printed = np.arange(self.vocab) >= self._offset

  def encode(self, text: str) -> list[int]:
    """Encode without begin or end tokens."""
    return [b + self._offset for b in text.encode()]

  def encode_spans(self, text: str) -> tuple[list[int], np.ndarray]:
    """Encode; every byte has the span of its character."""
    starts = _characters(text)
    return self.encode(text), np.stack([starts, starts + 1], axis=1)

  def decode(self, ids: Sequence[int]) -> str:
    """Decode; an incomplete character becomes U+FFFD."""
    data = bytes(int(i) - self._offset for i in ids if self._offset <= i < self.vocab)
    return data.decode('utf-8', errors='replace')

  def special(self) -> dict[str, str]:
    """Return an empty table: begin, end and padding have no text."""
    return {}


BYTES = {'name': 'bytes', 'offset': 3}


def _characters(text: str) -> np.ndarray:
  """Return the number of the character that each byte of a text is of."""
  return np.repeat(np.arange(len(text)), np.array([len(c.encode()) for c in text], np.int64))


class SentencePiece(Tokenizer):
  """A SentencePiece model with the tokens and settings of the files beside it.

  With byte pieces, decode(encode(text)) == text. Texts begin with the begin token where
  `add_bos_token` is true or, as in transformers 5, where there are no settings at all.
  """

  name = 'sentencepiece'

  def __init__(self, path: pathlib.Path):
    content, sidecar = path.read_bytes(), sidecars.read(path.parent)
    settings = sidecar.settings
    with files.reading(path, 'a SentencePiece model'):
      self._model = model = sentencepiece.SentencePieceProcessor(model_proto=content)
      model.id_to_piece([*range(model.get_piece_size())])  # that they are text
      model_prefix = model.encode('a', out_type=str)[0].startswith(_SPACE)
    self._unk = model.unk_id()
    self._token = lambda i: added.text.get(i) or model.id_to_piece(i)
    self._escape = [model.piece_to_id(f'<0x{b:02X}>') for b in _SPACE.encode()]
    self._added = added = _AddedTokens(sidecar, model)
    self.known = _mask(path, [*range(model.get_piece_size()), *added.text])
    own = {'bos': model.bos_id(), 'eos': model.eos_id(), 'pad': model.pad_id()}
    find = lambda text: added.ids.get(text, _piece_id(model, text))
    self._set_special(path, sidecar, find, **{role: i for role, i in own.items() if i >= 0})
    self.begins = bool(settings.get('add_bos_token', not settings)) and self.ids.bos is not None
    prefix = settings.get('add_prefix_space')
    self.prefix_space = model_prefix if prefix is None else bool(prefix)
    if self.prefix_space != model_prefix:
      self._model = _with_prefix(content, self.prefix_space)
    # Text after U+2581 or an added token gets no space before it, except under the `legacy` setting
    # after an added token.
    self._inner = _with_prefix(content, False) if self.prefix_space else self._model
    self._legacy = self.prefix_space and bool(settings.get('legacy'))
    self._hide_special(added.special)
    changes: dict[str, Any] = {
      'added': {t: i for t, i in sorted(added.ids.items()) if _piece_id(model, t) != i},
      'begins': None if self.begins else False,
      'prefix_space': None if self.prefix_space == model_prefix else self.prefix_space,
    }
    self.fingerprint = _fingerprint(content, changes)

  def encode(self, text: str) -> list[int]:
    """Encode without begin or end tokens."""
    ids: list[int] = []
    for part in self._added.split(text):
      if isinstance(part, int):
        ids.append(part)
      elif not ids:
        ids += self._encode(self._model, part)
      else:
        space = self._legacy and not part.startswith((' ', _SPACE))
        ids += self._encode(self._inner, ' ' * space + part)
    return ids

  def encode_spans(self, text: str) -> tuple[list[int], np.ndarray]:
    """Encode as `encode` does; return the ids and the characters of each, int64 [tokens, 2]."""
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for part, (first, last) in self._added.places(text):
      if isinstance(part, int):
        ids.append(part)
        spans.append((first, last))
        continue
      model = self._inner if ids else self._model
      space = bool(ids) and self._legacy and not part.startswith((' ', _SPACE))
      for i, start, end in self._pieces(model, ' ' * space + part):
        ids.append(i)
        spans.append((first + max(start - space, 0), first + max(end - space, 0)))
    return ids, np.array(spans, np.int64).reshape(-1, 2)

  def _pieces(
    self, model: sentencepiece.SentencePieceProcessor, text: str
  ) -> Iterator[tuple[int, int, int]]:
    """Yield (id, first character, past its last) of the pieces of a text, as `_encode` has them."""
    parts = [text] if self._unk in self._escape else text.split(_SPACE)
    at = 0
    for number, part in enumerate(parts):
      if number:
        yield from ((i, at, at + 1) for i in self._escape)
        at += 1
      model = self._inner if number else model
      places = [*_characters(part), len(part)]  # of the bytes in which pieces are placed
      for piece in model.encode(part, return_type='proto').pieces:
        start, end = places[piece.begin], places[piece.end]
        yield piece.id, at + start, at + (start + 1 if model.is_byte(piece.id) else end)
      at += len(part)

  def _encode(self, model: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    if _SPACE not in text or self._unk in self._escape:
      return model.encode(text)
    first, *others = text.split(_SPACE)
    others = self._inner.encode(others)
    return model.encode(first) + [i for part in others for i in self._escape + part]

  def decode(self, ids: Sequence[int]) -> str:
    """Decode, skipping special tokens and ids without a token."""
    ids, text = self._printable(ids), ''
    if not self._added.ids:
      return self._model.decode(ids)
    for number, (token, group) in enumerate(itertools.groupby(ids, self._added.text.get)):
      model = self._inner if number else self._model
      text += token * len([*group]) if token else model.decode([*group])
    return text


class _AddedTokens:
  """Tokens that the files beside a SentencePiece model add, and how they split a text.

  The tokenizers library finds them, as it does for transformers: the longest first, with their
  flags for surrounding white space.
  """

  def __init__(self, sidecar: sidecars.Sidecars, model: sentencepiece.SentencePieceProcessor):
    self.ids: dict[str, int] = {}
    size, tokens = model.get_piece_size(), [token for _, token in sidecar.added]
    free = itertools.count(max([size - 1, *(i for i, _ in sidecar.added if i is not None)]) + 1)
    for i, token in sidecar.added:
      own = _piece_id(model, token.content) if i is None else i
      self.ids[token.content] = next(free) if own is None else own
    # Control pieces are split off as transformers does; a model alone reads them as characters.
    control = [i for i in range(size) if model.is_control(i)] if sidecar.settings else []
    for text in filter(None, [*map(model.id_to_piece, control), *sidecar.named.values()]):
      if text not in self.ids and (i := _piece_id(model, text)) is not None:
        self.ids[text] = i
        tokens.append(tokenizers.AddedToken(text, special=True))
    self.special = {self.ids[token.content] for token in tokens if token.special}
    self.text = {i: text for text, i in self.ids.items()}
    self._splitter = tokenizers.Tokenizer(tokenizers.models.WordLevel({'': 0}, unk_token=''))
    self._splitter.add_tokens(tokens)

  def split(self, text: str) -> list[int | str]:
    """Split a text into ids of added tokens and the texts between them."""
    return [part for part, _ in self.places(text)]

  def places(self, text: str) -> list[tuple[int | str, tuple[int, int]]]:
    """Return the parts of `split`, and the characters of each."""
    if not self.ids:
      return [(text, (0, len(text)))]
    parts = self._splitter.encode(text, add_special_tokens=False)
    return [
      (self.ids[token] if token else text[first:last], (first, last))
      for token, (first, last) in zip(parts.tokens, parts.offsets, strict=True)
    ]


def _piece_id(model: sentencepiece.SentencePieceProcessor, text: str) -> int | None:
  """Return the id of a piece, or None where the model has no piece with that text."""
  i = model.piece_to_id(text)
  return i if model.id_to_piece(i) == text else None


def _with_prefix(content: bytes, prefix: bool) -> sentencepiece.SentencePieceProcessor:
  """Load a SentencePiece model that puts a space before every text, or none."""
  # A message that is appended is merged, so no generated code is needed, whose version would have
  # to agree with that of protobuf: normalizer_spec (field 3) { add_dummy_prefix (field 3) }.
  content += bytes([3 << 3 | 2, 2, 3 << 3, prefix])
  return sentencepiece.SentencePieceProcessor(model_proto=content)


class HuggingFace(Tokenizer):
  """A tokenizer.json of the tokenizers library, which decides whether encoding is lossless."""

  name = 'huggingface'

  def __init__(self, path: pathlib.Path):
    sidecar = sidecars.read(path.parent)
    with files.reading(path, 'a tokenizer.json'):
      text = path.read_text()
      self._model = model = parse(text)
      self._token = model.id_to_token
      own = model.get_vocab()
      model.add_tokens([token for _, token in sidecar.added])
      vocab = model.get_vocab()
      model.add_special_tokens([token for token in sidecar.named.values() if token in vocab])
      # The post-processor decides; transformers reads `add_bos_token` only where there is none.
      prefix, _ = affixes(model)
    for i, token in sidecar.added:  # the ids of tokens in both files are those of tokenizer.json
      if token.content not in own and i not in (None, actual := vocab.get(token.content)):
        raise ValueError(
          f'{path}: {token.content!r} would get the id {actual}, the files beside it give it {i}'
        )
    if len(prefix) > 1:
      raise ValueError(f'{path}: puts {len(prefix)} tokens before a text, expected one or none')
    self.known = _mask(path, [*vocab.values()])
    self._set_special(path, sidecar, vocab.get)
    self.begins = bool(prefix)
    if prefix:
      self.ids = dataclasses.replace(self.ids, bos=prefix[0])
    self._hide_special()
    changes = {'added': {t: i for t, i in sorted(vocab.items()) if t not in own}}
    self.fingerprint = _fingerprint(text.encode(), changes)

  def encode(self, text: str) -> list[int]:
    """Encode without begin or end tokens."""
    return self._model.encode(text, add_special_tokens=False).ids

  def encode_spans(self, text: str) -> tuple[list[int], np.ndarray]:
    """Encode as `encode` does; return the ids and the characters of each, int64 [tokens, 2]."""
    made = self._model.encode(text, add_special_tokens=False)
    return made.ids, np.array(made.offsets, np.int64).reshape(-1, 2)

  def decode(self, ids: Sequence[int]) -> str:
    """Decode, skipping special tokens and ids without a token."""
    return self._model.decode(self._printable(ids), skip_special_tokens=True)

  def written(self, ids: Sequence[int]) -> str:
    """Decode for a reader, with special tokens as their text."""
    return self._model.decode([int(i) for i in ids], skip_special_tokens=False)


def parse(text: str) -> tokenizers.Tokenizer:
  """Parse a tokenizer.json, without the truncation, padding and dropout that were saved in it."""
  model = tokenizers.Tokenizer.from_str(text)
  model.no_truncation()
  model.no_padding()
  if getattr(model.model, 'dropout', None):
    model.model.dropout = None
  return model


def affixes(model: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
  """Return the ids that a tokenizer's post-processor puts before and after every text."""
  encoded = model.encode('a')
  mask = encoded.special_tokens_mask
  if all(mask):
    return encoded.ids, []
  return encoded.ids[: mask.index(0)], encoded.ids[len(mask) - mask[::-1].index(0) :]


def _mask(path: pathlib.Path, ids: Sequence[int]) -> np.ndarray:
  """Return which ids up to the largest are among `ids`, bool [max + 1]."""
  if not ids or not 0 <= min(ids) <= max(ids) < _MOST:
    found = f'{min(ids)} to {max(ids)}' if ids else 'none'
    raise ValueError(f'{path}: expected ids from 0 to less than {_MOST:,}, found {found}')
  known = np.zeros(max(ids) + 1, bool)
  known[ids] = True
  return known


def _fingerprint(content: bytes, changes: Mapping[str, Any]) -> str:
  """Hash a tokenizer's file and the changes that other files make to its ids."""
  made = {name: value for name, value in changes.items() if value not in (None, {})}
  suffix = json.dumps(made, sort_keys=True).encode() if made else b''
  return hashlib.sha256(content + suffix).hexdigest()


KINDS = {  # by file name, in order of preference
  'tokenizer.json': HuggingFace,
  'tokenizer.model': SentencePiece,
  'bytes.json': Bytes,
}
FILES = (*KINDS, *sidecars.FILES)  # every file that `load` reads


def load(path: str | pathlib.Path) -> Tokenizer:
  """Load a tokenizer from a file, or a folder such as `tokenizer/` of a prepared data directory.

  Raises:
    FileNotFoundError: if the folder holds no tokenizer.
    ValueError: if a file is damaged, or two files are of different tokenizers; names them.
  """
  path = pathlib.Path(path)
  if path.is_file():
    default = SentencePiece if path.suffix == '.model' else HuggingFace
    return KINDS.get(path.name, default)(path)
  name = next((name for name in KINDS if (path / name).exists()), None)
  if name is None:
    raise FileNotFoundError(f'{path}: expected one of {", ".join(KINDS)}, found none')
  tok = KINDS[name](path / name)
  if isinstance(tok, HuggingFace) and (path / 'tokenizer.model').exists():
    _check_agree(tok, path)
  return tok


def _check_agree(tok: HuggingFace, folder: pathlib.Path) -> None:
  """Refuse a tokenizer.json and a SentencePiece model that number the same pieces differently.

  A tokenizer.model in another format, such as tiktoken's, is ignored.
  """
  try:
    content = (folder / 'tokenizer.model').read_bytes()
    model = sentencepiece.SentencePieceProcessor(model_proto=content)
  except RuntimeError:
    return
  vocab = tok._model.get_vocab()
  for i in range(model.get_piece_size()):
    if model.is_control(i) or model.is_unknown(i) or model.is_unused(i):
      continue  # these are often renamed
    if vocab.get(piece := model.id_to_piece(i), i) != i:
      raise ValueError(
        f'{folder}: tokenizer.json and tokenizer.model are of different tokenizers ({piece!r} has '
        f'the id {vocab[piece]} in one and {i} in the other): remove the one that is not used'
      )


def build(name: str, vocab: int, path: str, sample: Iterable[str], out: pathlib.Path) -> Tokenizer:
  """Write a tokenizer's files into the folder `out` and load it.

  With `path`, a file or a folder, that tokenizer and every file beside it that `load` reads are
  copied. Otherwise `name` is 'bytes', or 'sentencepiece', which is trained on `sample`.
  """
  if path:
    tok, source = load(path), pathlib.Path(path)  # a damaged file is refused before it is copied
    kind = next(name for name, kind in KINDS.items() if isinstance(tok, kind))
    folder = source if source.is_dir() else source.parent
    copies = {name: folder / name for name in sidecars.FILES if (folder / name).exists()}
    copies[kind] = source / kind if source.is_dir() else source
    for name, original in copies.items():
      with files.replacing(out / name) as temporary:
        temporary.write_bytes(original.read_bytes())
  elif name == 'bytes':
    files.write_json(out / 'bytes.json', BYTES)
  else:
    with files.replacing(out / 'tokenizer.model') as temporary:
      temporary.write_bytes(train(sample, vocab))
  return load(out)


def train(sample: Iterable[str], vocab: int) -> bytes:
  """Train byte-pair encoding on a sample; the model depends on the sample and vocab alone.

  Merges are counted exactly, so the number of threads (the library's default of 16) does not change
  the result. Newlines and rare characters become byte pieces; text is not normalised.
  """
  lines = (
    line[i : i + _LINE]
    for text in sample
    for line in text.replace(_SPACE, '').split('\n')
    for i in range(0, len(line), _LINE)
  )
  first = next(lines, None)
  if first is None:
    raise ValueError('tokenizer: the generic training set has no text to train on')
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=itertools.chain([first], lines),
      model_writer=model,
      model_type='bpe',
      vocab_size=vocab,
      byte_fallback=True,
      normalization_rule_name='identity',
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      character_coverage=0.9995,
      pad_id=0,
      unk_id=1,
      bos_id=2,
      eos_id=3,
      minloglevel=2,
    )
  except RuntimeError as e:
    raise ValueError(f'tokenizer.vocab={vocab} does not fit the generic set: {e}') from None
  return model.getvalue()
