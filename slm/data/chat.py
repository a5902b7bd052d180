"""Chat messages rendered by a model's template, as transformers does."""

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2.ext
import jinja2.sandbox
import numpy as np

from slm.data import tokenizer

# What a template by name refuses: it has no place for them.
_PLAIN = (
  "{% if tools or messages | selectattr('tool_calls', 'defined') | list %}"
  "{{ raise_exception('it has no place for tools') }}{% endif %}"
  '{% for message in messages %}'
  "{% if message.role not in ('system', 'user', 'assistant') %}"
  "{{ raise_exception('it has no role ' ~ message.role) }}{% endif %}"
)
# Templates by name. Where texts begin with a begin token, so do conversations (`named`).
TEMPLATES = {
  # Lambert et al. 2024 (arXiv 2411.15124), without a line end after the last answer.
  'tulu': _PLAIN + "{{ '<|' + message.role + '|>\n' + message.content }}"
  "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
  "{% if message.role != 'assistant' or not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
  'chatml': _PLAIN + "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
  'llama3': _PLAIN + "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}"
  "{{ message.content | trim }}{{ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
  "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
}


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


def named(name: str, tok: tokenizer.Tokenizer) -> str:
  """Return the template of a name for a tokenizer."""
  return '{{ bos_token }}' * tok.begins + TEMPLATES[name]


def variables(tok: tokenizer.Tokenizer) -> dict[str, str]:
  """Return the variables of a template that are a tokenizer's, such as bos_token."""
  return {f'{role}_token': text for role, (_, text) in tok.marks().items()}


def encode(tok: tokenizer.Tokenizer, text: str) -> list[int]:
  """Encode a rendered conversation, whose special tokens are in the text."""
  return encode_spans(tok, text)[0] if _unread(tok) else tok.encode(text)


def encode_spans(tok: tokenizer.Tokenizer, text: str) -> tuple[list[int], np.ndarray]:
  """Encode a rendered conversation; return ids and the characters of each, int64 [tokens, 2]."""
  special = _unread(tok)
  if not special:
    return tok.encode_spans(text)
  ids, spans, at = [], [np.zeros((0, 2), np.int64)], 0
  for part in re.split(f'({"|".join(map(re.escape, special))})', text):
    whole = [special.get(part)], np.array([[0, len(part)]])
    made, places = whole if part in special else tok.encode_spans(part)
    ids += made
    spans.append(places + at)
    at += len(part)
  return ids, np.concatenate(spans)


@functools.lru_cache(16)
def _unread(tok: tokenizer.Tokenizer) -> dict[str, int]:
  """Return the begin and end tokens that a tokenizer does not read from their text."""
  marks = [mark for role, mark in tok.marks().items() if role in ('bos', 'eos')]
  return {text: i for i, text in marks if text and tok.encode(text) != [i]}
