"""Constraints that a program can check, attached to prompts: the 25 kinds of IFEval.

Kinds, arguments and the ranges they are drawn from are those of IFEval (Zhou et al. 2023, arXiv
2311.07911); the sentences and keywords are not. A constraint's id and arguments make a check of
slm.inference.verifiers: by `labelled` one of the evaluation, or one that Tülu 3 was trained with.
"""

import random
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

RELATIONS = ('less than', 'at least')
ENDINGS = ('Any other questions?', 'Is there anything else I can help with?')
LANGUAGES = {
  'en': 'English', 'es': 'Spanish', 'pt': 'Portuguese', 'ar': 'Arabic', 'hi': 'Hindi',
  'fr': 'French', 'ru': 'Russian', 'de': 'German', 'ja': 'Japanese', 'it': 'Italian',
  'bn': 'Bengali', 'uk': 'Ukrainian', 'th': 'Thai', 'ur': 'Urdu', 'ta': 'Tamil', 'te': 'Telugu',
  'bg': 'Bulgarian', 'ko': 'Korean', 'pl': 'Polish', 'he': 'Hebrew', 'fa': 'Persian',
  'vi': 'Vietnamese', 'ne': 'Nepali', 'sw': 'Swahili', 'kn': 'Kannada', 'mr': 'Marathi',
  'gu': 'Gujarati', 'pa': 'Punjabi', 'ml': 'Malayalam', 'fi': 'Finnish',
}  # fmt: skip
OPTIONS = ('My answer is yes.', 'My answer is no.', 'My answer is maybe.')
TRAINED = ('tulu3_fixed', 'tulu3_released')  # labels of Tülu 3's training
LABELS = ('official', 'official_loose', *TRAINED)
_KEYWORDS = """amber anchor apple arrow autumn badge balance bamboo basket beacon blanket blossom
  border bottle branch bridge bright bronze bucket butter button cabin candle canvas canyon carbon
  castle cedar chain chalk channel cherry circle citizen clay clever cloud clover coast collar
  copper coral corner cotton cradle crystal curtain custom dawn delta desert dinner distance doctor
  dragon eager early earth eleven engine evening fabric falcon family feather fence fiddle flavor
  forest fossil fountain fresh frost galaxy garden gentle ginger glacier glass golden granite
  harbor harvest hidden hollow honest honey hunter island jacket jungle kettle ladder lantern
  lemon letter library linen lively marble market meadow melody middle mirror modest mountain
  museum narrow needle nephew nimble number ocean olive orange orchard oyster paper parade pepper
  pilot planet plenty pocket polite prairie pretty purple quarry quiet rabbit random reason ribbon
  river rocket saddle salmon satin season second shadow shelter silver simple singer slender smooth
  spider spring square stable steady stone story summer sunset table tender thunder timber towel
  travel tunnel turtle valley velvet village violin walnut water weather welcome whisper window
  winter wooden yellow zebra"""
KEYWORDS = tuple(_KEYWORDS.split())


class Kind(NamedTuple):
  """A kind of constraint: how its arguments are drawn, and sentences that state it.

  `draw` takes a generator and the prompt. Lists are filled into a sentence as quoted words.
  """

  draw: Callable[[random.Random, str], dict[str, Any]]
  sentences: Sequence[str]


class Constraint(NamedTuple):
  """A constraint of one prompt: its kind, its arguments, and the sentence that states it."""

  id: str
  args: dict[str, Any]
  sentence: str


def _counted(name: str, most: int, relation: str, **others: Callable[[random.Random], Any]) -> Any:
  """Draw 1 to `most` for the argument `name`, a relation, and others."""
  return lambda rng, prompt: {
    **{key: draw(rng) for key, draw in others.items()},
    name: rng.randint(1, most),
    relation: rng.choice(RELATIONS),
  }


def _up_to(name: str, most: int) -> Any:
  return lambda rng, prompt: {name: rng.randint(1, most)}


def _keywords(name: str) -> Any:
  return lambda rng, prompt: {name: rng.sample(KEYWORDS, 2)}


def _sentence_bound(rng: random.Random, prompt: str) -> dict[str, Any]:
  relation = rng.choice(RELATIONS)  # no text has fewer sentences than one
  return {'num_sentences': rng.randint(1 + (relation == 'less than'), 20), 'relation': relation}


def _nth_paragraph(rng: random.Random, prompt: str) -> dict[str, Any]:
  number = rng.randint(1, 5)
  nth, word = rng.randint(1, number), rng.choice(KEYWORDS)
  return {'num_paragraphs': number, 'nth_paragraph': nth, 'first_word': word}


def _choice(name: str, options: Sequence[str]) -> Any:
  return lambda rng, prompt: {name: rng.choice(options)}


def _nothing(rng: random.Random, prompt: str) -> dict[str, Any]:
  return {}


KINDS: dict[str, Kind] = {
  'keywords:existence': Kind(_keywords('keywords'), (
    'Use the words {keywords} in your reply.',
    'Your answer has to mention {keywords}.',
    'Make sure that {keywords} occur somewhere in what you write.',
  )),
  'keywords:frequency': Kind(
    _counted('frequency', 3, 'relation', keyword=lambda rng: rng.choice(KEYWORDS)), (
    'The word "{keyword}" should occur {relation} {frequency} times.',
    'Write "{keyword}" {relation} {frequency} times in your answer.',
  )),
  'keywords:forbidden_words': Kind(_keywords('forbidden_words'), (
    'Do not use the words {forbidden_words}.',
    'Leave {forbidden_words} out of your reply altogether.',
    'Your answer may not contain {forbidden_words}.',
  )),
  'keywords:letter_frequency': Kind(
    _counted('let_frequency', 10, 'let_relation', letter=lambda rng: rng.choice(
      string.ascii_lowercase)), (
    'The letter {letter} should occur {let_relation} {let_frequency} times.',
    'Use the letter "{letter}" {let_relation} {let_frequency} times in all.',
  )),
  'language:response_language': Kind(_choice('language', tuple(LANGUAGES)), (
    'Reply in {language} only.',
    'Write the whole answer in {language}, and no other language.',
  )),
  'length_constraints:number_sentences': Kind(_sentence_bound, (
    'Answer in {relation} {num_sentences} sentences.',
    'Your reply should have {relation} {num_sentences} sentences.',
  )),
  'length_constraints:number_paragraphs': Kind(_up_to('num_paragraphs', 5), (
    'Write {num_paragraphs} paragraphs, with the divider *** between them.',
    'Split the answer into exactly {num_paragraphs} paragraphs; put *** between paragraphs.',
  )),
  'length_constraints:number_words': Kind(
    lambda rng, prompt: {'num_words': rng.randint(100, 500), 'relation': rng.choice(RELATIONS)}, (
    'Use {relation} {num_words} words.',
    'The length of the answer should be {relation} {num_words} words.',
  )),
  'length_constraints:nth_paragraph_first_word': Kind(_nth_paragraph, (
    'Write {num_paragraphs} paragraphs with a blank line between them, and nothing else divided '
    'by blank lines. Paragraph {nth_paragraph} has to begin with the word {first_word}.',
    'There should be {num_paragraphs} paragraphs, separated by two line breaks; the first word of '
    'paragraph {nth_paragraph} is "{first_word}".',
  )),
  'detectable_content:number_placeholders': Kind(_up_to('num_placeholders', 4), (
    'Include at least {num_placeholders} placeholders in square brackets, such as [name].',
    'Leave at least {num_placeholders} blanks to fill in, written like [date].',
  )),
  'detectable_content:postscript': Kind(_choice('postscript_marker', ('P.S.', 'P.P.S')), (
    'End with a postscript that starts with {postscript_marker}',
    'After your answer, add a postscript; begin it with {postscript_marker}',
  )),
  'detectable_format:number_bullet_lists': Kind(_up_to('num_bullets', 5), (
    'Give exactly {num_bullets} bullet points, each on a line that starts with "* ".',
    'Your reply should contain {num_bullets} Markdown bullets, no more and no fewer, such as:\n'
    '* One point.',
  )),
  'detectable_format:constrained_response': Kind(_nothing, (
    'Choose one of these as your answer: "My answer is yes.", "My answer is no.", '
    '"My answer is maybe."',
    'Reply with exactly one of: My answer is yes. / My answer is no. / My answer is maybe.',
  )),
  'detectable_format:number_highlighted_sections': Kind(_up_to('num_highlights', 4), (
    'Highlight at least {num_highlights} passages with Markdown, like *this passage*.',
    'Mark {num_highlights} or more parts of your answer with asterisks, as in *important part*.',
  )),
  'detectable_format:multiple_sections': Kind(
    lambda rng, prompt: {
      'section_spliter': rng.choice(('Section', 'SECTION')), 'num_sections': rng.randint(1, 5)}, (
    'Divide your answer into {num_sections} sections, each beginning with {section_spliter} and '
    'its number, such as {section_spliter} 1.',
    'Structure the reply as {num_sections} sections headed {section_spliter} 1, and so on.',
  )),
  'detectable_format:json_format': Kind(_nothing, (
    'Give the whole answer as JSON.',
    'Your entire output should be valid JSON; a Markdown code fence around it is fine.',
  )),
  'detectable_format:title': Kind(_nothing, (
    'Put a title in double angle brackets, such as <<a day at sea>>.',
    'Your answer needs a title, written like <<title>>.',
  )),
  'combination:two_responses': Kind(_nothing, (
    'Give two different answers, and separate them with six asterisks: ******',
    'Write two distinct replies with ****** between them and nowhere else.',
  )),
  'combination:repeat_prompt': Kind(lambda rng, prompt: {'prompt_to_repeat': prompt}, (
    'First repeat the request above word for word, without this sentence, and then answer it.',
    'Begin by copying what was asked so far exactly; only then give your answer.',
  )),
  'startend:end_checker': Kind(_choice('end_phrase', ENDINGS), (
    'The last words of your reply should be: {end_phrase}',
    'Finish with exactly this phrase and nothing after it: {end_phrase}',
  )),
  'startend:quotation': Kind(_nothing, (
    'Put your whole reply in double quotation marks.',
    'The answer should start and end with a double quotation mark.',
  )),
  'change_case:capital_word_frequency': Kind(
    _counted('capital_frequency', 20, 'capital_relation'), (
    'Use {capital_relation} {capital_frequency} words written in capital letters only.',
    'Words in ALL CAPITALS should occur {capital_relation} {capital_frequency} times.',
  )),
  'change_case:english_capital': Kind(_nothing, (
    'Write in English, in capital letters only.',
    'Your whole answer should be in English and in CAPITALS.',
  )),
  'change_case:english_lowercase': Kind(_nothing, (
    'Write in English, in small letters only.',
    'Answer in English without a single capital letter.',
  )),
  'punctuation:no_comma': Kind(_nothing, (
    'Do not use commas.',
    'Your reply may not contain a comma.',
  )),
}  # fmt: skip

_ALL = frozenset(KINDS)
_WORDS = {'keywords:forbidden_words', 'keywords:existence'}
_LINES = {
  'length_constraints:number_paragraphs', 'length_constraints:nth_paragraph_first_word',
}  # fmt: skip
_CASES = {
  'change_case:english_capital', 'change_case:english_lowercase',
  'change_case:capital_word_frequency',
}  # fmt: skip
# What IFEval does not put into one prompt; conflicts hold both ways, and of each kind with itself.
_CONFLICTS: dict[str, frozenset[str] | set[str]] = {
  'language:response_language': {
    'detectable_format:multiple_sections', 'keywords:existence', 'keywords:frequency',
    'keywords:forbidden_words', 'startend:end_checker', 'change_case:english_capital',
    'change_case:english_lowercase',
  },
  'length_constraints:number_paragraphs': {*_LINES, 'length_constraints:number_sentences'},
  'detectable_format:constrained_response': _ALL,
  'detectable_format:multiple_sections': {'detectable_format:number_highlighted_sections'},
  'detectable_format:json_format': _ALL - _WORDS,
  'combination:two_responses': _ALL - _WORDS - {
    'language:response_language', 'detectable_format:title', 'punctuation:no_comma'},
  'combination:repeat_prompt': _ALL - {
    'keywords:existence', 'detectable_format:title', 'punctuation:no_comma'},
  'change_case:english_capital': _CASES,
  'change_case:english_lowercase': _CASES,
  'startend:quotation': {'detectable_format:title'},
}  # fmt: skip
# Each kind's verifier in Tülu 3's training, and the names of its arguments there.
_TULU3: dict[str, tuple[str, Mapping[str, str]]] = {
  'keywords:existence': ('verify_keywords', {'keywords': 'keyword_list'}),
  'keywords:frequency': ('verify_keyword_frequency', {'keyword': 'word', 'frequency': 'N'}),
  'keywords:forbidden_words': (
    'validate_forbidden_words', {'forbidden_words': 'forbidden_words'}),
  'keywords:letter_frequency': (
    'verify_letter_frequency', {'letter': 'letter', 'let_frequency': 'N'}),
  'language:response_language': ('validate_response_language', {'language': 'language'}),
  'length_constraints:number_sentences': (
    'verify_sentence_constraint', {'num_sentences': 'N', 'relation': 'quantifier'}),
  'length_constraints:number_paragraphs': ('verify_paragraph_count', {'num_paragraphs': 'N'}),
  'length_constraints:number_words': (
    'validate_word_constraint', {'num_words': 'N', 'relation': 'quantifier'}),
  'length_constraints:nth_paragraph_first_word': (
    'validate_paragraphs',
    {'num_paragraphs': 'N', 'first_word': 'first_word', 'nth_paragraph': 'i'}),
  'detectable_content:number_placeholders': ('validate_placeholders', {'num_placeholders': 'N'}),
  'detectable_content:postscript': (
    'verify_postscript', {'postscript_marker': 'postscript_marker'}),
  'detectable_format:number_bullet_lists': ('verify_bullet_points', {'num_bullets': 'N'}),
  'detectable_format:constrained_response': ('validate_choice', {}),
  'detectable_format:number_highlighted_sections': (
    'validate_highlighted_sections', {'num_highlights': 'N'}),
  'detectable_format:multiple_sections': (
    'validate_sections', {'num_sections': 'N', 'section_spliter': 'section_splitter'}),
  'detectable_format:json_format': ('validate_json_format', {}),
  'detectable_format:title': ('validate_title', {}),
  'combination:two_responses': ('validate_two_responses', {}),
  'combination:repeat_prompt': ('validate_repeat_prompt', {'prompt_to_repeat': 'original_prompt'}),
  'startend:end_checker': ('validate_end', {'end_phrase': 'end_phrase'}),
  'startend:quotation': ('validate_quotation', {}),
  'change_case:capital_word_frequency': (
    'validate_frequency_capital_words',
    {'capital_frequency': 'N', 'capital_relation': 'quantifier'}),
  'change_case:english_capital': ('validate_uppercase', {}),
  'change_case:english_lowercase': ('validate_lowercase', {}),
  'punctuation:no_comma': ('validate_no_commas', {}),
}  # fmt: skip


def conflict(a: str, b: str) -> bool:
  """Return whether two kinds are never put into one prompt."""
  return a == b or b in _CONFLICTS.get(a, ()) or a in _CONFLICTS.get(b, ())


def draw(rng: random.Random, prompt: str, kind: str, labels: str = 'official') -> Constraint:
  """Draw a constraint of a kind, and a sentence that states it as `labels` check it."""
  args = KINDS[kind].draw(rng, prompt)
  sentences = KINDS[kind].sentences
  if labels in TRAINED:
    args = _as_trained(kind, args)
    sentences = [x for x in sentences if 'fence' not in x]  # around JSON: not in training
  sentence = rng.choice(sentences).format_map(_words(args))
  divider = labels in TRAINED and kind == 'length_constraints:number_paragraphs'
  return Constraint(kind, args, sentence.replace('***', '* * *') if divider else sentence)


def _as_trained(kind: str, args: Mapping[str, Any]) -> dict[str, Any]:
  """Return arguments in words that hold for Tülu 3's verifiers: exactly, at least, at most."""
  relation = next((key for key in args if key.endswith('relation')), '')
  if not relation:
    return dict(args)
  if kind in ('keywords:frequency', 'keywords:letter_frequency'):
    return {**args, relation: 'exactly'}
  if args[relation] == 'at least':
    return dict(args)
  number = next(key for key, x in args.items() if isinstance(x, int))
  return {**args, relation: 'at most', number: args[number] - 1}


def labelled(constraint: Constraint, labels: str) -> dict[str, Any]:
  """Return the check of a constraint that was drawn for `labels`: a verifier's id, and arguments.

  `labels` is official, official_loose, tulu3_fixed or tulu3_released.
  """
  if labels not in TRAINED:
    return {'id': f'ifeval.{labels}.{constraint.id}', 'args': constraint.args}
  name, names = _TULU3[constraint.id]
  args = {names[key]: value for key, value in constraint.args.items() if key in names}
  if constraint.id == 'detectable_format:constrained_response':
    args = {'options': list(OPTIONS)}
  return {'id': f'ifeval.{labels}.{name}', 'args': args}


def _words(args: Mapping[str, Any]) -> dict[str, Any]:
  """Return arguments as a sentence has them: languages by name, lists as quoted words."""
  named = {'language': LANGUAGES.get(args.get('language', ''))}
  quoted = {
    key: ' and '.join(f'"{x}"' for x in value)
    for key, value in args.items()
    if isinstance(value, list)
  }
  return {**args, **named, **quoted}


def attach(
  rng: random.Random, prompt: str, number: int, kinds: Sequence[str] = tuple(KINDS), *,
  labels: str = 'official',
) -> tuple[str, list[Constraint]]:  # fmt: skip
  """Return a prompt with sentences that state constraints, and those constraints.

  They are up to `number` kinds without conflicts, whose arguments do not contradict each other
  under `labels`: fewer where a drawn one admits no other.
  """
  chosen: list[Constraint] = []
  for kind in rng.sample(list(kinds), len(kinds)):
    if len(chosen) < number and not any(conflict(kind, other.id) for other in chosen):
      drawn = draw(rng, prompt, kind, labels)
      if not any(contradict(drawn, other, labels) for other in chosen):
        chosen.append(drawn)
  chosen.sort(key=lambda x: x.id != 'combination:repeat_prompt')  # repeats what is before it
  return ' '.join([prompt, *(x.sentence for x in chosen)]), chosen


def contradict(a: Constraint, b: Constraint, labels: str = 'official') -> bool:
  """Return whether the arguments of two constraints are ones that no text may satisfy together.

  IFEval draws such prompts; no kinds that `conflict` knows are asked about.
  """
  return _rules_out(a, b, labels) or _rules_out(b, a, labels)


def _rules_out(a: Constraint, b: Constraint, labels: str) -> bool:
  trained, texts = labels in TRAINED, _texts(b)
  name, other = a.id.partition(':')[2], b.id.partition(':')[2]
  at_most = any(x in ('less than', 'at most', 'exactly') for x in a.args.values())
  if name in ('existence', 'frequency', 'forbidden_words', 'nth_paragraph_first_word'):
    return any(x in y or y in x for x in _texts(a) for y in texts)  # one word, in one constraint
  if name == 'letter_frequency' and at_most:
    capitals = trained and other == 'english_capital'  # only small letters are counted
    return capitals or any(a.args['letter'] in x.lower() for x in texts)
  if name == 'capital_word_frequency' and at_most:
    return other == 'postscript' or 'SECTION' in texts
  if name in ('english_capital', 'english_lowercase'):
    change = str.upper if name == 'english_capital' else str.lower
    exact = trained and other in ('postscript', 'end_checker', 'nth_paragraph_first_word')
    return (exact or other == 'multiple_sections') and any(change(x) != x for x in texts)
  if name == 'no_comma':
    return any(',' in x for x in texts)
  if trained and name == 'quotation':
    return other == 'end_checker' or b.args.get('nth_paragraph') == 1
  if labels == 'tulu3_released' and name == 'multiple_sections':  # nothing may come before them
    return other == 'quotation' or b.args.get('nth_paragraph') == 1
  # Dividers of * * * begin with an asterisk, as bullet points do.
  return trained and (name, other) == ('number_bullet_lists', 'number_paragraphs')


def _texts(constraint: Constraint) -> list[str]:
  """Return the words and phrases among the arguments of a constraint."""
  values = [x if isinstance(x, list) else [x] for x in constraint.args.values()]
  number = {'less than', 'at least', 'at most', 'exactly'}
  return [x for value in values for x in value if isinstance(x, str) and x not in number]
