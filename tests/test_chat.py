"""Chat templates against transformers' own rendering; conversations with a model."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from slm import models
from slm.data import chat
from slm.inference import chat as inference_chat
from slm.inference import completion
from slm.inference.chat import Chat
from slm.models import decode
from slm.models.config import DecoderConfig
from slm.models.decoder import init_cache, unembed
from slm.runs import load
from slm.weights import sharding

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
    ("{{ ''.__class__.__mro__ }}", 'unsafe'),  # the way out of a template that is not sandboxed
    ("{{ messages.append('x') }}", 'unsafe'),
  ],
)
def test_what_a_template_refuses_is_one_error(template, message):
  with pytest.raises(ValueError, match=message):
    chat.render([{'role': 'assistant', 'content': 'x'}], template)


PLAIN = (
  '{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}'
  '{% if add_generation_prompt %}assistant: {% endif %}'
)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """Give a random model a chat template and a context of 600 tokens."""
  source, path = toy.random_run(), tmp_path_factory.mktemp('chat') / 'run'
  shutil.copytree(source, path)
  shutil.copytree(source.parent / 'data' / 'tokenizer', path / 'tokenizer')
  (path / 'tokenizer' / 'chat_template.jinja').write_text(PLAIN)
  config = json.loads((path / 'config.json').read_text())
  (path / 'config.json').write_text(json.dumps({**config, 'context': 600}))
  return path


def talk(path):
  loaded = load.load(path, sharding.make_mesh({'data': 1}, jax.devices()[:1]))
  tok, _ = load.reads(loaded)
  return Chat(loaded, loaded.params(), tok, decode.greedy, 0), loaded, tok


def test_answers_are_the_continuations_of_the_rendered_text(run, monkeypatch):
  """However many pieces a prompt is read in, and whatever of it was read before."""
  monkeypatch.setattr(inference_chat, '_SHORTEST', 100)  # the cache grows on the way
  kept, loaded, tok = talk(run)
  say = lambda role, text: {'role': role, 'content': text}
  messages = [say('user', 'the tide ' * 3)]
  for text in ('storm', 'rope and anchor ' * 30, ''):
    answer = ''.join(kept.answer(messages, 20))
    prompt = chat.render(messages, PLAIN, add_generation_prompt=True)
    (expected,) = completion.complete(
      loaded, loaded.params(), tok, [], [prompt], 20, decode.greedy, 0
    )
    assert answer == expected and answer
    messages += [say('assistant', answer), say('user', text)]
  first = ''.join(kept.answer(messages[:1], 20))  # what came later is forgotten
  assert first == messages[1]['content']
  assert len(''.join(kept.answer(messages[:1], 3))) < len(first)
  with pytest.raises(ValueError, match='tokens, the context 600'):
    next(kept.answer([say('user', 'anchor ' * 600)], 3))


def test_reading_in_pieces_equals_reading_at_once():
  """Padding of a piece leaves no gap that a window would count, and the cache can be set back."""
  shape = DecoderConfig(
    vocab=29, embed=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp=24, window=5,
    layer_types=('window', 'full'),
  )  # fmt: skip
  model = models.build(shape)
  params = model.init(jax.random.key(1))
  ids = np.random.default_rng(0).integers(0, 29, 20)
  batch = {
    'inputs': ids[None],
    'positions': jnp.arange(20)[None],
    'segments': np.ones((1, 20), int),
  }
  whole = unembed(params, model.forward(params, batch))[0, :, :27]
  cache = init_cache(model.cfg, 1, 32, jnp.float32)
  for start, stop, size in ((0, 7, 8), (7, 8, 1), (8, 11, 8), (5, 13, 8), (13, 20, 8)):
    piece = np.pad(ids[start:stop], (0, size - stop + start))[None]
    cache['index'] = jnp.asarray(start, jnp.int32)
    logits, cache = decode.follow(
      model,
      params,
      cache,
      piece,
      stop - start,
      jax.random.key(0),
      sampler=keep,
      known=np.arange(27) < 27,
    )
    np.testing.assert_allclose(logits[0, :27], whole[stop - 1], atol=1e-5)
    assert (logits[0, 27:] == -np.inf).all()


def keep(logits, key):
  return logits


def test_command(run):
  command = [sys.executable, '-m', 'slm.generate', f'--run={run}', '--max_tokens=5']
  ask = lambda *flags, said=None: subprocess.run(
    [*command, *flags], capture_output=True, text=True, input=said
  )
  kept, *_ = talk(run)
  system, user = ({'role': r, 'content': c} for r, c in (('system', 'Be'), ('user', 'the tide')))
  first = ''.join(kept.answer([user], 5))
  second = ''.join(kept.answer([user, {'role': 'assistant', 'content': first}, user], 5))
  assert ask('--chat', said='the tide\n\nthe tide\n').stdout == f'{first}\n{second}\n'
  done = ask('--chat', '--prompt=the tide', '--system=Be')
  assert done.stdout.endswith(f'(step 0)\n{"".join(kept.answer([system, user], 5))}\n')
  for flags, message in (
    (['--prompt=x', '--system=y'], '--system: goes with --chat'),
    (['--chat', '--prompt=x', f'--run={toy.random_run()}'], 'holds no chat template'),
  ):
    done = ask(*flags)
    assert done.returncode == 1 and message in done.stderr and 'Traceback' not in done.stderr
