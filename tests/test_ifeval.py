"""Constraints: every kind by hand in both semantics, and the official ones beside the harness."""

import functools
import importlib.util
import random
import types

import pytest

from experiments.verifiers import run
from slm.data import constraints
from slm.inference import verifiers
from slm.inference.verifiers import official, tulu3, words

LANGDETECT = pytest.mark.skipif(
  not importlib.util.find_spec('langdetect'), reason='needs langdetect'
)
ENGLISH = 'the weather in the mountains was cold and the travellers were glad of the fire'
GERMAN = 'das Wetter in den Bergen war kalt und die Reisenden freuten sich auf das Feuer'
LESS, LEAST = 'less than', 'at least'

# Kind: arguments, a text that satisfies it, one that just does not.
OFFICIAL = {
  'keywords:existence': ({'keywords': ['ship', 'sea']}, 'Ships at SEA', 'Ships at bay'),
  'keywords:frequency': (
    {'keyword': 'tea ', 'frequency': 2, 'relation': LEAST}, 'Steam and tea', 'Cream and tea',
  ),
  'keywords:forbidden_words': ({'forbidden_words': ['ship']}, 'Shipping', 'A Ship.'),
  'keywords:letter_frequency': (
    {'letter': 'E', 'let_frequency': 2, 'let_relation': LESS}, 'Enough', 'Eve',
  ),
  'language:response_language': ({'language': 'de'}, GERMAN, ENGLISH),
  'length_constraints:number_sentences': (
    {'num_sentences': 3, 'relation': LEAST}, 'One! Two? Three.', 'One for Mr. Three. Two.',
  ),
  'length_constraints:number_paragraphs': ({'num_paragraphs': 2}, '***\na *** b\n', 'a *** *** b'),
  'length_constraints:number_words': (
    {'num_words': 3, 'relation': LESS}, 'one - two', 'one well-known',
  ),
  'length_constraints:nth_paragraph_first_word': (
    {'num_paragraphs': 2, 'nth_paragraph': 2, 'first_word': 'Amber'},
    'a\n\n"amber! b', 'a\n\nb amber',
  ),
  'detectable_content:number_placeholders': ({'num_placeholders': 2}, '[a] [b]', '[a [b]'),
  'detectable_content:postscript': ({'postscript_marker': 'P.P.S'}, 'a p. p.s', 'a P.S. b'),
  'detectable_format:number_bullet_lists': (
    {'num_bullets': 2}, '* a\n  - b\n**c**', '* a\n- b\n- c',
  ),
  'detectable_format:constrained_response': ({}, 'So: My answer is no.', 'My answer is no'),
  'detectable_format:number_highlighted_sections': (
    {'num_highlights': 2}, '*a* **b**', '*a* ** ** *\n*',
  ),
  'detectable_format:multiple_sections': (
    {'section_spliter': 'Section', 'num_sections': 2},
    'Section 1 a\nSection2 b', 'Section 1 SECTION 2',
  ),
  'detectable_format:json_format': ({}, '```json\n{"a": 1}\n```', '{"a": 1} so'),
  'detectable_format:title': ({}, 'a <<b>>', 'a << >> <<\n>>'),
  'combination:two_responses': ({}, 'a ****** b ******', 'a ****** a'),
  'combination:repeat_prompt': ({'prompt_to_repeat': 'Say it.'}, ' say IT. It.', 'Say: it.'),
  'startend:end_checker': ({'end_phrase': 'Peace!'}, '"So, PEACE!" ', 'Peace! Now'),
  'startend:quotation': ({}, ' "a" ', '"'),
  'change_case:capital_word_frequency': (
    {'capital_frequency': 2, 'capital_relation': LEAST}, "I'M here: OK.", 'I am Ok',
  ),
  'change_case:english_capital': ({}, ENGLISH.upper(), GERMAN.upper()),
  'change_case:english_lowercase': ({}, ENGLISH, ENGLISH.capitalize()),
  'punctuation:no_comma': ({}, 'a; b', 'a, b'),
}  # fmt: skip
# The same for the verifiers that Tülu 3 was trained with, where released and corrected ones agree.
TRAINED = {
  'verify_keywords': ({'keyword_list': ['ship', 'sea']}, 'Ships at SEA', 'Ships at bay'),
  'verify_keyword_frequency': ({'word': 'Tea', 'N': 2}, 'tea, TEA', 'tea, tea and tea'),
  'validate_forbidden_words': ({'forbidden_words': ['ship']}, 'A boat', 'Shipping'),
  'verify_letter_frequency': ({'letter': 'E', 'N': 1}, 'Eve', 'eve'),
  'validate_response_language': ({'language': 'de'}, GERMAN, ENGLISH),
  'verify_sentence_constraint': (
    {'N': 3, 'quantifier': 'at least'}, 'One. Two? Three.', 'Mr. One, e.g. two. Three.',
  ),
  'verify_paragraph_count': ({'N': 2}, ' a\n* * *\nb', 'a\n* * *\n* * *'),
  'validate_word_constraint': ({'N': 20, 'quantifier': 'around'}, 'a ' * 18, 'a ' * 17),
  'validate_paragraphs': ({'N': 2, 'first_word': 'Amber', 'i': 2}, 'a\n\nAmbers', 'a\n\namber'),
  'validate_placeholders': ({'N': 2}, '[a] [b]', None),
  'verify_postscript': ({'postscript_marker': 'P.S.'}, 'a P.S. b', 'a P.S.'),
  'verify_bullet_points': ({'N': 2}, '* a\n **b**', '* a\n'),
  'validate_choice': ({'options': ['yes', 'no']}, 'yes', 'maybe'),
  'validate_highlighted_sections': ({'N': 2}, '*a* **', '*a*\n*\n*'),
  'validate_sections': (
    {'N': 2, 'section_splitter': 'Section'}, 'Section 1 a\nSection 2 b', 'Section 1',
  ),
  'validate_json_format': ({}, '{"a": 1}', '```json\n{"a": 1}\n```'),
  'validate_title': ({}, '<<>>', '<<>'),
  'validate_two_responses': ({}, 'a ******', 'a ****** a'),
  'validate_repeat_prompt': ({'original_prompt': 'Say it.'}, 'Say it. It.', 'say it. It.'),
  'validate_end': ({'end_phrase': 'Peace!'}, 'So, Peace!', 'So, peace!'),
  'validate_quotation': ({}, '"', '"a" b'),
  'validate_frequency_capital_words': ({'N': 2, 'quantifier': 'at most'}, 'A B', 'A B C'),
  'validate_uppercase': ({}, '3 OF 4', '3 Of 4'),
  'validate_lowercase': ({}, '3 of 4', '3 Of 4'),
  'validate_no_commas': ({}, 'a; b', 'a, b'),
}  # fmt: skip
# What passes with nothing at all. The released code raises where the language has no letters.
EMPTY_PASSES = {
  'validate_forbidden_words', 'validate_uppercase', 'validate_lowercase', 'validate_no_commas',
  'validate_frequency_capital_words',
}  # fmt: skip
CORRECTED = {
  'verify_sentence_constraint', 'validate_placeholders', 'validate_choice', 'validate_sections',
  'validate_frequency_capital_words',
}  # fmt: skip


def marked(table):
  """Parametrise over a table of kinds; those that need langdetect are skipped without it."""
  heavy = ('language', 'change_case:english')
  return pytest.mark.parametrize(
    'name', [pytest.param(k, marks=LANGDETECT if any(x in k for x in heavy) else ()) for k in table]
  )


def test_all_25_kinds_have_vectors():
  assert OFFICIAL.keys() == official.CHECKERS.keys() == constraints.KINDS.keys()
  assert TRAINED.keys() == tulu3.FIXED.keys() == tulu3.RELEASED.keys()
  assert len(OFFICIAL) == len(TRAINED) == 25
  assert {k for k in TRAINED if tulu3.FIXED[k] is not tulu3.RELEASED[k]} == CORRECTED


@marked(OFFICIAL)
def test_official_constraints(name):
  args, right, wrong = OFFICIAL[name]
  strict = functools.partial(verifiers.verify, f'ifeval.official.{name}', **args)
  loose = functools.partial(verifiers.verify, f'ifeval.official_loose.{name}', **args)
  assert strict(right) is True and loose(right) is True
  assert strict(wrong) is False
  for blank in ('', ' \n'):
    assert strict(blank) is False and loose(blank) is False


@marked(TRAINED)
def test_trained_constraints(name):
  args, right, wrong = TRAINED[name]
  for family in ('released', 'fixed'):
    check = functools.partial(verifiers.verify, f'ifeval.tulu3_{family}.{name}', **args)
    assert check(right) is True
    assert wrong is None or check(wrong) is False
    broken = family == 'released' and name in ('validate_placeholders', 'validate_choice')
    assert check('') is (name in EMPTY_PASSES or broken)


def test_what_was_corrected_after_the_release():
  def both(name, text, **args):
    families = ('ifeval.tulu3_released', 'ifeval.tulu3_fixed')
    return tuple(verifiers.verify(f'{family}.{name}', text, **args) for family in families)

  assert both('validate_placeholders', 'none', N=3) == (True, False)
  assert both('validate_choice', 'I say yes', options=['yes', 'no']) == (False, True)
  assert both('validate_choice', 'ye', options=['yes', 'no']) == (True, False)
  assert both('verify_sentence_constraint', 'A! B! C!', N=3, quantifier='at least') == (False, True)
  capitals = functools.partial(both, 'validate_frequency_capital_words', quantifier='around')
  assert capitals('A B C', N=3) == (True, True) and capitals('A B C', N=4) == (False, True)
  sections = functools.partial(both, 'validate_sections', section_splitter='Part')
  assert sections('Part 1 a Part 2 b', N=2) == (True, True)
  assert sections('So: Part 1 a Part 2 b', N=2) == (False, True)
  assert sections('Part one. Part two.', N=2) == (True, False)


def test_constraints_of_the_evaluation_are_said_in_training():
  """The experiment's table: every kind has the arguments of its verifier in training."""
  assert run.TRAINING.keys() == official.CHECKERS.keys()
  assert {name for name, _ in run.TRAINING.values()} == tulu3.FIXED.keys()
  for kind, (name, convert) in run.TRAINING.items():
    verifiers.bind(f'ifeval.tulu3_fixed.{name}', convert(OFFICIAL[kind][0]))
  at_most_one = run.bound('num_words', 'relation')({'num_words': 2, 'relation': LESS})
  assert at_most_one == {'N': 1, 'quantifier': 'at most'}


def test_a_loose_check_takes_any_of_eight_variants():
  text = 'Sure!\n**"So it is."**\nDone'
  assert official.variants(text) == [
    text, 'Sure!\n"So it is."\nDone', '**"So it is."**\nDone', '"So it is."\nDone',
    'Sure!\n**"So it is."**', 'Sure!\n"So it is."', '**"So it is."**', '"So it is."',
  ]  # fmt: skip
  for name, args in (('startend:quotation', {}), ('startend:end_checker', {'end_phrase': 'is.'})):
    assert verifiers.verify(f'ifeval.official.{name}', text, **args) is False
    assert verifiers.verify(f'ifeval.official_loose.{name}', text, **args) is True
  # Two constraints of one prompt may be met by different variants.
  label = official.label(
    ['startend:quotation', 'keywords:existence'],
    [{'keywords': None}, {'keywords': ['done'], 'frequency': None}], loose=True,
  )  # fmt: skip
  assert verifiers.score(text, verifiers.read(label)).reward == 1
  assert verifiers.score(text.replace('"', ''), verifiers.read(label)).reward == 0.5


SENTENCES = [
  ('Dr. Ash met Mr. Bo at 5 p.m. on Jan. 3. They left.', 2),
  ('It cost $3.50. "Really?" he said. (Yes.) Well!', 5),
  ('J. K. Rowling wrote it. So did R. Dahl.', 2),
  ('1. One\n2. Two\n3. three', 3),  # numbers of a list end sentences before a capital: as in Punkt
  ('A. Loud sounds\nB. Lights', 3),  # so do its letters
  ('So it is.\n\n**Done.**', 3),  # the asterisks are one, as in Punkt
  ('Wait... what? Wait... The end.', 3),
  ('The U.S. economy grew. The U.S. The end.', 3),
  ('“It is.” Then “no!” No.', 3),
  ('No mark at all', 1),
  ('e.g. this etc. that', 3),  # Punkt does not know them either
  ('', 0),
]


@pytest.mark.parametrize(('text', 'number'), SENTENCES)
def test_sentences(text, number):
  assert len(words.sentences(text)) == number, words.sentences(text)


@pytest.mark.parametrize(
  ('text', 'number'),
  [
    ("I'M SURE", 3), ('WELL-KNOWN A/B', 2), ("DON'T", 2), ('CANNOT', 2), ('A1 2 3', 1), ("I've", 1),
    ('(USA), NASA: OK.', 3), ('U.S. Mail', 1), ('A--B', 2), ('"HI"', 1), ('iPhone Ok', 0), ('', 0),
  ],
)  # fmt: skip
def test_capitals(text, number):
  assert words.capitals(text) == number


@LANGDETECT
def test_languages_are_the_same_every_time():
  assert len({words.language('mango tango') for _ in range(20)}) == 1
  assert words.language('123 456') == ''
  check = functools.partial(verifiers.verify, text='123 456', language='de')
  assert check('ifeval.official.language:response_language') is True  # as the evaluation has it
  assert check('ifeval.tulu3_fixed.validate_response_language') is False


def test_drawn_constraints_are_checks_and_said_in_words():
  rng, seen, phrasings = random.Random(0), set(), set()
  for _ in range(400):
    prompt, drawn = constraints.attach(rng, 'Name a ship.', rng.randint(1, 3))
    assert prompt.startswith('Name a ship. ') and 1 <= len(drawn) <= 3
    label = official.label([x.id for x in drawn], [x.args for x in drawn])
    assert len(verifiers.read(label)) == len(drawn)  # every argument is there, and of its type
    for x in drawn:
      assert x.sentence in prompt and '{' not in x.sentence
      seen.add(x.id)
      phrasings.add((x.id, x.sentence))
    ids = [x.id for x in drawn]
    assert not any(constraints.conflict(a, b) for a in ids for b in ids if a is not b)
  assert seen == constraints.KINDS.keys()
  assert all(sum(kind == k for kind, _ in phrasings) > 1 for k in constraints.KINDS)
  again = constraints.attach(random.Random(3), 'Name a ship.', 2)
  assert again == constraints.attach(random.Random(3), 'Name a ship.', 2)


@functools.cache
def harness():
  """Return the IFEval modules of lm-evaluation-harness, or skip: they need NLTK's data too."""
  pytest.importorskip('lm_eval')
  pytest.importorskip('langdetect')
  nltk = pytest.importorskip('nltk')
  pytest.importorskip('immutabledict')
  try:
    nltk.data.find('tokenizers/punkt_tab')
  except LookupError:
    pytest.skip("needs NLTK's punkt_tab (python -m nltk.downloader punkt_tab)")
  import langdetect
  from lm_eval.tasks.ifeval import instructions_registry, utils

  langdetect.DetectorFactory.seed = 0
  return utils, instructions_registry


TEXTS = [
  '', ' ', 'a', '"', ENGLISH, GERMAN, ENGLISH.upper(), f'"{ENGLISH}."', 'My answer is maybe.',
  '\n'.join(['* one', '- two', '', ' * three', '**four**', '*', 'five']),
  '*a* **b** *** c ***\n\n****** d ****** e', '{"a": [1, 2]}', '```json\n[]\n```',
  '<<a>> <<>> P.P.S. b', 'Section 1\nAmber, [name] [date\n] Section 2 P.S. [x]',
  'Amber a.\n\n"amber" b.\n\n \n\nc!',
  "I'M SURE NASA WON'T: the U.S. CANNOT... OK? Dr. NO. A-B.",
  'Sure!\n"x"\n* y *\nAny other questions?',
]  # fmt: skip


@pytest.mark.parametrize('name', official.CHECKERS)
def test_official_constraints_as_lm_evaluation_harness(name):
  utils, _ = harness()
  rng = random.Random(0)
  arguments = [OFFICIAL[name][0]] + [constraints.KINDS[name].draw(rng, 'a') for _ in range(3)]
  for args in arguments:
    example = types.SimpleNamespace(
      instruction_id_list=[name], kwargs=[args], prompt=args.get('prompt_to_repeat', '')
    )
    for text in (*TEXTS, *OFFICIAL[name][1:]):
      for family, theirs in (
        ('official', utils.test_instruction_following_strict),
        ('official_loose', utils.test_instruction_following_loose),
      ):
        ours = verifiers.verify(f'ifeval.{family}.{name}', text, **args)
        assert ours is theirs(example, text).follow_all_instructions, (family, args, text)


def test_conflicts_as_lm_evaluation_harness():
  _, registry = harness()
  theirs = registry.conflict_make(registry.INSTRUCTION_CONFLICTS)
  for a in constraints.KINDS:
    for b in constraints.KINDS:
      assert constraints.conflict(a, b) is (b in theirs[a]), (a, b)
