"""Chat templates against transformers' own rendering."""

import pytest

from slm.data import chat

CHATML = (
  "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
  "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
  "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Blocks on lines of their own, tools as JSON, loop controls, namespaces, macros, generation.
LONG = """{{- bos_token }}
{%- set ns = namespace(seen=0) %}
{%- macro show(x) %}[{{ x | trim }}]{% endmacro %}
{% if tools %}
  {% for tool in tools %}
    {{ tool | tojson(indent=2) }}
  {% endfor %}
{% endif %}
{%- for message in messages %}
    {%- if message.role == 'skip' %}
        {%- continue %}
    {%- endif %}
    {%- set ns.seen = ns.seen + 1 %}
    {%- if message.role == 'assistant' %}
A: {% generation %}{% set inner = message.content %}{{ inner }}{{ eos_token }}{% endgeneration %}
    {%- else %}
{{ message.role | upper }} {{ ns.seen }}: {{ show(message.content) }} {{ {'a<b': "é'"} | tojson }}
    {%- endif %}
    {%- if ns.seen == 3 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{{ strftime_now('%Y') }}
{% if add_generation_prompt %}A: {% endif %}
"""
REFUSES = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
TALK = [
  {'role': 'user', 'content': ' What is 2 < 3?\n'},
  {'role': 'assistant', 'content': 'True – ja'},
  {'role': 'skip', 'content': 'unseen'},
  {'role': 'user', 'content': ''},
  {'role': 'user', 'content': 'never reached'},
]
TOOLS = [{'type': 'function', 'function': {'name': 'f', 'parameters': {'x': 'é <'}}}]
SPECIAL = {'bos_token': '<s>', 'eos_token': '</s>'}


@pytest.mark.parametrize('template', [CHATML, LONG])
@pytest.mark.parametrize('tools', [None, TOOLS])
@pytest.mark.parametrize('prompt', [False, True])
def test_renders_as_transformers_does(template, tools, prompt):
  utils = pytest.importorskip('transformers.utils.chat_template_utils')
  for talk in (TALK, TALK[:1], [{'role': 'system', 'content': 'x'}, *TALK]):
    (expected,), _ = utils.render_jinja_template(
      [talk], tools=tools, chat_template=template, add_generation_prompt=prompt, **SPECIAL
    )
    assert chat.render(talk, template, tools, prompt, **SPECIAL) == expected


def test_golden():
  assert chat.render(TALK[:2], CHATML, add_generation_prompt=True) == (
    '<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\n What is 2 < 3?\n<|im_end|>\n'
    '<|im_start|>assistant\nTrue – ja<|im_end|>\n<|im_start|>assistant\n'
  )


@pytest.mark.parametrize(
  ('template', 'message'),
  [
    (REFUSES, 'user first'),
    ('{% for %}', 'chat template'),
    ('{{ messages.nothing.more }}', 'chat template'),
    ('{{ 1 // 0 }}', 'zero'),
    ("{{ ''.__class__.__mro__ }}", 'unsafe'),  # escapes without the sandbox
    ("{{ messages.append('x') }}", 'unsafe'),
  ],
)
def test_what_a_template_refuses_is_one_error(template, message):
  with pytest.raises(ValueError, match=message):
    chat.render([{'role': 'assistant', 'content': 'x'}], template)
