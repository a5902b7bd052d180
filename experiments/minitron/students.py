"""Every student of the study as plain data: how it is cut, from what, and how it is trained.

Students are named by what they are and share cuts, so that each claim compares rows that differ in
one thing.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from slm.models.config import DecoderConfig
from slm.pruning import slicing


@dataclasses.dataclass(frozen=True)
class Student:
  """One row: what is cut and how it is trained.

  Attributes:
    name: of its runs.
    shape: a name of the scale's shapes, or SEARCHED.
    cut: options of slm.prune cut; None draws random weights of that shape instead.
    whole: the model that is cut: 'teacher' or a corrected one.
    parent: the student that is cut instead; one without seeds is cut as it was cut.
    guide: whose logits it learns: 'teacher' or a corrected one, '' for the next-token loss.
    domain: is calibrated and trained on the domain's set instead of the generic one.
    set: dotted config keys of its training.
    steps: of its training, as a share of the scale's.
    equal: train as many steps as cost what this student's training costs.
    seeds: how many of the scale's seeds; 0 measures it as cut and does not train it.
  """

  name: str
  shape: str = 'width'
  cut: Mapping[str, Any] | None = dataclasses.field(default_factory=dict)
  whole: str = 'teacher'
  parent: str = ''
  guide: str = 'teacher'
  domain: bool = False
  set: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  steps: float = 1.0
  equal: str = ''
  seeds: int = 3


# Teachers trained on a little more: on the domain, and on their own text as the control.
CORRECTED = {'corrected': True, 'corrected_control': False}
SEARCHED = 'searched'  # the shape that slm.prune search found
SERVED = ('width', 'depth', 'both')  # of about equal size: their speed and answers are measured
AGGREGATORS = ('mean', 'l2', 'var')
LENGTHS = (2, 4, 8, 16)  # of training from nothing, in recoveries


def _kl(**keys: Any) -> dict[str, Any]:
  return {f'objective.{key}': value for key, value in keys.items()}


def _aggregated() -> list[Student]:
  """List the nine pairs of aggregators: as cut, where the claim on them is made."""
  return [
    Student(f'{t}_{s}', cut={'tokens': t, 'sequences': s}, seeds=0)
    for t in AGGREGATORS
    for s in AGGREGATORS
    if (t, s) != ('mean', 'l2')
  ]


STUDENTS = (
  # Width against depth, both, and the MLPs alone.
  Student('width'),
  Student('depth', 'depth'),
  Student('both', 'both'),
  Student('mlp', 'mlp'),
  # What is kept.
  *_aggregated(),
  Student('weights', cut={'by': 'weights'}),
  Student('taylor', cut={'by': 'taylor'}),
  Student('random', cut={'by': 'random'}),
  # The gains of norms over fewer channels.
  Student('gain_sqrt', cut={'norm_gain': 'sqrt'}),
  Student('gain_calibrated', cut={'norm_gain': 'calibrated'}),
  # Which layers go.
  Student('depth_perplexity', 'depth', cut={'depth': 'perplexity'}),
  Student('depth_window', 'depth', cut={'depth': 'window'}),
  # Query heads against neurons.
  Student('heads', 'heads'),
  # From what it starts, and what it learns from.
  Student('width_lm', guide=''),
  Student('width_lm_equal', guide='', equal='width'),
  Student('random_lm', cut={'by': 'random'}, guide=''),
  Student('scratch', cut=None),
  Student('scratch_lm', cut=None, guide=''),
  *(Student(f'scratch_lm_{n}', cut=None, guide='', steps=n, seeds=1) for n in LENGTHS),
  # The loss.
  *(Student(kl, set=_kl(kl=kl)) for kl in ('reverse', 'cosine', 'mse', 'wsl')),
  Student('depth_reverse', 'depth', set=_kl(kl='reverse')),
  Student('kl_and_lm', set=_kl(mixing=0.5)),
  *(Student(f'temperature_{t:g}', set=_kl(temperature=t)) for t in (0.5, 2.0)),
  *(Student(f'top_{k}', set=_kl(top_k=k)) for k in (16, 256)),
  # Hidden states too, where the depth is kept and where it is halved.
  Student('width_states', set=_kl(states=('embed', '-3:-3'))),
  Student('depth_states', 'depth', set=_kl(states=('embed', '-3:-3'))),
  # The last quarter of the steps on the student's own text, by the generalised JSD (GKD).
  Student('own_text', set=_kl(on_policy=1.0, on_policy_from=0.75, on_policy_kl='jsd')),
  # Scored again on the way; cut, trained and cut again.
  Student('half_way', 'near', seeds=0),
  Student('scored_twice', parent='half_way'),
  Student('in_thirds', 'depth', parent='in_thirds_2', steps=1 / 3),
  Student('in_thirds_2', 'minus_2', parent='in_thirds_1', steps=1 / 3),
  Student('in_thirds_1', 'minus_1', steps=1 / 3),
  Student('quarter', 'quarter'),
  Student('first_half', steps=0.5),
  Student('ladder', 'quarter', parent='first_half', steps=0.5),
  # The shape that a search finds, of those no larger than `width`.
  Student('searched', SEARCHED),
  # Text that the teacher has not seen.
  Student('domain', domain=True),
  Student('domain_corrected', domain=True, guide='corrected'),
  Student('domain_together', domain=True, set=_kl(correct=0.1)),
  Student('domain_last', domain=True, whole='corrected', guide='corrected'),
  Student('control_corrected', guide='corrected_control'),
)


def cut_run(student: Student, seed: int) -> str:
  """Name the run of a student's cut: shared by those that are cut alike, whatever they learn from.

  A cut of a trained student, or at random, is another for every seed.
  """
  what = lambda s: (s.shape, s.cut, s.whole, s.parent, s.domain)
  first = next(s for s in STUDENTS if what(s) == what(student))
  drawn = student.parent or (student.cut or {}).get('by') == 'random'
  return f'cut-{first.name}' + (f'-{seed}' if drawn else '')


def shape(whole: DecoderConfig, sizes: Mapping[str, int]) -> DecoderConfig:
  """Return the shape of a model that is cut to sizes of its axes, whatever is kept."""
  return slicing.shape(whole, {axis: np.arange(n) for axis, n in sizes.items()})
