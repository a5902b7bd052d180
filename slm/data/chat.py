"""Messages to text by a model's own chat template, as transformers renders it."""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2.ext
import jinja2.sandbox


class _Generation(jinja2.ext.Extension):
  """The tag that marks what a model writes: `{% generation %} … {% endgeneration %}`."""

  tags = {'generation'}

  def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
    """Give what the tag holds, in a scope of its own."""
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    return jinja2.nodes.Scope(body, lineno=line)


def _refuse(message: str) -> None:
  raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
  return json.dumps(value, ensure_ascii=ensure_ascii, **options)


@functools.cache
def _compiled(template: str) -> jinja2.Template:
  """Compile in a sandbox: a template comes with a checkpoint and is not to be trusted."""
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
  )
  environment.filters['tojson'] = _tojson  # jinja2's own escapes HTML
  environment.globals['raise_exception'] = _refuse
  environment.globals['strftime_now'] = lambda how: datetime.datetime.now().strftime(how)
  return environment.from_string(template)


def render(
  messages: Sequence[Mapping[str, Any]],
  template: str,
  tools: Sequence[Mapping[str, Any]] | None = None,
  add_generation_prompt: bool = False,
  **variables: Any,
) -> str:
  """Write messages ({'role': …, 'content': …} each) as the text that a model was trained on.

  `tools` are JSON schemas of functions. `add_generation_prompt` ends the text where the model's
  answer begins. `variables` are what else the template reads: bos_token, eos_token. The text holds
  its special tokens: encode it without adding any.

  Raises:
    ValueError: if the template cannot be read, or refuses the messages.
  """
  try:
    return _compiled(template).render(
      messages=[dict(m) for m in messages], tools=tools, documents=None,
      add_generation_prompt=add_generation_prompt, **variables,
    )  # fmt: skip
  except Exception as e:  # noqa: BLE001 (a template raises whatever Python does)
    raise ValueError(f'the chat template failed: {e}') from None
