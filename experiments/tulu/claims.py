"""What the study found about claims of Tülu 3 (arXiv 2411.15124) and of its analysis."""

from collections.abc import Callable

from experiments.tulu.results import Found, paired
from slm.reporting.stats import Difference
from slm.reporting.verdicts import Evidence, judged, lower, not_run, verdict

SAME = 0.01  # nats per token that nobody would pay for
LITTLE = 0.03  # share of answers, as of the bars on greedy accuracy
_EVERYTHING = ('sums', 'rules', 'copies')


def _more(what: str, d: Difference | None) -> Evidence:
  """Return the evidence for the claim that a difference is above zero."""
  if d is None:
    return not_run(what)
  return judged(what, True if d.low > 0 else False if d.high < 0 else None, d)


def _most(what: str, d: Difference | None, bound: float) -> Evidence:
  """Return the evidence for the claim that a difference is at most a bound."""
  if d is None:
    return not_run(what)
  return judged(what, True if d.high < bound else False if d.low > bound else None, d)


def _within(what: str, d: Difference | None, bound: float) -> Evidence:
  """Return the evidence for the claim that a difference is within a bound of zero."""
  if d is None:
    return not_run(what)
  inside, outside = -bound < d.low and d.high < bound, d.low > bound or d.high < -bound
  return judged(what, True if inside else False if outside else None, d)


def _passing(f: Found, a: str, b: str, task: str, how: str, family: str = 'official'):
  """Return the difference in passing answers of two runs, and its name."""
  d = paired(f.passed(a, task, how, family), f.passed(b, task, how, family))
  by = '' if family == 'official' else ", by Tülu's verifiers"
  return f'{task}, {how}{by}: {a} − {b}', d


def _losses(f: Found, a: str, b: str, *tasks: str):
  """Return the difference in held-out loss of two runs, and its name."""
  on = 'all' if tasks == _EVERYTHING else ', '.join(tasks)
  return f'loss of {on}: {a} − {b}', paired(f.loss(a, *tasks), f.loss(b, *tasks))


def _pairs(f: Found, a: str, b: str, task: str, kind: str):
  """Return the difference in held-out pairs that two runs' scores get right, and its name."""
  by = {'norm': 'means', 'plain': 'sums'}[kind]
  sides = (f.preferred(x, f'own_{task}', kind) for x in (a, b))
  return f'pairs of {task}, by {by}: {a} − {b}', paired(*sides)


def sums_beat_means(f: Found) -> list[Evidence]:
  """A loss summed over a step's tokens trains better than their mean, each at its best rate."""
  return [lower(*_losses(f, 'sum', 'mean', *_EVERYTHING))]


def scale_is_nothing(f: Found) -> list[Evidence]:
  """Without clipping AdamW does not see the scale of the loss: sums and means end alike."""
  return [_within(*_losses(f, 'sum_free', 'mean_free', *_EVERYTHING), SAME)]


def mask_prompts(f: Found) -> list[Evidence]:
  """Training on answers alone gives lower losses of answers than training on prompts too."""
  return [lower(*_losses(f, 'mean', 'prompts', *_EVERYTHING))]


def preferences_are_learned(f: Found) -> list[Evidence]:
  """Normalised DPO prefers more of the held-out chosen answers than its start does.

  Those of rules: of sums the start prefers nearly all.
  """
  return [_more(*_pairs(f, 'norm_rules', 'sft', 'rules', 'norm'))]


def preferences_help(f: Found) -> list[Evidence]:
  """Normalised DPO on own pairs raises the share of drawn answers that pass."""
  return [_more(*_passing(f, f'norm_{t}', 'sft', t, 'sampled')) for t in ('sums', 'rules')]


def normalised_beats_plain(f: Found) -> list[Evidence]:
  """Normalised DPO beats plain DPO at the same pairs, each at the best of as many settings."""
  found = []
  for t in ('sums', 'rules'):
    a, b = f'norm_{t}', f'plain_{t}'
    found += [_more(*_passing(f, a, b, t, how)) for how in ('sampled', 'greedy')]
  return found + [_more(*_pairs(f, a, b, 'rules', kind)) for kind in ('norm', 'plain')]


def own_pairs_are_better(f: Found) -> list[Evidence]:
  """Pairs of own answers are worth more than as many of a weaker model's, or of demonstrations."""
  others = ('weak_rules', 'made_rules')
  return [_more(*_passing(f, 'norm_rules', other, 'rules', 'sampled')) for other in others]


def rewards_sharpen(f: Found) -> list[Evidence]:
  """On sums rewards raise drawn answers to greedy ones, and add nothing to what 8 draws reach."""
  gains = [_passing(f, 'rl_sums', 'sft', 'sums', how) for how in ('sampled', 'greedy', 'pass@8')]
  return [_more(*gains[0]), *(_most(*gain, LITTLE) for gain in gains[1:])]


def rewards_teach(f: Found) -> list[Evidence]:
  """On held-out combinations of rules rewards raise drawn and greedy answers."""
  return [_more(*_passing(f, 'rl_rules', 'sft', 'rules', how)) for how in ('sampled', 'greedy')]


def kl_holds_back(f: Found) -> list[Evidence]:
  """The larger the KL coefficient, the smaller the KL divergence and the gain."""
  order, found = ('rl_rules', 'rl_rules_kl0.1', 'rl_rules_kl1'), []
  for a, b in zip(order, order[1:], strict=False):
    found.append(_more(f'KL: {a} − {b}', paired(f.kl(a, 'rules'), f.kl(b, 'rules'))))
    found.append(_more(*_passing(f, a, b, 'rules', 'sampled')))
  return found


def _no_help(f: Found, control: str) -> list[Evidence]:
  """Claim that a control raises neither drawn nor greedy answers."""
  return [
    _most(*_passing(f, f'rl_{task}_{control}', 'sft', task, how), LITTLE)
    for task in ('sums', 'rules')
    for how in ('sampled', 'greedy')
  ]


def a_coin_does_not_help(f: Found) -> list[Evidence]:
  """Rewards from a coin do not raise drawn or greedy answers."""
  return _no_help(f, 'coin')


def shuffled_labels_do_not_help(f: Found) -> list[Evidence]:
  """Rewards by the labels of other prompts do not raise drawn or greedy answers."""
  return _no_help(f, 'shuffled')


def rewards_beat_controls(f: Found) -> list[Evidence]:
  """Rewards by a prompt's own label raise drawn and greedy answers above both controls."""
  return [
    _more(*_passing(f, f'rl_{task}', f'rl_{task}_{control}', task, how))
    for task in ('sums', 'rules')
    for control in ('coin', 'shuffled')
    for how in ('sampled', 'greedy')
  ]


def verifiers_differ(f: Found) -> list[Evidence]:
  """Rewards by either family of verifiers help most by that family's own verdicts."""
  a, b = 'rl_rules', 'rl_rules_released'
  return [
    _more(*_passing(f, a, b, 'rules', 'sampled')),
    _more(*_passing(f, b, a, 'rules', 'sampled', 'released')),
  ]


def leaks_are_found(f: Found) -> list[Evidence]:
  """Decontamination drops the planted rows and no others."""
  x = f.leaks
  numbers = f'{x["dropped"]} rows dropped, {x["right"]} of the {x["planted"]} planted among them'
  exact = x['dropped'] == x['right'] == x['planted']
  return [Evidence('training rows', exact, numbers)]


def leaks_inflate(f: Found) -> list[Evidence]:
  """Leaked items score higher than without the leak; others do not, and after cleaning none do."""
  passed = lambda name, only: f.passed(name, 'facts', 'greedy', only=only)
  gap = lambda only: paired(passed('leaky', only), passed('cleaned', only))
  return [
    _more('leaked items: leaky − cleaned', gap('leak')),
    _within('other items: leaky − cleaned', gap('clean'), 0.1),
  ]


def later_stages_forget(f: Found) -> list[Evidence]:
  """Preferences and rewards about rules raise the losses of skills that they are not about."""
  later = ('norm_rules', 'rl_rules', 'rl_rules_after')
  return [_more(*_losses(f, x, 'sft', t)) for x in later for t in ('copies', 'sums')]


def kl_remembers(f: Found) -> list[Evidence]:
  """A larger KL coefficient forgets less of them."""
  return [lower(*_losses(f, 'rl_rules_kl1', 'rl_rules', task)) for task in ('copies', 'sums')]


CLAIMS: tuple[tuple[str, Callable[[Found], list[Evidence]]], ...] = (
  ('A summed loss trains better than a mean (paper)', sums_beat_means),
  ('Without clipping, sums and means end alike (analysis)', scale_is_nothing),
  ('Masking prompts lowers the loss of answers (paper: done, not tested)', mask_prompts),
  ('Normalised DPO beats fine-tuning on held-out pairs', preferences_are_learned),
  ('Normalised DPO on own pairs improves drawn answers (paper)', preferences_help),
  ('Normalised DPO beats plain DPO at the same pairs (paper)', normalised_beats_plain),
  ('Own pairs are worth more than others (paper)', own_pairs_are_better),
  ('Rewards sharpen what the model can do', rewards_sharpen),
  ('Rewards teach rules, also on held-out prompts (paper)', rewards_teach),
  ('A larger KL coefficient means less KL and less gain (paper)', kl_holds_back),
  ('Rewards of a coin do not help', a_coin_does_not_help),
  ('Rewards by shuffled labels do not help', shuffled_labels_do_not_help),
  ('Rewards by own labels beat both', rewards_beat_controls),
  ('Training verifiers and evaluation verifiers are two things', verifiers_differ),
  ('Decontamination finds exactly the planted rows', leaks_are_found),
  ('Leaks raise the score of what leaked, and cleaning undoes it', leaks_inflate),
  ('Later stages forget skills that they are not about', later_stages_forget),
  ('A larger KL coefficient forgets less', kl_remembers),
)


def table(found: Found) -> tuple[list[str], list[list[str]]]:
  """Judge every claim."""
  rows = []
  for number, (claim, judge) in enumerate(CLAIMS, 1):
    evidence = judge(found)
    lines = '<br>'.join(e.line for e in evidence)
    rows.append([str(number), claim, verdict(evidence), lines])
  return ['#', 'claim', 'here', 'numbers'], rows


NOTE = (
  'Differences in shares of answers, or in nats per token, with 95 % intervals over items and over '
  'seeds, paired by both. A claim is reproduced if every comparison it stands on agrees beyond its '
  'interval, not reproduced if one clearly does not (no), not tested if a part was not run, within '
  f'noise otherwise (?). Not helping is to gain less than {LITTLE} at the upper end, alike within '
  f'{SAME} nats. Some fifty comparisons are made: one or two of those that are told will be so by '
  'chance. A run with a grid is that of the settings which did best on validation data.'
)
