"""What the study found about each claim of arXiv 2407.14679 (P1) and 2408.11796 (P2)."""

from collections.abc import Callable

from experiments.minitron.results import CANDIDATES, Found
from experiments.minitron.students import AGGREGATORS
from slm.reporting.verdicts import Evidence, judged, lower, not_run, verdict

SAME = 0.01  # nats per token that nobody would pay for
SETTLED = 0.8  # Kendall's tau of ranks that are as good as final


def _lower(f: Found, *pairs: tuple[str, str], cut: bool = False) -> list[Evidence]:
  """Claim that the first student of each pair has the lower loss."""
  at = ' as cut' if cut else ''
  return [lower(f'{a} − {b}{at}', f.gap(a, b, cut)) for a, b in pairs]


def _no_worse(f: Found, *pairs: tuple[str, str]) -> list[Evidence]:
  """Claim that the first student of each pair is at most a hundredth of a nat worse."""
  found = []
  for a, b in pairs:
    if (d := f.gap(a, b)) is None:
      found.append(not_run(f'{a} − {b}'))
    else:
      agrees = True if d.high < SAME else False if d.low > SAME else None
      found.append(judged(f'{a} − {b}', agrees, d))
  return found


def _pair(tokens: str, sequences: str) -> str:
  return 'width' if (tokens, sequences) == ('mean', 'l2') else f'{tokens}_{sequences}'


def aggregators(f: Found) -> list[Evidence]:
  """The mean over a sequence is best as cut, whatever sums up sequences; chance is worst."""
  pairs = [(_pair('mean', s), _pair(t, s)) for s in AGGREGATORS for t in ('l2', 'var')]
  others = [_pair(t, s) for t in AGGREGATORS for s in AGGREGATORS]
  return _lower(f, *pairs, *((o, 'random') for o in others), cut=True)


def activations_beat_others(f: Found) -> list[Evidence]:
  """Activations tell better what to keep than weights, gradients or chance, after recovery too."""
  return _lower(f, *(('width', o) for o in ('weights', 'taylor', 'random')))


def width_beats_depth(f: Found) -> list[Evidence]:
  """At equal size width recovers better than both, both better than depth; as cut, both leads."""
  return _lower(f, ('both', 'width'), cut=True) + _lower(f, ('width', 'both'), ('both', 'depth'))


def hidden_channels_pay_later(f: Found) -> list[Evidence]:
  """Cutting channels looks worse than cutting MLPs alone before recovery and is better after."""
  return _lower(f, ('mlp', 'width'), cut=True) + _lower(f, ('width', 'mlp'))


def scoring_once(f: Found) -> list[Evidence]:
  """Scoring once is as good as scoring again between cuts."""
  return _no_worse(f, ('width', 'scored_twice'))


def at_once(f: Found) -> list[Evidence]:
  """Deleting layers at once beats deleting and recovering in steps, at equal tokens."""
  return _lower(f, ('depth', 'in_thirds'))


def ladder(f: Found) -> list[Evidence]:
  """A large cut is better made in two steps, at equal tokens."""
  return _lower(f, ('ladder', 'quarter'))


def distilling_beats_training(f: Found) -> list[Evidence]:
  """Distillation beats the next-token loss at equal tokens and at equal FLOPs."""
  return _lower(f, ('width', 'width_lm'), ('width', 'width_lm_equal'))


def divergences(f: Found) -> list[Evidence]:
  """Forward KL, cosine, reverse KL, squared error in this order; alone and unweighted."""
  order = ('width', 'cosine'), ('cosine', 'reverse'), ('reverse', 'mse')
  return _lower(f, *order, ('width', 'wsl'), ('width', 'kl_and_lm'), ('depth', 'depth_reverse'))


def temperature(f: Found) -> list[Evidence]:
  """Temperature 1 is best."""
  return _lower(f, ('width', 'temperature_0.5'), ('width', 'temperature_2'))


def whole_vocabulary(f: Found) -> list[Evidence]:
  """The teacher's few best tokens, and all others together, are worse; a quarter as good."""
  return _lower(f, ('width', 'top_16')) + _no_worse(f, ('width', 'top_256'), ('top_256', 'width'))


def states(f: Found) -> list[Evidence]:
  """Hidden states add nothing where the depth is kept, and a little where it is halved."""
  return _no_worse(f, ('width', 'width_states')) + _lower(f, ('depth_states', 'depth'))


def starts(f: Found) -> list[Evidence]:
  """Cut by score beats cut at random, which beats random weights; with either loss."""
  with_kd = _lower(f, ('width', 'random'), ('random', 'scratch'))
  return with_kd + _lower(f, ('width_lm', 'random_lm'), ('random_lm', 'scratch_lm'))


def correction(f: Found) -> list[Evidence]:
  """On other text a corrected teacher helps; on its own text correction gains nothing."""
  return _lower(f, ('domain_corrected', 'domain')) + _no_worse(f, ('width', 'control_corrected'))


def correction_meanwhile(f: Found) -> list[Evidence]:
  """Correcting the teacher while it teaches is as good as before."""
  return _no_worse(f, ('domain_together', 'domain_corrected'))


def last_phase(f: Found) -> list[Evidence]:
  """The model that the last phase of training left is better to cut than the one before."""
  return _lower(f, ('domain_last', 'domain_corrected'))


def ranks(f: Found) -> list[Evidence]:
  """Three quarters into a recovery its candidates rank as they will at its end."""
  what = f"Kendall's tau of {len(CANDIDATES)} students' ranks at 3/4 and at the end, by seed"
  if not (found := f.stability()):
    return [not_run(what)]
  taus = ', '.join(f'{tau:.2f}' for tau in found)
  agrees = True if min(found) >= SETTLED else False if max(found) < SETTLED else None
  return [Evidence(what, agrees, taus, single=len(found) == 1)]


def searching(f: Found) -> list[Evidence]:
  """The shape that a search finds is no worse than the one written down (ours)."""
  return _no_worse(f, ('searched', 'width'))


def windows(f: Found) -> list[Evidence]:
  """A contiguous window of layers is better to delete than the individually least important."""
  return _lower(f, ('depth_window', 'depth'), ('depth_window', 'depth_perplexity'))


def keep_heads(f: Found) -> list[Evidence]:
  """At equal size it is better to cut neurons than heads."""
  return _lower(f, ('mlp', 'heads'))


def gains(f: Found) -> list[Evidence]:
  """Making up for the smaller norm helps (ours: no paper says)."""
  return _lower(f, ('gain_calibrated', 'width'), ('gain_sqrt', 'width'))


def own_text(f: Found) -> list[Evidence]:
  """The last quarter of a recovery is better on the student's own text, by the JSD (ours)."""
  return _lower(f, ('own_text', 'width'))


# The papers' claims, and three that are ours.
CLAIMS: tuple[tuple[str, Callable[[Found], list[Evidence]]], ...] = (
  ('The mean over a sequence is the best aggregate as cut (P1)', aggregators),
  ('Activations are the best criterion (P1)', activations_beat_others),
  (
    'Width, then both, then depth is best, but only after recovery (P1)',
    width_beats_depth,
  ),
  ('Cutting channels looks worse at first and is better after (P1)', hidden_channels_pay_later),
  ('Scoring once is as good as scoring again between cuts (P1)', scoring_once),
  ('Cutting layers at once beats cutting in steps at equal tokens (P1)', at_once),
  ('A large cut is better made in two steps (P1)', ladder),
  ('Distillation beats the next-token loss at equal compute (P1)', distilling_beats_training),
  ('Forward KL alone is best, then cosine, reverse KL, squared error (P1)', divergences),
  ('Temperature 1 is best (P1)', temperature),
  ('Few tokens of the teacher are worse, many as good (P1)', whole_vocabulary),
  ('Hidden states help only where the depth is halved (P1)', states),
  ('A scored cut beats a random cut beats random weights, whatever the loss (P2)', starts),
  ('Correcting the teacher helps on other text, and only there (P2)', correction),
  ('Correcting it meanwhile is as good as before (P2)', correction_meanwhile),
  ("The last phase's model is better to cut than the one before (P1)", last_phase),
  ('Three quarters of a short recovery settle the ranks (P1)', ranks),
  ('A contiguous window of layers is better to delete (P2)', windows),
  ('Heads are better kept than neurons (P2)', keep_heads),
  ('Making up for smaller norms helps (no paper says)', gains),
  ("The student's own text, by the JSD, is better to end on (no paper says)", own_text),
  ('A search finds a shape no worse than ours (no paper says)', searching),
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
  'Differences in nats per token with 95 % intervals over text and, where there are several, over '
  'seeds (negative: the first has the lower loss). A claim is reproduced if every comparison it '
  'stands on agrees beyond its interval, not reproduced if one clearly does not (no), not tested '
  'if a part was not run, within noise otherwise (?). Some sixty comparisons are made: a few of '
  'those that are told will be so by chance. As good means at most 0.01 nats worse. A seed draws '
  'the order of the text, and what a random cut keeps; the teacher, the calibration rows and so '
  'the scored cuts are one draw, and a loss as cut is one measurement.'
)
