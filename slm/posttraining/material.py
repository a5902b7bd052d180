"""The rows of a recipe: files that are made, training files without evaluation items, rows."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slm.base import files
from slm.data import conversations, decontaminate, prepare, sources, synthesis
from slm.data.settings import ChatConfig, PrepareConfig, TokenizerConfig
from slm.posttraining.settings import STAGES, MadeConfig, TuluConfig

_PROMPTS = ChatConfig('prompts')


class Material:
  """The data of a recipe below a directory; what is there already is not made again.

  Attributes:
    prepared: the directories of rows by kind, as far as they are prepared or complete.
  """

  def __init__(self, cfg: TuluConfig, folder: Path, tokenizer: TokenizerConfig):
    """`tokenizer` is that of the model that the recipe starts from."""
    self._cfg, self._folder, self._tokenizer = cfg, folder, tokenizer
    self.prepared: dict[str, str] = {}
    self._clean: dict[str, str] = {}  # training file -> its copy without evaluation items

  def make(self) -> None:
    """Make files, and drop evaluation items from those that are trained on.

    Raises:
      ValueError: if a source is missing, or a directory holds what another config made.
    """
    # Those that are made from others come after these; a config has its keys in no order.
    order = sorted(self._cfg.files().items(), key=lambda x: '{made}' in x[1].source)
    for name, made in order:
      rows = self._made(made)
      parts = {f'{name}_heldout': rows[: made.heldout], name: rows[made.heldout :]}
      for part, lines in parts.items():
        if lines:
          numbered = ({'id': f'{part}-{i}', **row} for i, row in enumerate(lines))
          synthesis.write(numbered, str(self._folder / 'made' / f'{part}.jsonl'))
    if self._cfg.clean.eval:
      self._drop_items()

  def _made(self, made: MadeConfig) -> list[dict[str, Any]]:
    count = made.rows + made.heldout if made.rows else 0
    if made.kind == 'constraints':
      options = {name: getattr(made, name) for name in ('labels', 'least', 'most', 'longest')}
      options |= {'rows': count, 'seed': made.seed, 'kinds': made.tasks}
      return list(synthesis.constrained(self.named(made.source), **options))
    if made.kind == 'lines':
      return list(synthesis.lines(self.named(made.source), count, made.seed, made.dialogues))
    rows = getattr(synthesis, made.kind)(count, made.seed, made.tasks)
    return list(rows if made.kind == 'gym' else synthesis.demonstrated(rows, made.seed, made.wrong))

  def named(self, text: str) -> str:
    """Return a text with directories in the place of {corpus}, {made} and {answers}.

    Raises:
      ValueError: if it names the corpus and there is none.
    """
    if '{corpus}' in text and not self._cfg.corpus:
      raise ValueError(f'corpus: expected the directory that {text} is in, found nothing')
    places = {'corpus': self._cfg.corpus, 'made': self._folder / 'made'}
    for name, path in (places | {'answers': self._folder.parent / 'answers'}).items():
      text = text.replace(f'{{{name}}}', str(path))
    return text

  def _drop_items(self) -> None:
    """Write training files without rows that hold evaluation items."""
    kinds = dict.fromkeys(STAGES[name] for name in self._cfg.stages)
    specs = [self._cfg.rows(kind).train for kind in kinds] + [self._cfg.answers.prompts]
    trained: dict[str, int] = {}
    for item in ';'.join(filter(None, specs)).split(';'):
      if '{answers}' not in item:
        trained |= sources.expand(conversations.parse(self.named(item), ChatConfig())[0].path)
    out = self._folder / 'clean'
    request = decontaminate.Request(
      train=tuple(trained), eval=tuple(map(self.named, self._cfg.clean.eval)), out=str(out),
      action='drop-rows',
    )  # fmt: skip
    dropped = decontaminate.decontaminate(request)['clean']
    names = decontaminate.shown(dropped)
    self._clean = {path: str(out / 'clean' / names[path]) for path in dropped}

  def source(self, spec: str) -> str:
    """Return a specification of sources with the clean copies of its files."""
    items = []
    for item in self.named(spec).split(';'):
      path = conversations.parse(item.strip(), ChatConfig())[0].path if item.strip() else ''
      items.append(item.replace(path, self._clean.get(path, path), 1) if path else item)
    return ';'.join(items)

  def rows(self, kind: str) -> str:
    """Prepare the rows of a kind; return their directory.

    Raises:
      ValueError: if there are no sources, or the directory holds what another config made.
    """
    if kind in self.prepared:
      return self.prepared[kind]
    rows, out = self._cfg.rows(kind), self._folder / kind
    if not (rows.train and rows.validation):
      raise ValueError(f'{kind}.train, {kind}.validation: expected sources of both')
    splits = {'train': self.source(rows.train), 'validation': self.named(rows.validation)}
    chat = ChatConfig(kind, self._cfg.template, rows.too_long)
    prepare.prepare(
      PrepareConfig(
        out=str(out), sets={kind: splits}, tokenizer=self._tokenizer, chat=chat,
        context=rows.context,
      )
    )  # fmt: skip
    self.prepared[kind] = str(out)
    return str(out)

  def text(self) -> str:
    """Prepare the general text that is evaluated; return its directory, '' if there is none."""
    spec = self.named(self._cfg.evaluate.text)
    if spec:
      sets, context = {'generic': {'train': spec}}, self._cfg.conversations.context
      prepare.prepare(
        PrepareConfig(
          out=str(self._folder / 'text'), sets=sets, tokenizer=self._tokenizer, context=context,
          levels=(1,), dims=4, fit_windows=500, sizes=(),
        )
      )  # fmt: skip
    return str(self._folder / 'text') if spec else ''

  def prompts(self) -> Path:
    """Write the held-out prompts as items of a task, in random order; return the file."""
    rng, items = random.Random(0), []
    for spec in self.named(self._cfg.prompts.validation).split(';'):
      source, found = conversations.parse(spec, _PROMPTS)[0], list(_items(spec))
      rng.shuffle(found)
      items += found[: source.rows or round(len(found) * (source.fraction or 1))]
    rng.shuffle(items)
    items = [{'id': str(i), 'type': 'labelled', **item} for i, item in enumerate(items)]
    path = self._folder / 'made' / 'heldout_prompts.jsonl'
    files.write_text(path, ''.join(json.dumps(item) + '\n' for item in items))
    return path


def _items(spec: str) -> Iterator[dict[str, Any]]:
  """Yield the prompts of a source with their labels; several messages become a dialogue.

  Raises:
    ValueError: if a message is of another than the user and the assistant.
  """
  names = {'user': 'Human', 'assistant': 'Assistant'}
  for path in conversations.expand(spec, _PROMPTS):
    for text, _ in conversations.read(path, spec, _PROMPTS, ''):
      found = json.loads(text)
      talk = found['prompt']
      if other := [m['role'] for m in talk if m['role'] not in names]:
        raise ValueError(f'{spec}: held-out prompts are of user and assistant, found {other[0]!r}')
      dialogue = '\n\n'.join(f'{names[m["role"]]}: {m["content"]}' for m in talk)
      prompt = talk[0]['content'] if len(talk) == 1 else dialogue
      yield {'prompt': prompt, 'verifiers': found['verifiers']}
