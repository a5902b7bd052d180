"""Chat messages rendered by a model's template, as transformers does."""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2.ext
import jinja2.sandbox


class _Generation(jinja2.ext.Extension):
  """The tag around what the model writes: `{% generation %} … {% endgeneration %}`."""

  tags = {'generation'}

  def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
    """Return the content of the tag in a scope of its own."""
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    return jinja2.nodes.Scope(body, lineno=line)


def _refuse(message: str) -> None:
  raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
  return json.dumps(value, ensure_ascii=ensure_ascii, **options)


@functools.cache
def _compiled(template: str) -> jinja2.Template:
  """Compile a template in a sandbox: it comes with a checkpoint and is not trusted."""
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
  )
  environment.filters['tojson'] = _tojson  # jinja2's filter escapes HTML
  environment.globals['raise_exception'] = _refuse
  environment.globals['strftime_now'] = lambda form: datetime.datetime.now().strftime(form)
  return environment.from_string(template)


def render(
  messages: Sequence[Mapping[str, Any]],
  template: str,
  tools: Sequence[Mapping[str, Any]] | None = None,
  add_generation_prompt: bool = False,
  **variables: Any,
) -> str:
  """Render messages, {'role': …, 'content': …} each, as the text that a model was trained on.

  `tools` are JSON schemas of functions. `add_generation_prompt` ends the text where the model's
  answer begins. `variables` are the template's other variables, such as bos_token. The text
  contains its special tokens: encode it without adding any.

  Raises:
    ValueError: if the template is invalid or refuses the messages.
  """
  variables |= {'tools': tools, 'documents': None, 'add_generation_prompt': add_generation_prompt}
  try:
    return _compiled(template).render(messages=[dict(m) for m in messages], **variables)
  except Exception as e:  # noqa: BLE001 (a template raises whatever Python does)
    raise ValueError(f'the chat template failed: {e}') from None
