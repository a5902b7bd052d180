"""Conversations with a model: turns, what is kept between them, the command."""

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


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """Give a random model a chat template and a context of 600 tokens."""
  return toy.talking_run(tmp_path_factory.mktemp('chat') / 'run')


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
    prompt = chat.render(messages, toy.PLAIN, add_generation_prompt=True)
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
  params = jax.jit(model.init)(jax.random.key(1))
  ids = np.random.default_rng(0).integers(0, 29, 20)
  batch = {
    'inputs': ids[None],
    'positions': jnp.arange(20)[None],
    'segments': np.ones((1, 20), int),
  }
  whole = jax.jit(lambda p: unembed(p, model.forward(p, batch)))(params)[0, :, :27]
  cache = init_cache(model.cfg, 1, 32, jnp.float32)
  for start, stop, size in ((0, 7, 8), (7, 8, 1), (8, 11, 8), (5, 13, 8), (13, 20, 8)):
    piece = np.pad(ids[start:stop], (0, size - stop + start))[None]
    cache['index'] = jnp.asarray(start, jnp.int32)
    logits, cache = decode.follow(
      model, params, cache, piece, stop - start, jax.random.key(0), sampler=keep,
      known=np.arange(27) < 27,
    )  # fmt: skip
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
    (['--prompt=x', '--system=y'], '--system needs --chat'),
    (['--chat', '--prompt=x', f'--run={toy.random_run()}'], 'holds no chat template'),
  ):
    done = ask(*flags)
    assert done.returncode == 1 and message in done.stderr and 'Traceback' not in done.stderr
