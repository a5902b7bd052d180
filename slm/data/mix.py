"""How much of each source a set of conversations takes: copies, the realised mix, its plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slm.base import files
from slm.data import conversations, documents
from slm.data.settings import ALL, PrepareConfig

FILES = ('mix.md', 'mix.svg')  # in the data directory


def copies(cfg: PrepareConfig, name: str, cuts: Sequence[documents.Cut]) -> np.ndarray:
  """Return how often each conversation of a set is taken, int32 [documents].

  Duplicates are not; of a source that is split by hash all that is held out is, once.
  """
  keep = np.concatenate([cut.kept for cut in cuts])
  splits = np.concatenate([documents.document_splits(cut.shard) for cut in cuts])
  owner = np.repeat([cut.source for cut in cuts], [len(cut.kept) for cut in cuts])
  counts = keep.astype(np.int32)
  for i, split in cfg.made(name):
    if ALL in cfg.sets[name] and split != 'train':
      continue
    for number, source in enumerate(_sources(cfg, name, split)):
      (found,) = np.nonzero(keep & (splits == i) & (owner == number))
      seed = [cfg.seed, list(cfg.sets).index(name), i, number]
      counts[found] = _times(source, len(found), seed)
  return counts


def _sources(cfg: PrepareConfig, name: str, split: str) -> tuple[conversations.Source, ...]:
  specs = cfg.sets[name]
  return conversations.parse(specs.get(split) or specs[ALL], cfg.chat)


def _times(source: conversations.Source, n: int, seed: Sequence[int]) -> np.ndarray:
  """Return how often each of n documents is taken: whole copies, then a seeded sample."""
  amount = source.rows or round((source.fraction or 1.0) * n)
  whole, rest = divmod(amount, n) if n else (0, 0)
  counts = np.full(n, whole, np.int32)
  counts[np.random.default_rng(seed).permutation(n)[:rest]] += 1
  return counts


def realised(
  cfg: PrepareConfig, name: str, i: int, split: str, shards: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
  """Return what every source gives to a split, number i, from the summaries of its shards.

  `documents` are those without duplicates, `taken` of them, copies included, `prepared` those that
  were not dropped, with their trained `tokens`.
  """
  total = lambda number, key: sum(s[key][i] for s in shards if s['source'] == number)
  return [
    {
      'source': source.path,
      'documents': total(number, 'kept'),
      'taken': total(number, 'taken'),
      'prepared': total(number, 'documents'),
      'tokens': total(number, 'tokens'),
    }
    for number, source in enumerate(_sources(cfg, name, split))
  ]


def table(mixes: Mapping[str, Sequence[Mapping[str, Any]]], tokens: str) -> str:
  """Return a Markdown table with a row for every source of every split."""
  lines = [
    f'| rows | source | there | taken | times | share | prepared | {tokens} | share |',
    '| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |',
  ]
  for name, mix in mixes.items():
    for part, share in zip(mix, shares(mix), strict=True):
      there, taken = part['documents'], part['taken']
      lines.append(
        f'| {name} | `{part["source"]}` | {there:,} | {taken:,} | {taken / max(there, 1):.2f} | '
        f'{share[0]:.1%} | {part["prepared"]:,} | {part["tokens"]:,} | {share[1]:.1%} |'
      )
  return '\n'.join(lines) + '\n'


def shares(mix: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
  """Return the shares of the documents taken and of the trained tokens of each source."""
  total = [max(sum(part[key] for part in mix), 1) for key in ('taken', 'tokens')]
  return [(part['taken'] / total[0], part['tokens'] / total[1]) for part in mix]


def write(folder: Path, kind: str, mixes: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
  """Write the table and the plot of the realised mixes of conversations, pairs or prompts."""
  tokens = 'tokens' if kind == 'prompts' else 'trained tokens'
  files.write_text(folder / FILES[0], table(mixes, tokens))
  _plot(mixes, (kind, tokens), folder / FILES[1])


def _plot(
  mixes: Mapping[str, Sequence[Mapping[str, Any]]], labels: Sequence[str], path: Path
) -> None:
  import matplotlib  # imported here: workers do not plot
  from matplotlib.figure import Figure

  heights = [len(mix) for mix in mixes.values()]
  with matplotlib.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': 'slm', 'font.size': 9}):
    figure = Figure(figsize=(7, 0.9 * len(mixes) + 0.45 * sum(heights)), layout='constrained')
    axes = figure.subplots(len(mixes), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (name, mix) in zip(axes, mixes.items(), strict=True):
      places, values = np.arange(len(mix)), np.array(shares(mix))
      axis.barh(places - 0.2, values[:, 0], 0.4, color='#0a7ac2', label=labels[0])
      axis.barh(places + 0.2, values[:, 1], 0.4, color='#d55e00', label=labels[1])
      axis.set_yticks(places, [Path(part['source']).name for part in mix])
      axis.invert_yaxis()
      axis.set_xlim(0, 1)
      axis.xaxis.set_major_formatter('{x:.0%}')
      axis.set_title(f'{name}: share of what each source gives', loc='left')
      axis.spines[['top', 'right']].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower right', ncols=2)
    with files.replacing(path) as temporary:
      figure.savefig(temporary, format='svg', metadata={'Date': None})
