"""What `configs/data.py` describes, checked before any work."""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slm.data import documents

_RESERVED = ('windows', 'tokenizer', 'clusters', 'index')
ALL = 'all'  # the split name of a source that is to be split by hash


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
  """Which tokenizer to train, or the one at `path`; see slm/data/tokenizer.py."""

  name: str
  vocab: int
  path: str

  def __post_init__(self) -> None:
    names = ('sentencepiece', 'bytes', 'huggingface')
    if self.name not in names:
      raise ValueError(f'tokenizer.name={self.name!r}: expected one of {", ".join(names)}')
    if self.name == 'huggingface' and not self.path:
      raise ValueError('tokenizer.path: huggingface needs a tokenizer.json, or a folder with one')
    if self.name == 'bytes' and self.path:
      raise ValueError(f"tokenizer.path={self.path}: tokenizer.name='bytes' reads no file")
    if self.path and not Path(self.path).exists():
      raise FileNotFoundError(f'tokenizer.path={self.path}: no such file or folder')


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
  """What `configs/data.py` describes; keys are explained there."""

  out: str
  sets: dict[str, dict[str, str]]  # set -> split (or 'all') -> source
  tokenizer: TokenizerConfig
  context: int
  levels: tuple[int, ...]
  fit_windows: int
  dims: int
  sizes: tuple[int, ...]
  text_field: str
  id_field: str
  heldout: tuple[float, float]
  workers: int
  seed: int
  near_duplicates: float = 0.0
  sbert: str = ''

  def __post_init__(self) -> None:
    if not self.out:
      raise ValueError('out: give the directory to write to (--out=DIR)')
    if 'generic' not in self.sets:
      raise ValueError(f"sets: one must be named 'generic', found {', '.join(self.sets)}")
    for name, splits in self.sets.items():
      self._check_set(name, splits)
    if self.context < 2:
      raise ValueError(f'context={self.context}: expected at least 2')
    if not self.levels or min(self.levels) < 1 or len(set(self.levels)) < len(self.levels):
      raise ValueError(f'levels={self.levels}: expected distinct numbers of clusters')
    if min(self.fit_windows, self.dims) < 1 or self.workers < 0 or min(self.sizes, default=1) < 1:
      raise ValueError('fit_windows, dims and sizes must be at least 1, workers at least 0')
    if not 0 <= self.near_duplicates <= 0.98:  # above it, no two bands of a signature fit
      raise ValueError(
        f'near_duplicates={self.near_duplicates}: expected a similarity up to 0.98, or 0 for off'
      )
    if len(self.heldout) != 2 or min(self.heldout) < 0 or sum(self.heldout) >= 1:
      raise ValueError(f'heldout={self.heldout}: expected two shares with a sum below 1')

  def _check_set(self, name: str, splits: Mapping[str, str]) -> None:
    words = [name, *splits]
    if name in _RESERVED or not all(re.fullmatch(r'[A-Za-z0-9_-]+', word) for word in words):
      raise ValueError(f'sets: {name}.{"/".join(splits)}: not usable as a folder name')
    for split in splits:
      near = [whole for whole in documents.PLAIN if whole.startswith(split)]
      near += difflib.get_close_matches(split, documents.PLAIN)
      suffix = any(split.startswith(f'{whole}_') for whole in documents.PLAIN)
      if near and split not in (ALL, *documents.PLAIN) and not suffix:
        raise ValueError(
          f'sets: {name}.{split}: did you mean {name}.{near[0]}? A further split has a suffix, '
          'such as test_ood, or a name of its own'
        )
    if ALL in splits and len(splits) > 1 or not {ALL, 'train'}.intersection(splits):
      raise ValueError(f'sets.{name}: give one source, or a train split and others')

  def splits(self, name: str) -> tuple[str, ...]:
    """Return a set's splits in the order of their numbers; training is 0."""
    given = self.sets[name]
    return documents.PLAIN if ALL in given else ('train', *(s for s in given if s != 'train'))

  def made(self, name: str) -> list[tuple[int, str]]:
    """Return (number, name) of the splits that are to hold something."""
    shares = (1.0, *self.heldout) if ALL in self.sets[name] else None
    return [(i, s) for i, s in enumerate(self.splits(name)) if shares is None or shares[i] > 0]

  @classmethod
  def of(cls, config: Any) -> 'PrepareConfig':
    """Make it from a ConfigDict."""
    fields = dict(config.to_dict())
    for key in ('levels', 'sizes', 'heldout'):
      fields[key] = tuple(fields[key])
    return cls(**fields | {'tokenizer': TokenizerConfig(**fields['tokenizer'])})
