"""SentencePiece, byte and Hugging Face tokenizers behind encode, decode and ids."""

import abc
import dataclasses
import hashlib
import io
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from slm.base import files
from slm.data import beside
from slm.data.beside import SETTINGS as SETTINGS

# SentencePiece writes a space as U+2581, so a real U+2581 must go round it, as three byte pieces.
_SPACE = '\u2581'
_LINE = 2000  # characters per training sentence; SentencePiece drops those over 4192 bytes
# What these tokens are called where no file says it.
_USUAL = {
  'bos': ('<s>', '<bos>', '<|begin_of_text|>', '<|im_start|>', '[CLS]', '<|endoftext|>'),
  'eos': ('</s>', '<eos>', '<|end_of_text|>', '<|im_end|>', '[SEP]', '<|endoftext|>'),
  'pad': ('<pad>', '[PAD]'),
}


@dataclasses.dataclass(frozen=True)
class Ids:
  """Ids that are not text; None where the tokenizer has no such token."""

  pad: int | None
  bos: int | None
  eos: int  # what training writes after a text


class Tokenizer(abc.ABC):
  """Text to token ids and back.

  `fingerprint` is the SHA-256 of the file that defines it; where files beside that one change the
  ids of a text, of both.
  """

  name: str
  fingerprint: str
  ids: Ids
  ends: frozenset[int]  # any of them ends a text that a model writes
  begins: bool  # whether the begin token is put before every text
  known: np.ndarray  # bool [vocab]: ids that have a token, there may be gaps
  prefix_space: bool = False  # whether a space is put before every text
  chat_template: str | None = None  # Jinja, as transformers has it
  _printed: np.ndarray  # bool [vocab]

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
  def decode(self, ids: Sequence[int]) -> str:
    """Decode; special tokens and ids without a token give nothing."""

  def begun(self, text: str, begin: Sequence[int]) -> list[int]:
    """Encode with the ids `begin` before the text, unless it has its begin token already."""
    ids = self.encode(text)
    return ids if ids[:1] == [self.ids.bos] else [*begin, *ids]

  def continued(self, before: Sequence[int], more: Sequence[int]) -> str:
    """Return the text that `more` adds after `before`: the decoded whole less what both begin with.

    Decoded alone, a continuation could lose its first space, or a part of a character.
    """
    texts = [self.decode(before), self.decode([*before, *more])]
    return texts[1][len(os.path.commonprefix(texts)) :]

  @abc.abstractmethod
  def special(self) -> dict[str, str]:
    """Return the text of the tokens that are not text by what they are for; bytes have none."""

  def _prints(self, special: Iterable[int]) -> np.ndarray:
    """Say which ids are printed, bool [vocab]: not begin, end and other special tokens."""
    printed = self.known.copy()
    silent = {*special, *self.ends, self.ids.bos} - {None}
    printed[[i for i in silent if i < self.vocab]] = False
    return printed

  def _kept(self, ids: Sequence[int]) -> list[int]:
    """Return those of the ids that are printed."""
    found = np.asarray(ids, np.int64)
    found = found[(found >= 0) & (found < self.vocab)]
    return found[self._printed[found]].tolist()


class Bytes(Tokenizer):
  """UTF-8 bytes; the fallback that fits every text."""

  name = 'bytes'
  begins = True
  ids = Ids(pad=0, bos=1, eos=2)
  ends = frozenset([2])
  _offset = 3
  known = np.ones(256 + _offset, bool)
  special = dict

  def __init__(self, path: pathlib.Path):
    content = files.read_json(path)
    if content != BYTES:
      raise ValueError(f'{path}: expected {BYTES}, found {content}')
    self.fingerprint = files.sha256(path)

  def encode(self, text: str) -> list[int]:
    """Encode without begin or end tokens."""
    return [b + self._offset for b in text.encode()]

  def decode(self, ids: Sequence[int]) -> str:
    """Decode; a cut character becomes U+FFFD."""
    kept = bytes(int(i) - self._offset for i in ids if self._offset <= i < self.vocab)
    return kept.decode('utf-8', errors='replace')


BYTES = {'name': 'bytes', 'offset': 3}


class SentencePiece(Tokenizer):
  """A SentencePiece model and what the files beside it add; decode(encode(x)) == x with bytes.

  Its texts begin with the begin token, unless settings beside it leave that out.
  """

  name = 'sentencepiece'

  def __init__(self, path: pathlib.Path):
    content, about = path.read_bytes(), beside.read(path.parent)
    with files.reading(path, 'a SentencePiece model'):
      self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
      own_prefix = self._model.encode('a', out_type=str)[0].startswith(_SPACE)
    m = self._model
    self._unk, size = m.unk_id(), m.get_piece_size()
    self._escape = [m.piece_to_id(f'<0x{b:02X}>') for b in _SPACE.encode()]
    # Those of the model itself are text, but in a directory of transformers.
    control = [m.id_to_piece(i) for i in range(size) if m.is_control(i)] if about.settings else []
    self._added = _Added(about, control, self._piece, size)
    self.known = np.arange(max([size - 1, *self._added.ids.values()]) + 1) < size
    self.known[[*self._added.ids.values()]] = True
    own = {'bos': m.bos_id(), 'eos': m.eos_id(), 'pad': m.pad_id()}
    own = {which: i for which, i in own.items() if i >= 0}
    self.ids, self.ends = _choose(path, about, self._find, own, self.known)
    self.chat_template = about.chat_template
    said = about.settings.get('add_bos_token', not about.settings)
    self.begins = bool(said) and self.ids.bos is not None
    prefix = about.settings.get('add_prefix_space')
    self.prefix_space = own_prefix if prefix is None else bool(prefix)
    if self.prefix_space != own_prefix:
      self._model = _with_prefix(content, self.prefix_space)
    alike = not (self.prefix_space and self._added.ids)
    self._inner = self._model if alike else _with_prefix(content, False)
    # After an added token too a space is put, if the settings are of the older way of reading.
    self._legacy = not alike and bool(about.settings.get('legacy'))
    self._printed = self._prints(self._added.special)
    changes: dict[str, Any] = {
      'added': {t: i for t, i in sorted(self._added.ids.items()) if self._piece(t) != i},
      'begins': None if self.begins else False,
      'prefix_space': None if self.prefix_space == own_prefix else self.prefix_space,
    }
    self.fingerprint = _fingerprint(content, changes)

  def _piece(self, text: str) -> int | None:
    """Return the id of a piece of the model, None if it has none of that text."""
    i = self._model.piece_to_id(text)
    return i if self._model.id_to_piece(i) == text else None

  def _find(self, text: str) -> int | None:
    return self._added.ids.get(text, self._piece(text))

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

  def _encode(self, model: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    if _SPACE not in text or self._unk in self._escape:
      return model.encode(text)
    parts = model.encode(text.split(_SPACE))
    return parts[0] + [i for part in parts[1:] for i in self._escape + part]

  def decode(self, ids: Sequence[int]) -> str:
    """Decode; begin, end, padding and other special tokens give nothing."""
    kept, text = self._kept(ids), ''
    if not self._added.ids:
      return self._model.decode(kept)
    groups = itertools.groupby(kept, lambda i: self._added.text.get(i))
    for number, (token, group) in enumerate(groups):
      model = self._inner if number else self._model
      text += token * len([*group]) if token else model.decode([*group])
    return text

  def special(self) -> dict[str, str]:
    """Return the text of the tokens that are not text by what they are for."""
    ids = {**dataclasses.asdict(self.ids), 'unk': self._unk if self._unk >= 0 else None}
    names = lambda i: self._added.text.get(i) or self._model.id_to_piece(i)
    return {which: names(ids[which]) for which in sorted(ids) if ids[which] is not None}


class _Added:
  """Tokens that files beside a SentencePiece model add, and how they cut a text.

  The tokenizers library finds them, as it does for transformers: the longest first, with their
  flags for the white space beside them.
  """

  def __init__(
    self, about: beside.Beside, control: Sequence[str], piece: Callable[[str], int | None],
    size: int,
  ):  # fmt: skip
    self.ids: dict[str, int] = {}
    tokens = [token for _, token in about.added]
    free = itertools.count(max([size - 1, *(i for i, _ in about.added if i is not None)]) + 1)
    for i, token in about.added:
      own = piece(token.content) if i is None else i
      self.ids[token.content] = next(free) if own is None else own
    for text in filter(None, [*control, *about.named.values()]):
      if text not in self.ids and (i := piece(text)) is not None:
        self.ids[text] = i
        tokens.append(tokenizers.AddedToken(text, special=True))
    special = {token.content for token in tokens if token.special}
    self.special = {self.ids[text] for text in special}
    self.text = {i: text for text, i in self.ids.items()}
    self._splitter = tokenizers.Tokenizer(tokenizers.models.WordLevel({'': 0}, unk_token=''))
    self._splitter.add_tokens(tokens)

  def split(self, text: str) -> list[int | str]:
    """Cut a text into ids of added tokens and the texts between them."""
    if not self.ids:
      return [text]
    cut = self._splitter.encode(text, add_special_tokens=False)
    return [
      self.ids[token] if token else text[first:last]
      for token, (first, last) in zip(cut.tokens, cut.offsets, strict=True)
    ]


def _with_prefix(content: bytes, prefix: bool) -> sentencepiece.SentencePieceProcessor:
  """Return a SentencePiece model that puts a space before every text, or none."""
  model = sentencepiece_model_pb2.ModelProto.FromString(content)
  model.normalizer_spec.add_dummy_prefix = prefix
  return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


class HuggingFace(Tokenizer):
  """A tokenizer.json of the tokenizers library. Whether it is lossless is the file's affair.

  A truncation, padding or dropout that was saved in it is of the job that saved it: switched off.
  """

  name = 'huggingface'  # whether it puts a space before texts, its own file says

  def __init__(self, path: pathlib.Path):
    about = beside.read(path.parent)
    with files.reading(path, 'a tokenizer.json'):
      text = path.read_text()
      self._model = m = tokenizers.Tokenizer.from_str(text)
      m.no_truncation()
      m.no_padding()
      if getattr(m.model, 'dropout', None):
        m.model.dropout = None
      own = m.get_vocab()
      m.add_tokens([token for _, token in about.added])
      has = m.get_vocab()
      m.add_special_tokens([t for t in about.named.values() if t in has])
      # As the file's post-processor has it; transformers reads `add_bos_token` without one alone.
      whole = m.encode('a')
      masked = zip(whole.ids, whole.special_tokens_mask, strict=True)
      prefix = [i for i, _ in itertools.takewhile(lambda x: x[1], masked)]
    for i, token in about.added:  # of tokens that are in both the file has the say
      got = m.token_to_id(token.content)
      if token.content not in own and i not in (None, got):
        raise ValueError(
          f'{path}: {token.content!r} would get the id {got}, the files beside it give it {i}'
        )
    if len(prefix) > 1:
      raise ValueError(f'{path}: puts {len(prefix)} tokens before a text, expected one or none')
    vocab = m.get_vocab()
    self.known = np.zeros(max(vocab.values()) + 1, bool)
    self.known[[*vocab.values()]] = True
    self.ids, self.ends = _choose(path, about, m.token_to_id, {}, self.known)
    self.begins = bool(prefix)
    if prefix:
      self.ids = dataclasses.replace(self.ids, bos=prefix[0])
    self.chat_template = about.chat_template
    self._printed = self._prints(())
    changes = {'added': {t: i for t, i in sorted(vocab.items()) if t not in own}}
    self.fingerprint = _fingerprint(text.encode(), changes)

  def tokens(self) -> dict[str, int]:
    """Return the id of every token."""
    return self._model.get_vocab()

  def special(self) -> dict[str, str]:
    """Return the text of the tokens that are not text by what they are for."""
    ids = dataclasses.asdict(self.ids)
    return {which: self._model.id_to_token(i) for which, i in ids.items() if i is not None}

  def encode(self, text: str) -> list[int]:
    """Encode without begin or end tokens."""
    return self._model.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int]) -> str:
    """Decode; begin, end and other special tokens give nothing."""
    return self._model.decode(self._kept(ids), skip_special_tokens=True)


def _choose(
  path: pathlib.Path, about: beside.Beside, find: Callable[[str], int | None],
  own: Mapping[str, int], known: np.ndarray,
) -> tuple[Ids, frozenset[int]]:  # fmt: skip
  """Return the ids that are not text and those that end one, from the first file that says.

  Settings beside the tokenizer come first: what they leave out beside an end token is absent. Then
  the tokenizer's `own`, the configs of its model, and usual names.

  Raises:
    ValueError: naming the file, if it names a begin or end token that is not there, or none ends.
  """

  def choose(which: str) -> int | None:
    if text := about.named.get(which):
      if (i := find(text)) is None and which != 'pad':
        where = about.folder / SETTINGS
        raise ValueError(f'{where}: the vocabulary has none of the tokens {text}')
      return i
    if which in about.named and which != 'eos':
      return None
    if which in own or about.named.get('eos'):
      return own.get(which)
    said = [i for i in about.ids[which] if i < len(known) and known[i]]
    usual = (find(text) for text in _USUAL[which])
    return next((i for i in (*said, *usual) if i is not None), None)

  pad, bos, eos = (choose(which) for which in ('pad', 'bos', 'eos'))
  if eos is None:
    names = ', '.join(_USUAL['eos'])
    raise ValueError(f'{path}: no file says how texts end, and it has none of the tokens {names}')
  return Ids(pad, bos, eos), frozenset([eos, *about.ids['eos']])


def _fingerprint(content: bytes, changes: Mapping[str, Any]) -> str:
  """Hash what defines a tokenizer: its file, and what is read otherwise because of others."""
  said = {name: value for name, value in changes.items() if value not in (None, {})}
  more = json.dumps(said, sort_keys=True).encode() if said else b''
  return hashlib.sha256(content + more).hexdigest()


FILES = {  # the first that a folder holds is read
  'tokenizer.json': HuggingFace,
  'tokenizer.model': SentencePiece,
  'bytes.json': Bytes,
}


CARRIED = (*FILES, *beside.FILES)  # all that is read


def load(path: str | pathlib.Path) -> Tokenizer:
  """Load from a prepared data directory's `tokenizer/`, any folder that holds one, or a file.

  Raises:
    FileNotFoundError: if there is none.
    ValueError: naming the file that is damaged, or the two that are of different tokenizers.
  """
  path = pathlib.Path(path)
  if path.is_file():
    kind = SentencePiece if path.suffix == '.model' else HuggingFace
    return FILES.get(path.name, kind)(path)
  name = next((name for name in FILES if (path / name).exists()), None)
  if name is None:
    raise FileNotFoundError(f'{path}: expected one of {", ".join(FILES)}, found none')
  tok = FILES[name](path / name)
  if isinstance(tok, HuggingFace) and (path / 'tokenizer.model').exists():
    _check_agree(tok, path)
  return tok


def _check_agree(tok: HuggingFace, folder: pathlib.Path) -> None:
  """Refuse a SentencePiece model beside a tokenizer.json that numbers the same pieces otherwise.

  Other files are called tokenizer.model too, tiktoken's for instance: they are not read.
  """
  try:
    content = (folder / 'tokenizer.model').read_bytes()
    other = sentencepiece.SentencePieceProcessor(model_proto=content)
  except RuntimeError:
    return
  vocab = tok.tokens()
  for i in range(other.get_piece_size()):
    if other.is_control(i) or other.is_unknown(i) or other.is_unused(i):
      continue  # what these are called is often changed
    if vocab.get(piece := other.id_to_piece(i), i) != i:
      raise ValueError(
        f'{folder}: tokenizer.json and tokenizer.model are of different tokenizers ({piece!r} has '
        f'the id {vocab[piece]} in one and {i} in the other): remove the one that is not used'
      )


def build(name: str, vocab: int, path: str, sample: Iterable[str], out: pathlib.Path) -> Tokenizer:
  """Write the tokenizer's files into the folder `out` and load it.

  With `path`, a file or a folder, it is the one there, with all files beside it that are read; else
  `name` is bytes, or sentencepiece, trained on `sample`.
  """
  if path:
    tok, source = load(path), pathlib.Path(path)  # refuse a wrong file before it is copied
    kind = next(name for name, kind in FILES.items() if isinstance(tok, kind))
    folder = source if source.is_dir() else source.parent
    parts = {part: folder / part for part in beside.FILES if (folder / part).exists()}
    parts[kind] = source / kind if source.is_dir() else source
    for part, file in parts.items():
      with files.replacing(out / part) as temporary:
        temporary.write_bytes(file.read_bytes())
  elif name == 'bytes':
    files.write_json(out / 'bytes.json', BYTES)
  else:
    with files.replacing(out / 'tokenizer.model') as temporary:
      temporary.write_bytes(train(sample, vocab))
  return load(out)


def train(sample: Iterable[str], vocab: int) -> bytes:
  """Train byte-pair encoding on the sample; the model depends on text and vocab alone.

  Merges are counted exactly, so the number of threads (left at the library's 16) cannot change
  the result. Newlines and rare characters become byte pieces; nothing is normalised.
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
