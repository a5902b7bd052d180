"""SentencePiece, byte and Hugging Face tokenizers behind encode, decode and ids."""

import dataclasses
import hashlib
import io
import itertools
import pathlib
from collections.abc import Iterable, Sequence
from typing import Protocol

import sentencepiece
import tokenizers

from slm.base import files

# SentencePiece writes a space as U+2581, so a real U+2581 must go round it, as three byte pieces.
_SPACE = '\u2581'
SETTINGS = 'tokenizer_config.json'  # beside a tokenizer.json: says which tokens begin and end
_LINE = 2000  # characters per training sentence; SentencePiece drops those over 4192 bytes
_BEGIN = ('<s>', '<bos>', '<|begin_of_text|>', '<|im_start|>', '[CLS]', '<|endoftext|>')
_END = ('</s>', '<eos>', '<|end_of_text|>', '<|im_end|>', '[SEP]', '<|endoftext|>')


@dataclasses.dataclass(frozen=True)
class Ids:
  """Ids that are not text."""

  pad: int
  bos: int
  eos: int


class Tokenizer(Protocol):
  """Text to token ids and back. `fingerprint` is the SHA-256 of the file that defines it."""

  name: str
  vocab: int
  ids: Ids
  fingerprint: str
  begins: bool  # whether its models read the begin token before every text
  prefix_space: bool  # whether a space is put before every text

  def encode(self, text: str) -> list[int]:
    """Encode without begin or end tokens."""

  def decode(self, ids: Sequence[int]) -> str:
    """Decode; tokens that are not text give nothing."""

  def special(self) -> dict[str, str]:
    """Name the tokens that are not text, by what they are for; bytes have none."""


class SentencePiece:
  """A SentencePiece model with byte fallback; decode(encode(x)) == x."""

  name = 'sentencepiece'
  begins = True

  def __init__(self, path: pathlib.Path):
    model = path.read_bytes()
    try:
      self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as e:
      raise ValueError(f'{path}: not a SentencePiece model ({e})') from None
    m = self._model
    self.fingerprint = hashlib.sha256(model).hexdigest()
    self.vocab = m.get_piece_size()
    if m.bos_id() < 0 or m.eos_id() < 0:
      raise ValueError(f'{path}: the model needs a begin and an end token, found none')
    self.ids = Ids(max(m.pad_id(), 0), m.bos_id(), m.eos_id())
    self.prefix_space = m.encode('a', out_type=str)[0].startswith(_SPACE)
    self._escape = [m.piece_to_id(f'<0x{b:02X}>') for b in _SPACE.encode()]

  def encode(self, text: str) -> list[int]:
    """Encode without begin or end tokens."""
    if _SPACE not in text or self._model.unk_id() in self._escape:
      return self._model.encode(text)
    parts = self._model.encode(text.split(_SPACE))
    return parts[0] + [i for part in parts[1:] for i in self._escape + part]

  def decode(self, ids: Sequence[int]) -> str:
    """Decode; begin, end and padding tokens give nothing."""
    return self._model.decode([int(i) for i in ids])

  def special(self) -> dict[str, str]:
    """Name the tokens that are not text, by what they are for."""
    m = self._model
    ids = {'bos': m.bos_id(), 'eos': m.eos_id(), 'unk': m.unk_id(), 'pad': m.pad_id()}
    return {name: m.id_to_piece(i) for name, i in ids.items() if i >= 0}


class Bytes:
  """UTF-8 bytes; the fallback that fits every text."""

  name = 'bytes'
  begins = True
  prefix_space = False
  _offset = 3
  special = dict

  def __init__(self, path: pathlib.Path):
    found = files.read_json(path)
    if found != BYTES:
      raise ValueError(f'{path}: expected {BYTES}, found {found}')
    self.fingerprint = files.sha256(path)
    self.vocab = 256 + self._offset
    self.ids = Ids(pad=0, bos=1, eos=2)

  def encode(self, text: str) -> list[int]:
    """Encode without begin or end tokens."""
    return [b + self._offset for b in text.encode()]

  def decode(self, ids: Sequence[int]) -> str:
    """Decode; a cut character becomes U+FFFD."""
    kept = bytes(int(i) - self._offset for i in ids if i >= self._offset)
    return kept.decode('utf-8', errors='replace')


BYTES = {'name': 'bytes', 'offset': 3}


class HuggingFace:
  """A tokenizer.json of the tokenizers library. Whether it is lossless is the file's affair."""

  name = 'huggingface'
  prefix_space = False  # its own file says

  def __init__(self, path: pathlib.Path):
    text = path.read_text()
    try:
      self._model = tokenizers.Tokenizer.from_str(text)
    except Exception as e:  # noqa: BLE001 (the library raises nothing narrower)
      raise ValueError(f'{path}: not a tokenizer.json ({e})') from None
    self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
    # Not the number of tokens: the ids of a file may have gaps.
    self.vocab = max(self._model.get_vocab().values()) + 1
    begin, end = self._ends(path)
    pad = next((i for n in ('<pad>', '[PAD]') if (i := self._model.token_to_id(n)) is not None), 0)
    self.ids = Ids(pad, begin, end)
    self._special = {begin, end}
    self.begins = self._model.encode('a').ids[:1] == [begin]

  def _ends(self, path: pathlib.Path) -> tuple[int, int]:
    """Return the begin and end tokens: those that tokenizer_config.json names, or usual ones.

    Where it names an end alone, texts begin with that (as lm-evaluation-harness has it).
    """
    file = path.with_name(SETTINGS)
    settings = files.read_json(file) if file.exists() else {}
    named = [settings.get(f'{which}_token') for which in ('bos', 'eos')]
    begin, end = (x.get('content') if isinstance(x, dict) else x for x in named)
    if end is None:
      return self._find(path, _BEGIN), self._find(path, _END)
    return self._find(file, [begin or end]), self._find(file, [end])

  def _find(self, path: pathlib.Path, names: Sequence[str]) -> int:
    for name in names:
      if (found := self._model.token_to_id(name)) is not None:
        return found
    raise ValueError(f'{path}: the vocabulary has none of the tokens {", ".join(names)}')

  def special(self) -> dict[str, str]:
    """Name the tokens that are not text, by what they are for."""
    named = {'bos': self.ids.bos, 'eos': self.ids.eos}
    return {name: self._model.id_to_token(i) for name, i in named.items()}

  def encode(self, text: str) -> list[int]:
    """Encode without begin or end tokens."""
    return self._model.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int]) -> str:
    """Decode; begin and end tokens give nothing."""
    kept = [int(i) for i in ids if int(i) not in self._special]
    return self._model.decode(kept, skip_special_tokens=False)


FILES = {
  'tokenizer.model': SentencePiece,
  'tokenizer.json': HuggingFace,
  'bytes.json': Bytes,
}


def load(path: str | pathlib.Path) -> Tokenizer:
  """Load from a prepared data directory's `tokenizer/`, any folder that holds one, or a file."""
  path = pathlib.Path(path)
  if path.is_file():
    return (SentencePiece if path.suffix == '.model' else HuggingFace)(path)
  for name, kind in FILES.items():
    if (path / name).exists():
      return kind(path / name)
  raise FileNotFoundError(f'{path}: expected one of {", ".join(FILES)}, found none')


def build(name: str, vocab: int, path: str, sample: Iterable[str], out: pathlib.Path) -> Tokenizer:
  """Write the tokenizer's file into the folder `out` and load it.

  `name` is sentencepiece (trained on `sample`, or the model at `path`), bytes, or huggingface.
  """
  if name == 'bytes':
    files.write_json(out / 'bytes.json', BYTES)
  elif path:
    kind = {'sentencepiece': 'tokenizer.model', 'huggingface': 'tokenizer.json'}[name]
    source = pathlib.Path(path)
    load(source)  # refuse a wrong file before it is copied
    parts = {SETTINGS: source.with_name(SETTINGS), kind: source}
    if kind != 'tokenizer.json' or not parts[SETTINGS].exists():
      del parts[SETTINGS]
    for part, file in parts.items():
      with files.replacing(out / part) as temporary:
        temporary.write_bytes(file.read_bytes())
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
