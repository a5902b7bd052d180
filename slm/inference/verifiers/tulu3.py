"""The verifiers of constraints that Tülu 3 was trained with, as released and as corrected since.

Lambert et al. 2024, arXiv 2411.15124; names and arguments are those of the labels in its published
data. They are not those of the evaluation: docs/verifiers.md has the differences.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from slm.inference.verifiers import answers, official, words
from slm.inference.verifiers.arguments import Count, Letter, Text, Words

Quantifier = Literal['at least', 'around', 'at most']
_NO_END = r'(?<!\w\.\w.)(?<![A-Z][a-z]\.)'  # no initials and no Mr. before the end of a sentence


def _compare(size: int, quantifier: Quantifier, bound: int, tolerance: int) -> bool:
  if quantifier == 'around':
    return abs(size - bound) <= tolerance
  return size >= bound if quantifier == 'at least' else size <= bound


def _tenth(bound: int) -> int:
  return max(round(0.1 * bound), 1)


def keywords(text: str, keyword_list: Words) -> bool:
  """Return whether each keyword occurs, also inside words."""
  return all(x.lower() in text.lower() for x in keyword_list)


def keyword_frequency(text: str, word: Text, N: Count) -> bool:
  """Return whether a word occurs exactly N times."""
  return re.findall(r'\w+', text.lower()).count(word.lower()) == N


def forbidden_words(text: str, forbidden_words: Words) -> bool:
  """Return whether no forbidden word occurs, not even inside a word."""
  return not any(x.lower() in text.lower() for x in forbidden_words)


def letter_frequency(text: str, letter: Letter, N: Count) -> bool:
  """Return whether a character, in this case, occurs exactly N times."""
  return text.count(letter) == N


def response_language(text: str, language: Text) -> bool:
  """Return whether the text is in a language (ISO 639-1)."""
  return words.language(text) == language


def paragraph_count(text: str, N: Count) -> bool:
  """Return whether * * * divides the text into N paragraphs, none of them blank."""
  paragraphs = '\n'.join(map(str.strip, text.splitlines())).split('* * *')
  return all(map(str.strip, paragraphs)) and len(paragraphs) == N


def word_constraint(text: str, N: Count, quantifier: Quantifier) -> bool:
  """Compare the number of words between white space; around allows a tenth."""
  return _compare(len(text.split()), quantifier, N, _tenth(N))


def sentence_constraint(text: str, N: Count, quantifier: Quantifier) -> bool:
  """Compare the number of sentences, which end in . ? or !; around allows one."""
  size = len(re.split(rf'{_NO_END}(?<=[.?!])\s', text))
  return _compare(size, quantifier, N, 1)


def sentence_constraint_released(text: str, N: Count, quantifier: Quantifier) -> bool:
  """Compare the number of sentences, which do not end in !; around allows one."""
  size = len(re.split(rf'{_NO_END}(?<=[.?])\s', text))
  return _compare(size, quantifier, N, 1)


def paragraphs(text: str, N: Count, first_word: Text, i: Count) -> bool:
  """Return whether blank lines divide the text into N, the i-th of which begins with a text."""
  found = text.split('\n\n')
  return len(found) == N and 1 <= i <= N and found[i - 1].strip().startswith(first_word)


def postscript(text: str, postscript_marker: Text) -> bool:
  """Return whether something follows the first marker."""
  return bool(text.partition(postscript_marker)[2].strip())


def placeholders(text: str, N: Count) -> bool:
  """Return whether there are at least N [placeholders]."""
  return official.number_placeholders(text, N)


def placeholders_released(text: str, N: Count) -> bool:
  """Return True: the released function returned a pair, which is true whatever it holds."""
  return True


def bullet_points(text: str, N: Count) -> bool:
  """Return whether N lines begin with * or -."""
  return sum(x.strip().startswith(('*', '-')) for x in text.split('\n')) == N


def title(text: str) -> bool:
  """Return whether a line holds <<...>>, which may be empty."""
  return any(x.find('>>', x.find('<<') + 2) >= 0 for x in text.split('\n') if '<<' in x)


def choice(text: str, options: Words) -> bool:
  """Return whether an option occurs in the text."""
  return any(x in text for x in options)


def choice_released(text: str, options: Words) -> bool:
  """Return whether the text occurs in an option: the released function had them interchanged."""
  return any(text in x for x in options)


def highlighted_sections(text: str, N: Count) -> bool:
  """Return whether there are at least N pairs of asterisks, with anything between or nothing."""
  return sum(x.count('*') // 2 for x in text.split('\n')) >= N


def sections(text: str, N: Count, section_splitter: Text) -> bool:
  """Return whether at least N sections begin with the splitter, in any case, and a number."""
  return answers.count(re.escape(section_splitter), text, r'\s?', r'\s?\d+\s?') >= N


def sections_released(text: str, N: Count, section_splitter: Text) -> bool:
  """Return whether the splitter, with a number or not, divides the text into N."""
  found = text.split(section_splitter)
  return len(found) - (found[:1] == ['']) == N


def repeat_prompt(text: str, original_prompt: Text) -> bool:
  """Return whether the text begins with the prompt."""
  return text.startswith(original_prompt)


def two_responses(text: str) -> bool:
  """Return whether one ****** divides the text into two that differ; one may be blank."""
  found = [x.strip() for x in text.split('******')]
  return len(found) == 2 and found[0] != found[1]


def uppercase(text: str) -> bool:
  """Return whether the text has no small letter."""
  return text == text.upper()


def lowercase(text: str) -> bool:
  """Return whether the text has no capital."""
  return text == text.lower()


def capital_words(text: str, N: Count, quantifier: Quantifier) -> bool:
  """Compare the number of words of A to Z in capitals; around allows a tenth."""
  return _compare(len(re.findall(r'\b[A-Z]+\b', text)), quantifier, N, _tenth(N))


def capital_words_released(text: str, N: Count, quantifier: Quantifier) -> bool:
  """Compare the number of words of A to Z in capitals; around allows nothing."""
  return _compare(len(re.findall(r'\b[A-Z]+\b', text)), quantifier, N, 0)


def end(text: str, end_phrase: Text) -> bool:
  """Return whether the text ends with a phrase."""
  return text.endswith(end_phrase)


def quotation(text: str) -> bool:
  """Return whether the text begins and ends with a double quotation mark, perhaps the same."""
  return text.startswith('"') and text.endswith('"')


FIXED: dict[str, Callable[..., bool]] = {
  'verify_keywords': keywords,
  'verify_keyword_frequency': keyword_frequency,
  'validate_forbidden_words': forbidden_words,
  'verify_letter_frequency': letter_frequency,
  'validate_response_language': response_language,
  'verify_sentence_constraint': sentence_constraint,
  'verify_paragraph_count': paragraph_count,
  'validate_word_constraint': word_constraint,
  'validate_paragraphs': paragraphs,
  'validate_placeholders': placeholders,
  'verify_postscript': postscript,
  'verify_bullet_points': bullet_points,
  'validate_choice': choice,
  'validate_highlighted_sections': highlighted_sections,
  'validate_sections': sections,
  'validate_json_format': answers.is_json,
  'validate_title': title,
  'validate_two_responses': two_responses,
  'validate_repeat_prompt': repeat_prompt,
  'validate_end': end,
  'validate_quotation': quotation,
  'validate_frequency_capital_words': capital_words,
  'validate_uppercase': uppercase,
  'validate_lowercase': lowercase,
  'validate_no_commas': official.no_comma,
}
RELEASED = FIXED | {
  'verify_sentence_constraint': sentence_constraint_released,
  'validate_placeholders': placeholders_released,
  'validate_choice': choice_released,
  'validate_sections': sections_released,
  'validate_frequency_capital_words': capital_words_released,
}


def stripped(checker: Callable[..., bool]) -> Callable[..., bool]:
  """Return a checker of a text without the white space around it."""

  @functools.wraps(checker)
  def check(text: str, **args: Any) -> bool:
    return checker(text.strip(), **args)

  return check


def label(
  dataset: str, ground_truth: str | Mapping[str, Any], *, released: bool = False
) -> list[dict[str, Any]]:
  """Return the label of a row of Tülu 3's data for reinforcement learning.

  `dataset` names the verifier; nulls among the arguments are left out, and nothing is changed in
  `ground_truth`.

  Raises:
    ValueError: if it names none: such a row could never earn a reward.
  """
  name = dataset.lower()
  if name in ('gsm8k', 'math'):
    gsm8k = 'gsm8k.release' if released else 'gsm8k.current'
    name = gsm8k if name == 'gsm8k' else 'math.flex'
    return [{'id': name, 'args': {'answer': ground_truth}, 'weight': 1.0}]
  if name != 'ifeval':
    raise ValueError(f'dataset: expected gsm8k, math or ifeval, found {dataset!r}')
  given = json.loads(ground_truth) if isinstance(ground_truth, str) else ground_truth
  if not isinstance(given, Mapping) or 'func_name' not in given:
    raise ValueError(f'ground_truth: expected an object with func_name, found {given!r}')
  family = 'ifeval.tulu3_released' if released else 'ifeval.tulu3_fixed'
  args = {key: x for key, x in given.items() if x is not None and key != 'func_name'}
  return [{'id': f'{family}.{given["func_name"]}', 'args': args, 'weight': 1.0}]
