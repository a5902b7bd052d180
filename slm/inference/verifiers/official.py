"""The 25 constraints of IFEval (Zhou et al. 2023, arXiv 2311.07911), as evaluations check them.

Ids and arguments are those of the published prompts. Where the evaluation's code draws a missing
argument at random, it is required here. All of them read a text in a time in proportion to it.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from slm.inference.verifiers import answers, words
from slm.inference.verifiers.arguments import Count, Letter, Pattern, Patterns, Text

Relation = Literal['less than', 'at least']
OPTIONS = ('My answer is yes.', 'My answer is no.', 'My answer is maybe.')


def _compare(size: int, relation: Relation, bound: int) -> bool:
  return size < bound if relation == 'less than' else size >= bound


def existence(text: str, keywords: Patterns) -> bool:
  """Return whether each keyword, a regular expression, occurs."""
  return all(answers.count(x, text) for x in keywords)


def frequency(text: str, keyword: Pattern, frequency: Count, relation: Relation) -> bool:
  """Compare how often a keyword, a regular expression, occurs, also inside words."""
  return _compare(answers.count(keyword.strip(), text), relation, frequency)


def forbidden_words(text: str, forbidden_words: Patterns) -> bool:
  """Return whether no forbidden word, a regular expression, occurs as a word."""
  return not any(answers.count(x, text, r'\b', r'\b') for x in forbidden_words)


def letter_frequency(
  text: str, letter: Letter, let_frequency: Count, let_relation: Relation
) -> bool:
  """Compare how often a character occurs, in any case."""
  return _compare(text.lower().count(letter.lower()), let_relation, let_frequency)


def response_language(text: str, language: Text) -> bool:
  """Return whether the text is in a language (ISO 639-1), or none can be found."""
  return words.language(text) in (language, '')


def number_sentences(text: str, num_sentences: Count, relation: Relation) -> bool:
  """Compare the number of sentences."""
  return _compare(len(words.sentences(text)), relation, num_sentences)


def _parts(text: str, separator: str) -> int:
  """Count parts that are not blank; -1 if one that is neither first nor last is blank."""
  first, *rest = text.split(separator)
  if not rest:
    return bool(first.strip())
  *inner, last = rest
  return len(inner) + bool(first.strip()) + bool(last.strip()) if all(map(str.strip, inner)) else -1


def number_paragraphs(text: str, num_paragraphs: Count) -> bool:
  """Return whether *** divides the text into so many paragraphs."""
  return _parts(text, '***') == num_paragraphs


def number_words(text: str, num_words: Count, relation: Relation) -> bool:
  """Compare the number of runs of word characters."""
  return _compare(sum(1 for _ in re.finditer(r'\w+', text)), relation, num_words)


def nth_paragraph_first_word(
  text: str, num_paragraphs: Count, nth_paragraph: Count, first_word: Text
) -> bool:
  """Return whether there are so many paragraphs between blank lines, the n-th with a first word."""
  paragraphs = text.split('\n\n')
  number = sum(bool(x.strip()) for x in paragraphs)
  if number != num_paragraphs or not 1 <= nth_paragraph <= number:
    return False
  word = (paragraphs[nth_paragraph - 1].split() or [''])[0].lstrip("'").lstrip('"')
  return bool(word) and re.split('[.,?!\'"]', word)[0].lower() == first_word.lower()


def number_placeholders(text: str, num_placeholders: Count) -> bool:
  """Return whether there are at least so many [placeholders]."""
  return sum(1 for _ in re.finditer(r'\[[^\[\]\n]*\]', text)) >= num_placeholders


def postscript(text: str, postscript_marker: Pattern) -> bool:
  """Return whether a postscript marker, in any case and spacing, occurs."""
  marker = postscript_marker.strip()
  tolerant = {'P.P.S': r'p\.\s?p\.\s?s', 'P.S.': r'p\.\s?s\.'}
  if marker in tolerant:
    return re.search(tolerant[marker], text.lower()) is not None
  return answers.count(marker.lower(), text.lower()) > 0


def number_bullet_lists(text: str, num_bullets: Count) -> bool:
  """Return whether there are so many lines that begin with * or -, not with **."""
  stars = sum(1 for _ in re.finditer(r'^[^\S\n]*\*[^*].*$', text, re.MULTILINE))
  return stars + sum(x.lstrip().startswith('-') for x in text.split('\n')) == num_bullets


def constrained_response(text: str) -> bool:
  """Return whether one of the three answers yes, no, maybe occurs."""
  return any(option in text for option in OPTIONS)


def number_highlighted_sections(text: str, num_highlights: Count) -> bool:
  """Return whether there are at least so many *highlights* or **highlights**."""
  single = re.findall(r'\*[^\n*]*\*', text)
  double = re.findall(r'\*\*[^\n*]*\*\*', text)
  filled = [x for x in single if x.strip('*').strip()] + [x for x in double if x[2:-2].strip()]
  return len(filled) >= num_highlights


def multiple_sections(text: str, section_spliter: Pattern, num_sections: Count) -> bool:
  """Return whether at least so many sections begin with the splitter and a number."""
  heading = section_spliter.strip(), text, r'\s?', r'\s?\d+\s?'
  return answers.count(*heading, ignore_case=False) >= num_sections


def json_format(text: str) -> bool:
  """Return whether the text is JSON, within a fence or without."""
  text = text.strip()
  for fence in ('```json', '```Json', '```JSON', '```'):
    text = text.removeprefix(fence)
  return answers.is_json(text.removesuffix('```').strip())


def title(text: str) -> bool:
  """Return whether a line holds a <<title>> that is not blank."""
  for line in text.split('\n'):
    begin, end = line.find('<<'), line.rfind('>>')
    if 0 <= begin <= end - 3 and line[begin : end + 2].lstrip('<').rstrip('>').strip():
      return True
  return False


def two_responses(text: str) -> bool:
  """Return whether ****** divides the text into two responses that differ."""
  found = [x.strip() for x in text.split('******') if x.strip()]
  return _parts(text, '******') == 2 == len(set(found))


def repeat_prompt(text: str, prompt_to_repeat: Text) -> bool:
  """Return whether the text begins with the prompt, in any case."""
  return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(text: str, end_phrase: Text) -> bool:
  """Return whether the text ends with a phrase, in any case, within quotation marks or not."""
  return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(text: str) -> bool:
  """Return whether the text stands between double quotation marks."""
  text = text.strip()
  return len(text) > 1 and text[0] == text[-1] == '"'


def capital_word_frequency(text: str, capital_frequency: Count, capital_relation: Relation) -> bool:
  """Compare the number of tokens in capitals alone."""
  return _compare(words.capitals(text), capital_relation, capital_frequency)


def english_capital(text: str) -> bool:
  """Return whether the text is in capitals, and English or of no language."""
  return text.isupper() and words.language(text) in ('en', '')


def english_lowercase(text: str) -> bool:
  """Return whether the text is in small letters, and English or of no language."""
  return text.islower() and words.language(text) in ('en', '')


def no_comma(text: str) -> bool:
  """Return whether the text has no comma."""
  return ',' not in text


CHECKERS: dict[str, Callable[..., bool]] = {
  'keywords:existence': existence,
  'keywords:frequency': frequency,
  'keywords:forbidden_words': forbidden_words,
  'keywords:letter_frequency': letter_frequency,
  'language:response_language': response_language,
  'length_constraints:number_sentences': number_sentences,
  'length_constraints:number_paragraphs': number_paragraphs,
  'length_constraints:number_words': number_words,
  'length_constraints:nth_paragraph_first_word': nth_paragraph_first_word,
  'detectable_content:number_placeholders': number_placeholders,
  'detectable_content:postscript': postscript,
  'detectable_format:number_bullet_lists': number_bullet_lists,
  'detectable_format:constrained_response': constrained_response,
  'detectable_format:number_highlighted_sections': number_highlighted_sections,
  'detectable_format:multiple_sections': multiple_sections,
  'detectable_format:json_format': json_format,
  'detectable_format:title': title,
  'combination:two_responses': two_responses,
  'combination:repeat_prompt': repeat_prompt,
  'startend:end_checker': end_checker,
  'startend:quotation': quotation,
  'change_case:capital_word_frequency': capital_word_frequency,
  'change_case:english_capital': english_capital,
  'change_case:english_lowercase': english_lowercase,
  'punctuation:no_comma': no_comma,
}


def strict(checker: Callable[..., bool]) -> Callable[..., bool]:
  """Return a checker of a text as it is; a blank one fails."""

  @functools.wraps(checker)
  def check(text: str, **args: Any) -> bool:
    return bool(text.strip()) and checker(text, **args)

  return check


def loose(checker: Callable[..., bool]) -> Callable[..., bool]:
  """Return a checker that any variant of a text may pass; a blank variant fails."""

  @functools.wraps(checker)
  def check(text: str, **args: Any) -> bool:
    return any(x.strip() and checker(x, **args) for x in variants(text))

  return check


def variants(text: str) -> list[str]:
  """Return a text, whole and without its first, last and both lines, with asterisks and without."""
  lines = text.split('\n')
  cut = ['\n'.join(x).strip() for x in (lines[1:], lines[:-1], lines[1:-1])]
  return list(dict.fromkeys(y for x in (text, *cut) for y in (x, x.replace('*', ''))))


def label(
  instruction_id_list: Sequence[str], kwargs: Sequence[Mapping[str, Any]], *, loose: bool = False
) -> list[dict[str, Any]]:
  """Return the label of a published prompt: equal weights, 1 in all; nulls are left out."""
  family = 'ifeval.official_loose' if loose else 'ifeval.official'
  return [
    {
      'id': f'{family}.{name}',
      'args': {key: value for key, value in args.items() if value is not None},
      'weight': 1 / len(instruction_id_list),
    }
    for name, args in zip(instruction_id_list, kwargs, strict=True)
  ]
