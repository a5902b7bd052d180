"""Compare verifiers with lm-evaluation-harness and NLTK, and training with evaluation.

    python -m experiments.verifiers.run --prompts=ifeval.jsonl.gz --texts=news.jsonl.gz

Each prompt of IFEval is answered by texts that need no model: none, the prompt, a document as it
is and changed, and texts made to satisfy the constraints. OUT/table.md counts equal verdicts by
kind of constraint, sentences and capitals by document, and what satisfies constraints without an
answer; OUT/differences.jsonl has every verdict that differs.
"""

import collections
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from slm.base import console, files
from slm.data import sources
from slm.inference import verifiers
from slm.inference.verifiers import audit, official, words
from slm.reporting import tables

FLAGS = flags.FLAGS
Item = Mapping[str, Any]
Args = Mapping[str, Any]


def bound(size: str, relation: str) -> Callable[[Args], dict[str, Any]]:
  """Return how a bound of the evaluation is said in training: less than 5 is at most 4."""
  less = lambda args: args[relation] == 'less than'
  return lambda args: {
    'N': max(args[size] - less(args), 0), 'quantifier': 'at most' if less(args) else 'at least',
  }  # fmt: skip


def renamed(**names: str) -> Callable[[Args], dict[str, Any]]:
  """Return how arguments of the evaluation are named in training."""
  return lambda args: {new: args[old] for new, old in names.items()}


# Kind of constraint: its verifier in training, and the arguments of that.
TRAINING: dict[str, tuple[str, Callable[[Args], dict[str, Any]]]] = {
  'keywords:existence': ('verify_keywords', renamed(keyword_list='keywords')),
  'keywords:frequency': ('verify_keyword_frequency', renamed(word='keyword', N='frequency')),
  'keywords:forbidden_words': (
    'validate_forbidden_words', renamed(forbidden_words='forbidden_words')),
  'keywords:letter_frequency': (
    'verify_letter_frequency', renamed(letter='letter', N='let_frequency')),
  'language:response_language': ('validate_response_language', renamed(language='language')),
  'length_constraints:number_sentences': (
    'verify_sentence_constraint', bound('num_sentences', 'relation')),
  'length_constraints:number_paragraphs': ('verify_paragraph_count', renamed(N='num_paragraphs')),
  'length_constraints:number_words': ('validate_word_constraint', bound('num_words', 'relation')),
  'length_constraints:nth_paragraph_first_word': (
    'validate_paragraphs', renamed(N='num_paragraphs', i='nth_paragraph', first_word='first_word')),
  'detectable_content:number_placeholders': (
    'validate_placeholders', renamed(N='num_placeholders')),
  'detectable_content:postscript': (
    'verify_postscript', renamed(postscript_marker='postscript_marker')),
  'detectable_format:number_bullet_lists': ('verify_bullet_points', renamed(N='num_bullets')),
  'detectable_format:constrained_response': (
    'validate_choice', lambda args: {'options': list(official.OPTIONS)}),
  'detectable_format:number_highlighted_sections': (
    'validate_highlighted_sections', renamed(N='num_highlights')),
  'detectable_format:multiple_sections': (
    'validate_sections', renamed(N='num_sections', section_splitter='section_spliter')),
  'detectable_format:json_format': ('validate_json_format', renamed()),
  'detectable_format:title': ('validate_title', renamed()),
  'combination:two_responses': ('validate_two_responses', renamed()),
  'combination:repeat_prompt': (
    'validate_repeat_prompt', renamed(original_prompt='prompt_to_repeat')),
  'startend:end_checker': ('validate_end', renamed(end_phrase='end_phrase')),
  'startend:quotation': ('validate_quotation', renamed()),
  'change_case:capital_word_frequency': (
    'validate_frequency_capital_words', bound('capital_frequency', 'capital_relation')),
  'change_case:english_capital': ('validate_uppercase', renamed()),
  'change_case:english_lowercase': ('validate_lowercase', renamed()),
  'punctuation:no_comma': ('validate_no_commas', renamed()),
}  # fmt: skip


# One thing in some of the languages that prompts ask for: it is cold today, and we stay at home.
SAMPLES = {
  'ar': 'الطقس بارد اليوم ونحن نبقى في البيت',
  'bg': 'Днес времето е студено и ние оставаме вкъщи',
  'bn': 'আজ আবহাওয়া ঠান্ডা এবং আমরা বাড়িতে থাকি',
  'de': 'Heute ist es kalt und wir bleiben zu Hause',
  'fa': 'امروز هوا سرد است و ما در خانه می‌مانیم',
  'fi': 'Tänään on kylmä ja me jäämme kotiin',
  'gu': 'આજે ઠંડી છે અને અમે ઘરે રહીએ છીએ',
  'hi': 'आज मौसम ठंडा है और हम घर पर रहते हैं',
  'it': 'Oggi fa freddo e noi restiamo a casa',
  'kn': 'ಇಂದು ಚಳಿ ಇದೆ ಮತ್ತು ನಾವು ಮನೆಯಲ್ಲಿ ಇರುತ್ತೇವೆ',
  'ko': '오늘은 날씨가 추워서 우리는 집에 있습니다',
  'mr': 'आज थंडी आहे आणि आम्ही घरी राहतो',
  'ne': 'आज जाडो छ र हामी घरमा बस्छौं',
  'pa': 'ਅੱਜ ਠੰਢ ਹੈ ਅਤੇ ਅਸੀਂ ਘਰ ਰਹਿੰਦੇ ਹਾਂ',
  'pt': 'Hoje está frio e nós ficamos em casa',
  'ru': 'Сегодня холодно и мы остаёмся дома',
  'sw': 'Leo kuna baridi na sisi tunakaa nyumbani',
  'ta': 'இன்று குளிராக உள்ளது நாங்கள் வீட்டில் இருக்கிறோம்',
  'te': 'ఈరోజు చలిగా ఉంది మేము ఇంట్లో ఉంటాము',
  'th': 'วันนี้อากาศหนาวและเราอยู่บ้าน',
  'ur': 'آج موسم سرد ہے اور ہم گھر پر رہتے ہیں',
  'vi': 'Hôm nay trời lạnh và chúng tôi ở nhà',
}


def answers(item: Item, document: str) -> dict[str, str]:
  """Return texts that answer a prompt, by name."""
  short = ' '.join(document.split()[:60])
  bullets = '\n'.join(f'* {x}' for x in words.sentences(short))
  made = satisfying(item, short)
  return {
    'nothing': '',
    'prompt': item['prompt'],
    'short': short,
    'document': document,
    'capitals': short.upper(),
    'small letters': short.lower(),
    'bullets': f'Here you go:\n\n{bullets}\n\n**Done.**',
    'made': made,
    'made, quoted': f'"{made.lower()}"',
    'made, introduced': f'Sure!\n{made}\nI hope that helps.',
    'twice': f'{short}\n******\n{made}\n******',
    'JSON': f'```json\n{json.dumps({"text": short})}\n```',
  }


def satisfying(item: Item, text: str) -> str:
  """Return a text with what the constraints of a prompt ask for, as far as one text can."""
  args = {key: x for each in item['kwargs'] for key, x in each.items() if x is not None}
  count = lambda name: range(args.get(name, 0))
  text = SAMPLES.get(args.get('language', ''), text.replace(',', ''))
  parts = [text] if 'language' in args else [f'<<{text[:20]}>>', text]
  parts += [' '.join(args.get('keywords', ()))]
  parts += [' '.join([args.get('keyword', '')] * args.get('frequency', 0))]
  parts += [args.get('letter', '') * args.get('let_frequency', 0)]
  parts += [f'{args["section_spliter"]} {i + 1}\nText {i}.' for i in count('num_sections')]
  parts += ['\n'.join(f'* point {i}' for i in count('num_bullets'))]
  parts += [' '.join(f'[name {i}] ' for i in count('num_placeholders'))]
  parts += [' '.join(f'*part {i}* ' for i in count('num_highlights'))]
  parts += ['NASA ' * args.get('capital_frequency', 0), 'One more. ' * args.get('num_sentences', 0)]
  parts += ['word ' * args.get('num_words', 0), args.get('postscript_marker', '') + ' so']
  parts += [args.get('end_phrase', '')]
  kept = [x.strip() for x in parts if x.strip()]
  if number := args.get('num_paragraphs'):
    first = args.get('first_word', 'So')
    kept = ['\n'.join(kept), *[f'{first} it is.'] * (number - 1)]
    return ('\n\n' if 'first_word' in args else '\n***\n').join(kept)
  return '\n'.join([args.get('prompt_to_repeat', ''), *kept]).strip()


def harness() -> Any:
  """Return the IFEval module of lm-evaluation-harness, with seeds for what it draws.

  Those are the numbers of its language detector, as in slm, and other letters for ! and #.
  """
  import langdetect
  from lm_eval.tasks.ifeval import utils

  langdetect.DetectorFactory.seed = 0
  random.seed(0)
  return utils


def compare(items: Sequence[Item], documents: Sequence[str]) -> Iterator[dict[str, Any]]:
  """Yield the verdicts on every constraint for every answer: ours, the harness's, in training."""
  utils, rng = harness(), random.Random(0)
  for item in items:
    for name, text in answers(item, rng.choice(documents)).items():
      theirs = {
        'official': utils.test_instruction_following_strict(_example(utils, item), text),
        'official_loose': utils.test_instruction_following_loose(_example(utils, item), text),
      }
      for i, (kind, args) in enumerate(
        zip(item['instruction_id_list'], item['kwargs'], strict=True)
      ):
        ask = lambda family, kind, args, text=text: bool(
          verifiers.verify(f'ifeval.{family}.{kind}', text, **args)
        )
        given = {key: x for key, x in args.items() if x is not None}
        trained, convert = TRAINING[kind]
        yield {
          'key': item['key'], 'kind': kind, 'args': given, 'answer': name, 'text': text,
          **{family: ask(family, kind, given) for family in theirs},
          **{f'{f}_harness': bool(x.follow_instruction_list[i]) for f, x in theirs.items()},
          **{f: ask(f, trained, convert(given)) for f in ('tulu3_released', 'tulu3_fixed')},
        }  # fmt: skip


def _example(utils: Any, item: Item) -> Any:
  kwargs = [{key: x for key, x in args.items() if x is not None} for args in item['kwargs']]
  return utils.InputExample(item['key'], item['instruction_id_list'], item['prompt'], kwargs)


def agreement(verdicts: Sequence[Item]) -> tables.Table:
  """Return the table of equal verdicts, and of those that differ in training, by kind."""
  counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
  for v in verdicts:
    for kind in (v['kind'], 'all'):
      row, passed = counts[kind], v['official']
      row.update(['verdicts', *['passed'] * passed])
      for family in ('official', 'official_loose'):
        row[f'{family} equal'] += v[family] == v[f'{family}_harness']
      for family in ('tulu3_released', 'tulu3_fixed'):
        row[f'{family} only'] += v[family] and not passed
        row[f'{family} not'] += passed and not v[family]
  head = ['kind', 'verdicts', 'passed', 'strict equal', 'loose equal', 'released only']
  head += ['released not', 'corrected only', 'corrected not']
  columns = ['verdicts', 'passed', 'official equal', 'official_loose equal', 'tulu3_released only']
  columns += ['tulu3_released not', 'tulu3_fixed only', 'tulu3_fixed not']
  lines = [[kind, *(f'{row[c]:,}' for c in columns)] for kind, row in sorted(counts.items())]
  return head, lines


def segmentation(documents: Mapping[str, Sequence[str]]) -> tables.Table:
  """Return the table of sentences and tokens in capitals beside those of NLTK."""
  import nltk

  lines = []
  for name, texts in documents.items():
    row: collections.Counter[str] = collections.Counter()
    for text in texts:
      theirs, ours = (set(ends(x)) for x in (nltk.sent_tokenize(text), words.sentences(text)))
      row.update(texts=1, theirs=len(theirs), ours=len(ours), both=len(theirs & ours))
      row['equal'] += len(theirs) == len(ours)
      capitals = sum(x.isupper() for x in nltk.word_tokenize(text))
      row.update(capitals=capitals, capitals_equal=capitals == words.capitals(text))
    columns = ('texts', 'theirs', 'ours', 'both', 'equal', 'capitals', 'capitals_equal')
    lines.append([name, *(f'{row[c]:,}' for c in columns)])
  head = ['texts', 'number', 'sentences of NLTK', 'of slm', 'ends in common', 'equal numbers']
  return [*head, 'capitals of NLTK', 'equal numbers of them'], lines


def probes(items: Sequence[Item]) -> tables.Table:
  """Return the table of kinds that are satisfied, loosely, by no answer to the prompt."""
  label = lambda item: official.label(item['instruction_id_list'], item['kwargs'], loose=True)
  return audit.audit([(item['prompt'], verifiers.read(label(item))) for item in items])


def ends(sentences: Sequence[str]) -> Iterator[int]:
  """Yield where sentences end, in characters that are no white space."""
  end = 0
  for sentence in sentences:
    yield (end := end + len(''.join(sentence.split())))


def documents(path: str, number: int, most: int) -> list[str]:
  """Return documents of a file, cut to `most` characters; the field is text, response or answer."""
  found = []
  for line in sources.lines(path):
    row = json.loads(line)
    found.append(next(row[key] for key in ('text', 'response', 'answer') if key in row)[:most])
  return random.Random(0).sample(found, min(number, len(found)))


def main(_: list[str]) -> None:
  """Write OUT/table.md and OUT/differences.jsonl."""
  console.required('prompts', 'texts', 'out')
  texts = {Path(p).parent.name + '/' + Path(p).name.partition('.')[0]: p for p in FLAGS.texts}
  found = {name: documents(path, FLAGS.documents, 3000) for name, path in texts.items()}
  items = [json.loads(line) for line in sources.lines(FLAGS.prompts)][: FLAGS.limit or None]
  verdicts = list(compare(items, next(iter(found.values()))))
  differ = [
    v for v in verdicts if any(v[f] != v[f'{f}_harness'] for f in ('official', 'official_loose'))
  ]
  out = Path(FLAGS.out)
  out.mkdir(parents=True, exist_ok=True)
  files.write_text(out / 'differences.jsonl', ''.join(json.dumps(v) + '\n' for v in differ))
  made = [tables.markdown(x) for x in (agreement(verdicts), segmentation(found), probes(items))]
  files.write_text(out / 'table.md', '\n'.join(made))
  print(*made, sep='\n')


if __name__ == '__main__':
  flags.DEFINE_string('prompts', '', 'the prompts of IFEval, JSON lines')
  flags.DEFINE_list('texts', [], 'files of documents; prompts are answered by those of the first')
  flags.DEFINE_integer('documents', 200, 'documents of each file')
  flags.DEFINE_integer('limit', 0, 'prompts from the first; 0 is all')
  flags.DEFINE_string('out', 'runs/verifiers', 'directory of the tables')
  console.run(main)
