"""Sentences, all-capitals tokens and language of a text, with no data to download.

The rules of sentences are those of Punkt (Kiss and Strunk 2006) as NLTK ships it, with short lists
in place of its trained tables; docs/verifiers.md counts where the two differ.
"""

import functools
import itertools
import re
import threading
from typing import Any

# Before a full stop, which then ends no sentence; single letters are too.
_ABBREVIATIONS = """dr mr mrs ms prof st sr jr rev gen col maj capt lt sgt adm gov sen rep messrs
  inc corp co cos ltd bros ave ft vs vt va pa ga fla ala ariz conn minn mich wis calif colo okla
  tenn ill jan feb aug sept oct nov dec tues wed fri ph.d a.m p.m d.c u.s u.k u.n u.s.a n.y n.j
  n.c s.c l.a w.va"""
# Capitalised after an abbreviation or dots, they begin a sentence.
_STARTERS = """the this these it they we you i there but and so if when while although since because
  as in on at for from to under despite instead however moreover nevertheless nonetheless indeed
  meanwhile similarly most many some both each another such what how where that his her its our
  their your even here though without into through between which yes finally still yet thus
  therefore hence besides please"""
# After an initial, so do these.
_COMMON = 'he she then next by behind after before first my who'
ABBREVIATIONS = frozenset(_ABBREVIATIONS.split())
STARTERS = frozenset(_STARTERS.split())
COMMON = STARTERS.union(_COMMON.split())
# A mark that may end a sentence, in a word.
_MARK = re.compile(r'[.?!](?=[)";}\]*:@\'({\[!?‘’“”«»]|$)')
_CLOSING = re.compile(r'["\')\]}‘’“”«»]+(?=--|$)')
_SPLIT = re.compile(r'[("`{\[;&#*@)}\]?!“”‘’«»]|--')  # of a word into tokens
_NUMBER = re.compile(r'-?[.,]?\d[\d,.-]*')
_LOCK = threading.Lock()


def sentences(text: str) -> list[str]:
  """Split a text into sentences, without the white space around them."""
  found, begin = [], 0
  words = list(re.finditer(r'\S+', text))
  for word, following in itertools.zip_longest(words, words[1:]):
    marks = [mark.end() for mark in _MARK.finditer(word[0])]
    if not marks:
      continue
    listed = word.start() == 0 or text[word.start() - 1] == '\n'
    rest = word[0][marks[-1] :] or (following[0] if following else '')
    if not rest or not _ends(word[0][: marks[-1]], rest, listed):
      continue
    end = word.start() + marks[-1]
    if closing := _CLOSING.match(text[end : word.end()]):
      end += len(closing[0])
    found.append(text[begin:end])
    begin = end
  found.append(text[begin:])
  return [x.strip() for x in found if x.strip()]


def _ends(word: str, following: str, listed: bool) -> bool:
  """Return whether a word up to a mark ends a sentence; `listed`: it begins a line."""
  core = _SPLIT.split(word[:-1].lower())[-1].lstrip(",-'")
  if word[-1] in '?!' or not core:
    return True
  first = re.match(r'(\w*)(\.?)', following)
  lower = first[1].lower() if following[0].isupper() and not first[2] else ''
  if core.endswith('.'):  # dots
    return lower in STARTERS
  if len(core) == 1 and core.isalpha():  # an initial, or an item of a list
    return (listed and not first[2]) or lower in COMMON
  if core in ABBREVIATIONS or core.split('-')[-1] in ABBREVIATIONS:
    return lower in STARTERS
  return not (_NUMBER.fullmatch(core) and following[0].islower())


# What NLTK's tokenizer cuts a word at (the Penn Treebank's rules), where it matters to capitals.
_CUT = re.compile(r"""[\s;@#$%&?!*\[\](){}<>"`«»“”‘’„‒–—―]+|--+|\.{2,}|''+|[:,](?!\d)|\.(?=\s*$)""")
_CLITIC = re.compile(
  r"(?<=[^\W\d_])(?=(?:n't|N'T|'(?:[sSmMdD]|ll|LL|re|RE|ve|VE))$)"
  r'|(?<=\bCAN)(?=NOT\b)|(?<=\bGON)(?=NA\b)|(?<=\bGOT)(?=TA\b)|(?<=\bWAN)(?=NA$)'
)


def capitals(text: str) -> int:
  """Count the tokens of a text whose letters are all capitals, of which they have one or more."""
  parts = (part for sentence in sentences(text) for part in _CUT.split(sentence))
  return sum(token.isupper() for part in parts for token in _CLITIC.split(part))


def language(text: str) -> str:
  """Return the ISO 639-1 code of a text's language, '' where langdetect finds none.

  The same text always has the same one: langdetect's random numbers start from a fixed seed.

  Raises:
    ValueError: if langdetect is not installed.
  """
  with _LOCK:
    library = _langdetect()
  detector = library.detector_factory._factory.create()
  detector.seed = 0
  detector.append(text)
  try:
    return detector.detect()
  except library.LangDetectException:  # no letters
    return ''


@functools.cache
def _langdetect() -> Any:
  try:
    import langdetect
  except ImportError:
    raise ValueError("languages need langdetect: pip install 'slm[rl]'") from None
  langdetect.detector_factory.init_factory()
  return langdetect
