"""Advise on a method for a budget: every measured method, its cost and whether it fits.

    python -m slm.advise --params=126e6 --pretrain_flops=4e19 --specialise_flops=1e16 \
      --domain_tokens=1e6 --domains=7

uses the nearest cells measured by the studies of experiments/specialise and in the paper, scaled to
the parameters given.
"""

import math
from pathlib import Path

from absl import flags

from slm.base import console
from slm.data import histograms
from slm.reporting import advise, tables

_WINDOWS = 30  # fewest windows of domain text from which its spread is estimated


def main(_: list[str]) -> None:
  """Print advice for the budget that the flags describe."""
  f = flags.FLAGS
  required = (f.params, f.domain_tokens, f.domains)
  numbers = (*required, f.pretrain_flops, f.specialise_flops, f.large_params)
  if not all(map(math.isfinite, numbers)) or min(required) <= 0 or min(numbers) < 0:
    raise ValueError(
      'expected finite numbers: --params, --domain_tokens and --domains above 0, others at least 0'
    )
  if not 1e3 <= f.params <= 1e13:
    raise ValueError(f'--params={f.params:g}: expected from 1e3 to 1e13')
  cells = [c for path in f.results or advise.FILES for c in advise.read(Path(path))]
  budget = (f.params, f.pretrain_flops, f.specialise_flops, f.domain_tokens)
  question = advise.Question(*budget, f.domains, f.large_params)
  effective = 0.0
  if f.domain_text:
    if not f.data:
      raise ValueError('--domain_text needs --data, the prepared directory with the clusters')
    windows, clusters, generic = histograms.spread(f.data, [Path(p) for p in f.domain_text])
    print(
      f'The domain text, {windows:,} windows, lies in about {clusters:.1f} clusters; as many of '
      f'generic text lie in {generic:.1f}.'
    )
    if windows >= _WINDOWS:
      effective = clusters / generic
    else:
      print(f'That is too little to estimate its spread, which takes at least {_WINDOWS} windows.')
  advice, table = advise.advise(cells, question, effective)
  print(f'{advice}\n\n{tables.text(table)}')


if __name__ == '__main__':
  flags.DEFINE_float('params', 0.0, 'Parameters that may be served.')
  flags.DEFINE_float('pretrain_flops', 0.0, 'FLOPs to spend once, before the domains are known.')
  flags.DEFINE_float('specialise_flops', 0.0, 'FLOPs to spend on every domain.')
  flags.DEFINE_float('domain_tokens', 0.0, 'Tokens of text of a domain.')
  flags.DEFINE_integer('domains', 1, 'Number of domains.')
  flags.DEFINE_float('large_params', 0.0, 'Parameters of a larger model that could be served.')
  flags.DEFINE_multi_string('domain_text', [], 'A .jsonl or .txt file of the domain; may repeat.')
  flags.DEFINE_string('data', '', 'Prepared directory with the clusters for --domain_text.')
  flags.DEFINE_multi_string('results', [], 'Cells written by experiments.specialise.measured.')
  console.run(main)
