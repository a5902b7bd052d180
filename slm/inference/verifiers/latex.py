r"""The verifier of MATH that Tülu 3 calls flex: several candidates, two tests, any of them passes.

A candidate equals the label if the strings are equal after the normalisation of Hendrycks et al.
(2021, arXiv 2103.03874), or if SymPy simplifies their difference to zero.
"""

import re

from slm.inference.verifiers import pool
from slm.inference.verifiers.arguments import Text

LONGEST = 300  # characters that SymPy is given: a paragraph takes it seconds, and is no expression
# Lewkowycz et al. 2022 (Minerva, arXiv 2206.14858), appendix D.
_REPLACED = (
  ('an ', ''), ('a ', ''), ('.$', '$'), ('\\$', ''), ('\\ ', ''), (' ', ''), ('mbox', 'text'),
  (',\\text{and}', ','), ('\\text{and}', ','), ('\\text{m}', '\\text{}'),
)  # fmt: skip
_WORDS = """square ways integers dollars mph inches ft hours km units \\ldots sue points feet
  minutes digits cents degrees cm gm pounds meters meals edges students childrentickets multiples
  \\text{s} \\text{.}"""
_REMOVED = (
  *_WORDS.split(),
  *('\\text{\ns}', '\\text{}^2', '\\text{}^3', '\\text{\n}', '\\text{}', '\\mathrm{th}'),
  *('^\\circ', '^{\\circ}', '\\;', ',\\!', '{,}', '"', '\\dots'),
)


def flex(text: str, answer: Text) -> bool:
  """Return whether any candidate of the text equals the answer, a LaTeX expression.

  Raises:
    pool.Undecided: if SymPy had no answer in time for one, and no other passes.
    ValueError: if SymPy or its LaTeX grammar is not installed.
  """
  found, late = candidates(text), None
  if any(equivalent(x, answer) for x in found):
    return True
  for candidate in found:
    if len(candidate) > LONGEST:
      continue
    try:
      if pool.call('equal', candidate, answer):
        return True
    except pool.Undecided as e:
      late = e
  if late:
    raise late
  return False


def verify(text: str, answer: Text) -> bool:
  """Return whether math-verify finds what equals the answer in the LaTeX of the text."""
  return pool.call('verify', text, answer)


def candidates(text: str) -> list[str]:
  """Return what may be the answer: boxed, in Minerva's sentence; between dollars; or all of it."""
  found = [] if (box := boxed(text)) is None else [box]
  if (sentence := minerva(text)) is not None:
    found.append(normalised(sentence))
  if found:
    return found
  dollars = [m.start() for m in re.finditer(r'\$', text)]
  if len(dollars) > 1:
    return [normalised(text[dollars[-2] + 1 : dollars[-1]])]
  return [normalised(text), text]


def boxed(text: str) -> str | None:
  r"""Return what the last \boxed holds, None without one whose braces balance.

  If \boxed and a space occur, the last of those counts, up to the next dollar.
  """
  if '\\boxed ' in text:
    return text.rpartition('\\boxed ')[2].partition('$')[0]
  start, depth = text.rfind('\\boxed'), 0
  if start < 0 or not text.startswith('\\boxed{', start):
    return None
  for i in range(start, len(text)):
    depth += (text[i] == '{') - (text[i] == '}')
    if text[i] == '}' and not depth:
      return text[start + len('\\boxed{') : i]
  return None


def minerva(text: str) -> str | None:
  """Return what stands between the two sentences that Minerva's prompt asks for, None without them.

  The second is added to the text, as in the code that this follows; yet a space before it is
  wanted: an answer that stops at the full stop of the first is not found.
  """
  for line in (text + 'I hope it is correct.').split('\n'):
    answer = line.partition('Final Answer: The final answer is')[2]
    if end := re.search('. I hope it is correct.', answer):
      return answer[: end.start()].strip()
  return None


def normalised(answer: str) -> str:
  """Normalise an answer as Minerva does: units, words and mark-up dropped."""
  answer = answer.split('=')[-1]
  for old, new in _REPLACED:
    answer = answer.replace(old, new)
  for word in _REMOVED:
    answer = answer.replace(word, '')
  answer = '\n'.join(_unwrapped(line) for line in answer.split('\n'))
  answer = re.sub(r'frac([^{])(.)', r'frac{\1}{\2}', answer)
  answer = re.sub(r'sqrt([^{])', r'sqrt{\1}', answer).replace('$', '')
  return answer.replace(',', '') if answer.replace(',', '').isdigit() else answer


def _unwrapped(line: str) -> str:
  r"""Return what a pair of dollars holds, and what \text{} and the like do."""
  parts = line.split('$', 2)
  line = f'${parts[1]}$' if len(parts) == 3 else line
  for command in ('text', 'textbf', 'overline', 'boxed'):
    content = '.*' if command == 'boxed' else '.*?'
    head, brace, tail = line.rpartition('}')  # so that every search for the brace ends at one
    line = re.sub(rf'\\{command}\{{({content})\}}', r'\1', head + brace) + tail
  return line


def equivalent(a: str, b: str) -> bool:
  """Return whether two answers are one string after Hendrycks' normalisation.

  If that cannot read one of them, they are compared as they are.
  """
  try:
    return hendrycks(a) == hendrycks(b)
  except (ValueError, IndexError):
    return a == b


def hendrycks(answer: str) -> str:
  """Normalise an answer as the MATH benchmark does.

  Raises:
    ValueError, IndexError: where the benchmark's code fails; its failures are part of the rule.
  """
  for old, new in (
    ('\n', ''), ('\\!', ''), ('\\\\', '\\'), ('tfrac', 'frac'), ('dfrac', 'frac'),
    ('\\left', ''), ('\\right', ''), ('^{\\circ}', ''), ('^\\circ', ''), ('\\$', ''),
  ):  # fmt: skip
    answer = answer.replace(old, new)
  number, *units = answer.split('\\text{ ')
  if len(units) > 1:
    raise ValueError(f'{answer!r}: two units')
  answer = number.replace('\\%', '').replace(' .', ' 0.').replace('{.', '{0.')
  if not answer:
    return ''
  answer = '0' + answer if answer[0] == '.' else answer
  sides = answer.split('=')
  if len(sides) == 2 and len(sides[0]) <= 2:
    answer = sides[1]
  first, *roots = answer.split('\\sqrt')
  answer = first + ''.join(f'\\sqrt{x if x[0] == "{" else _braced(x)}' for x in roots)
  answer = _fractions(answer.replace(' ', ''))
  return _slash('\\frac{1}{2}' if answer == '0.5' else answer)


def _braced(text: str) -> str:
  return f'{{{text[0]}}}{text[1:]}'


def _fractions(answer: str) -> str:
  r"""Complete the braces of \frac12, \frac1{72} and the like; unchanged if one is cut off."""
  first, *rest = answer.split('\\frac')
  for i, x in enumerate(rest):
    if x[0] == '{':
      continue
    if len(x) < 2:
      return answer
    rest[i] = f'{{{x[0]}}}{x[1:]}' if x[1] == '{' else f'{{{x[0]}}}{{{x[1]}}}{x[2:]}'
  return '\\frac'.join((first, *rest))


def _slash(answer: str) -> str:
  """Write a/b of whole numbers as a fraction."""
  parts = answer.split('/')
  if len(parts) != 2:
    return answer
  a, b = map(int, parts)
  return f'\\frac{{{a}}}{{{b}}}' if answer == f'{a}/{b}' else answer
