"""Which method for a budget: every measured method, what it costs and whether it fits.

    python -m slm.advise --params=126e6 --pretrain_flops=4e19 --specialise_flops=1e16 \
      --domain_tokens=1e6 --domains=7

goes by the nearest cells that the studies of experiments/specialise and the paper's own measured,
scaled to the parameters asked about.
"""

import math
from pathlib import Path

from absl import flags

from slm.base import console
from slm.data import histograms
from slm.reporting import advise, tables

_WINDOWS = 30  # of domain text, the fewest that say how widely it is spread


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
  cells = [c for path in f.results or advise.FILES for c in advise.read(Path(path))]
  budget = (f.params, f.pretrain_flops, f.specialise_flops, f.domain_tokens)
  question = advise.Question(*budget, f.domains, f.large_params)
  effective = 0.0
  if f.domain_text:
    if not f.data:
      raise ValueError('--domain_text needs --data, the prepared directory that holds the clusters')
    windows, held, generic = histograms.spread(f.data, [Path(p) for p in f.domain_text])
    print(
      f'The domain text, {windows:,} windows, lies in about {held:.1f} clusters; as many of '
      f'generic text lie in {generic:.1f}.'
    )
    if windows >= _WINDOWS:
      effective = held / generic
    else:
      print(f'That is too little to say how widely it is spread: at least {_WINDOWS} windows are.')
  advice, table = advise.advise(cells, question, effective)
  print(f'{advice}\n\n{tables.text(table)}')


if __name__ == '__main__':
  flags.DEFINE_float('params', 0.0, 'Parameters that may be served.')
  flags.DEFINE_float('pretrain_flops', 0.0, 'FLOPs to spend once, before the domains are known.')
  flags.DEFINE_float('specialise_flops', 0.0, 'FLOPs to spend on every domain.')
  flags.DEFINE_float('domain_tokens', 0.0, 'Tokens of text of a domain.')
  flags.DEFINE_integer('domains', 1, 'How many domains.')
  flags.DEFINE_float('large_params', 0.0, 'Parameters of a larger model that could be served.')
  flags.DEFINE_multi_string('domain_text', [], 'A .jsonl or .txt file of the domain; may repeat.')
  flags.DEFINE_string('data', '', 'Prepared directory whose clusters --domain_text is laid over.')
  flags.DEFINE_multi_string(
    'results', [], 'Measured cells to go by, as experiments.specialise.measured writes them.'
  )
  console.run(main)
