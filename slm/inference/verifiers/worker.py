"""The other side of pool.py: answers one call after another, each as a line of JSON."""

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from slm.inference.verifiers import answers

_MEMORY = 4 << 30  # bytes of addresses: 9^9^9^9 ends in an error instead of taking all


def equal(a: str, b: str) -> bool:
  """Return whether SymPy reads two LaTeX expressions and simplifies their difference to zero."""
  try:
    return _difference_is_zero(a, b)
  except ValueError:
    return False


def _difference_is_zero(a: str, b: str) -> bool:
  import sympy
  from sympy.parsing.latex import parse_latex

  try:
    return bool(sympy.simplify(parse_latex(a) - parse_latex(b)) == 0)
  except MemoryError:
    raise
  except Exception as e:  # of every kind: SymPy has no common one
    raise ValueError(f'{a!r}, {b!r}: {e!r}') from e


def verify(text: str, answer: str) -> bool:
  """Return whether math-verify finds, in the LaTeX of a text, what equals the answer.

  Its extraction of plain numbers is left out: it passes text of the model to SymPy's parse_expr,
  which evaluates Python.
  """
  import math_verify

  read = lambda latex: math_verify.parse(
    latex, [math_verify.LatexExtractionConfig()], parsing_timeout=None
  )
  gold = read(answer if '$' in answer or '\\boxed' in answer else f'${answer}$')
  return bool(math_verify.verify(gold, read(text), timeout_seconds=None))


def conforms(text: str, schema: dict[str, Any]) -> bool:
  """Return whether a text is JSON that conforms to a JSON schema (references stay inside it)."""
  import jsonschema
  import referencing

  try:
    value = json.loads(text)
  except (ValueError, RecursionError):
    return False
  kind = jsonschema.validators.validator_for(schema)
  try:
    kind.check_schema(schema)
    return kind(schema, registry=referencing.Registry()).is_valid(value)
  except (jsonschema.SchemaError, referencing.exceptions.Unresolvable) as e:
    raise ValueError(f'not a JSON schema: {str(e).splitlines()[0]}') from None


def prepare(task: str) -> None:
  """Import what a task needs.

  Raises:
    ImportError: if it is not installed.
  """
  if task == 'equal':
    from sympy.parsing.latex import parse_latex

    parse_latex('1')  # raises ImportError without the right antlr4
  elif task == 'verify':
    import math_verify  # noqa: F401
  elif task == 'conforms':
    import jsonschema  # noqa: F401


TASKS: dict[str, Callable[..., Any]] = {
  'matches': answers.matches, 'equal': equal, 'verify': verify, 'conforms': conforms,
}  # fmt: skip


def limit(seconds: float = 0.0) -> None:
  """Limit memory or, from now, processor time: what its parent has left alone ends too."""
  try:
    import resource
  except ImportError:  # Windows
    return
  kind, most = resource.RLIMIT_AS, _MEMORY
  if seconds:
    used = resource.getrusage(resource.RUSAGE_SELF)
    kind, most = resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + 2 * seconds + 1)
  hard = resource.getrlimit(kind)[1]
  resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def answer(task: str, seconds: float, args: list[Any], prepared: Callable[[], None]) -> Any:
  """Return the answer to a call; `prepared` is called when its time begins."""
  try:
    prepare(task)
  except ImportError as e:
    prepared()
    return {'error': f"{task} needs what is not installed ({e}): pip install 'slm[rl]'"}
  prepared()
  limit(seconds)
  try:
    return {'value': TASKS[task](*args)}
  except ValueError as e:
    return {'error': str(e)}
  except MemoryError:
    return {'undecided': 'took too much memory'}


def main() -> None:
  """Answer the calls on standard input; what libraries print goes nowhere.

  A terminal and a batch system signal every process of a job. The parent decides what becomes of
  it, and this process ends with its input.
  """
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  out = os.fdopen(os.dup(1), 'w', encoding='ascii')
  os.dup2(2, 1)
  limit()
  say = lambda value: print(json.dumps(value), file=out, flush=True)
  for line in sys.stdin:
    task, seconds, *args = json.loads(line)
    say(answer(task, seconds, args, lambda: say('prepared')))


if __name__ == '__main__':
  main()
