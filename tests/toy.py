"""A small corpus of four topics, and the directory prepared from it."""

import functools
import gzip
import json
import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from slm import models
from slm.data import prepare, settings, tokenizer
from slm.data.loader import DataConfig
from slm.models.config import DecoderConfig
from slm.runs import load
from slm.runs.config import EvalConfig, NextTokenConfig, RunConfig

TOPICS = {
  'sea': 'ship sail harbour wave anchor captain tide island storm rope',
  'law': 'contract party clause court tenant lease statute liable breach notice',
  'food': 'butter onion simmer pepper roast flour garlic oven sauce bread',
  'star': 'planet orbit telescope galaxy comet nebula lunar gravity solar meteor',
}


def documents(topics: list[str], count: int, seed: int) -> list[str]:
  """Make documents of a few hundred bytes, each about one topic."""
  rng = np.random.default_rng(seed)
  texts = []
  for i in range(count):
    words = TOPICS[topics[i % len(topics)]].split()
    n = int(rng.integers(20, 120))
    texts.append(f'{i} é\t' + ' '.join(rng.choice(words, n)) + '\n')
  return texts


def noisy(model: models.Model, scale: float):
  """Draw weights in which nothing (norms, biases, scales) is at its start, in one program."""

  def draw():
    params = model.init(jax.random.key(0))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [scale * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.map(jnp.add, params, jax.tree.unflatten(structure, noise))

  return jax.jit(draw)()


def write_jsonl(path: pathlib.Path, texts: list[str]) -> pathlib.Path:
  lines = ''.join(json.dumps({'text': t, 'id': str(i)}) + '\n' for i, t in enumerate(texts))
  opener = gzip.open if path.suffix == '.gz' else open
  with opener(path, 'wb') as f:
    f.write(lines.encode())
  return path


def corpus(root: pathlib.Path) -> dict[str, dict[str, str]]:
  """Write a generic set in two files and a law domain with explicit splits; return the sets."""
  generic = documents(list(TOPICS), 480, 0)
  write_jsonl(root / 'generic-0.jsonl.gz', generic[:240])
  write_jsonl(root / 'generic-1.jsonl', generic[240:])
  domain = documents(['law', 'law', 'sea'], 90, 1)
  write_jsonl(root / 'law-train.jsonl.gz', domain[:60])
  write_jsonl(root / 'law-test.jsonl.gz', domain[60:])
  return {
    'generic': {'all': str(root / 'generic-*')},
    'law': {'train': str(root / 'law-train.jsonl.gz'), 'test': str(root / 'law-test.jsonl.gz')},
  }


def config(
  root: pathlib.Path, sets: dict[str, dict[str, str]], **changes
) -> settings.PrepareConfig:
  tokenizer = settings.TokenizerConfig(name='bytes', vocab=320, path='')
  fields = dict(
    out=str(root / 'out'), sets=sets, tokenizer=tokenizer, context=64, levels=(2, 8),
    fit_windows=1000, dims=8, sizes=(500, 2000), text_field='text', id_field='',
    heldout=(0.1, 0.1), workers=1, seed=0,
  )  # fmt: skip
  return settings.PrepareConfig(**fields | changes)


@functools.cache
def prepared() -> str:
  """Prepare the corpus once per test session and return its directory."""
  root = pathlib.Path(tempfile.mkdtemp(prefix='slm-toy-'))
  cfg = config(root, corpus(root))
  prepare.prepare(cfg)
  return cfg.out


# A template of plain text.
PLAIN = (
  '{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}'
  '{% if add_generation_prompt %}assistant: {% endif %}'
)


def talking_run(path: pathlib.Path, template: str = PLAIN, context: int = 600) -> pathlib.Path:
  """Copy the random run to a path, with a chat template and a context."""
  source = random_run()
  shutil.copytree(source, path)
  shutil.copytree(source.parent / 'data' / 'tokenizer', path / 'tokenizer')
  (path / 'tokenizer' / 'chat_template.jinja').write_text(template)
  config = json.loads((path / 'config.json').read_text())
  (path / 'config.json').write_text(json.dumps({**config, 'context': context}))
  return path


@functools.cache
def random_run() -> pathlib.Path:
  """Write a run of a random two-layer model, context 64, over a SentencePiece tokenizer of 400."""
  root = pathlib.Path(tempfile.mkdtemp(prefix='slm-toy-'))
  text = ' '.join(documents(list(TOPICS), 200, 3))
  tok = tokenizer.build('sentencepiece', 400, '', [text], root / 'data' / 'tokenizer')
  return random_model(root, tok)


def random_model(
  root: pathlib.Path, tok: tokenizer.Tokenizer, vocab: int = 0, sure: float = 12.0
) -> pathlib.Path:
  """Write a random run of `vocab` embeddings (0: one a token); its tokenizer is in root/data."""
  cfg = RunConfig(
    steps=0, context=64, tokenizer=tok.fingerprint, objective=NextTokenConfig(chunk=64),
    model=DecoderConfig(
      vocab=vocab or tok.vocab, embed=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
      mlp=48,
    ),
    eval=EvalConfig(batch_size=8), data=DataConfig(path=str(root / 'data')),
  )  # fmt: skip
  params = jax.jit(models.build(cfg.model).init)(jax.random.key(5))
  params['embedding'] = params['embedding'] * sure  # so that what it writes varies
  load.write_dense(root / 'run', cfg, params, [])
  return root / 'run'
