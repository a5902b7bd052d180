"""Which method for a budget: from measured studies, and beyond them from the paper's own table.

    python -m slm.advise --params=126e6 --pretrain_flops=2e19 --specialise_flops=1e16 \
      --domain_tokens=1e6 --domains=7

Studies of small models speak for larger ones, up to ten times, by what is counted per served
parameter: tokens of domain text, and training FLOPs as the tokens per parameter that the plain SLM
would see for them.
"""

import math
from pathlib import Path

from absl import flags

from slm.base import console
from slm.data import histograms
from slm.reporting.advise import STUDIES, WINDOWS, advise
from slm.reporting.points import Budget, read


def main(_: list[str]) -> None:
  """Print advice for the budget that the flags describe."""
  f = flags.FLAGS
  needed = (f.params, f.domain_tokens, f.domains)
  every = (*needed, f.pretrain_flops, f.specialise_flops, f.large_params)
  if not all(map(math.isfinite, every)) or min(needed) <= 0 or min(every) < 0:
    raise ValueError(
      'expected finite numbers, --params, --domain_tokens and --domains above 0, the rest not below'
    )
  if not 1e3 <= f.params <= 1e13:
    raise ValueError(f'--params={f.params:g}: expected from 1e3 to 1e13')
  paths = [Path(p) for p in f.results] or list(STUDIES)
  names = [p.parent.name for p in paths]
  keys = [n if names.count(n) == 1 else str(p.parent) for n, p in zip(names, paths, strict=True)]
  studies = {key: read(p) for key, p in zip(keys, paths, strict=True)}
  budget = Budget(
    f.params, f.pretrain_flops, f.specialise_flops, f.domain_tokens, f.domains, f.large_params
  )
  effective = 0.0
  if f.domain_text:
    if not f.data:
      raise ValueError('--domain_text needs --data, the prepared directory that holds the clusters')
    windows, held, generic = histograms.spread(f.data, [Path(p) for p in f.domain_text])
    print(
      f'The domain text, {windows:,} windows, lies in about {held:.1f} clusters; as many of '
      f'generic text lie in {generic:.1f}.'
    )
    if windows >= WINDOWS:
      effective = held / generic
    else:
      print(f'That is too little to say how widely it is spread: at least {WINDOWS} windows are.')
  print('\n'.join(advise(studies, budget, effective)))


if __name__ == '__main__':
  flags.DEFINE_float('params', 0.0, 'Parameters that may be served.')
  flags.DEFINE_float('pretrain_flops', 0.0, 'FLOPs to spend once, before the domains are known.')
  flags.DEFINE_float('specialise_flops', 0.0, 'FLOPs to spend on every domain.')
  flags.DEFINE_float('domain_tokens', 0.0, 'Tokens of text of a domain.')
  flags.DEFINE_integer('domains', 1, 'How many domains.')
  flags.DEFINE_float('large_params', 0.0, 'Parameters of a larger model that could be served.')
  flags.DEFINE_multi_string('domain_text', [], 'A .jsonl or .txt file of the domain; may repeat.')
  flags.DEFINE_string('data', '', 'Prepared directory whose clusters --domain_text is laid over.')
  flags.DEFINE_multi_string('results', [], 'results.csv to go by; default: the committed ones.')
  console.run(main)
