"""Every run of the study as plain data, in an order that meets their needs."""

import dataclasses
from typing import Any

from experiments.specialise.methods import FAMILIES, METHODS, Family, Method
from experiments.specialise.scales import Scale
from slm.models.config import DecoderConfig
from slm.runs.config import section
from slm.training import optim
from slm.weights.count import forward_flops, num_params


@dataclasses.dataclass(frozen=True)
class Start:
  """Weights that a method fine-tunes: a run (or RUN@STEP), and the runs paid for it."""

  ref: str = ''
  generic_runs: tuple[str, ...] = ()
  domain_runs: tuple[str, ...] = ()


class Study:
  """The jobs and the table rows of a scale.

  A job is {'name', 'do', 'evaluate', ...}: its name is a run directory below the study's `runs`
  (or a checkpoint of one), `do` names the entry point that makes it, 'evaluate' lists set/split
  names. A row is a cell of the report: which run serves, and which had to be paid for.
  """

  def __init__(
    self, scale: Scale, data: str, context: int, vocab: int, seeds: tuple[int, ...] = ()
  ):
    self.scale, self.jobs, self.rows = scale, {}, []
    self._vocab, self._context = vocab, context
    self._common = {'data.path': data, **scale.train}
    for seed in seeds or scale.seeds:
      every = [m for m in METHODS if m.name in scale.methods and m.name not in scale.once]
      once = [m for m in METHODS if m.name in scale.once and seed == scale.seeds[0]]
      for methods in (every, once):
        for domain in scale.domains:
          for method in sorted(methods, key=lambda m: bool(m.teacher)):
            if domain in self._domains(method):
              self._method(method, domain, seed)
      self._generic_rows([*every, *once], seed)

  def _add(self, name: str, do: str, evaluate: list[str], **job: Any) -> str:
    """Add a job, or what an earlier job of that name is to be evaluated on; returns the name."""
    known = self.jobs.setdefault(name, {'name': name, 'do': do, 'evaluate': [], **job})
    known['evaluate'] += [name for name in evaluate if name not in known['evaluate']]
    return name

  def _steps(self, family: Family) -> int:
    """Return the pretraining steps that cost its share of the FLOPs of the SLM's."""
    flops = lambda f: self._batch(f) * forward_flops(self._decoder(f), self._context)
    return max(int(self.scale.steps * family.share * flops(Family()) / flops(family)), 1)

  def _batch(self, family: Family) -> int:
    if family.config == 'mixture':
      return self._specialists(family) * self._rows(family)
    return self.scale.batch_size

  def _rows(self, family: Family) -> int:
    """Return the rows of one cluster in a batch."""
    if family.config == 'mixture' and self.scale.mixture_rows:
      return self.scale.mixture_rows
    return family.rows or max(self.scale.batch_size // self._specialists(family), 1)

  def clusters(self, family: Family) -> int:
    """Return how many clusters a family's specialists or rows are chosen by, 0 for none."""
    if (family.select or {}).get('do') == 'importance':
      return family.select.get('level', self.scale.selection_level)
    return self._specialists(family)

  def _specialists(self, family: Family) -> int:
    if isinstance(family.clusters, int):
      return family.clusters
    return getattr(self.scale, family.clusters) or self.scale.clusters

  def _shape(self, family: Family) -> dict[str, int]:
    """Return the served model's config keys."""
    shape = dict(self.scale.large if family.large else self.scale.small)
    shape['mlp'] = round(shape['mlp'] * family.mlp)
    more = {k.removeprefix('model.'): v for k, v in family.set.items() if k.startswith('model.')}
    return shape | more

  def _decoder(self, family: Family) -> DecoderConfig:
    return DecoderConfig(vocab=self._vocab, **self._shape(family))

  def params(self, method: str) -> int:
    """Count the parameters that a method serves."""
    name, rule = next((m.family, m.rule) for m in METHODS if m.name == method)
    family = FAMILIES[name] if name else Family()
    models = self.clusters(family) if rule == 'ensemble' else 1
    return models * sum(num_params(self._decoder(family)).values())

  def _at(self, run: str, family: Family, budget: float) -> str:
    """Name the checkpoint of a run at a share of its pretraining."""
    return run if budget == 1 else f'{run}@{round(self._steps(family) * budget)}'

  def _pretrain(self, name: str, domain: str, seed: int) -> str:
    """Add the pretraining of a family, and its checkpoints' losses on generic text."""
    s, family = self.scale, FAMILIES[name]
    steps, clusters = self._steps(family), self._specialists(family)
    settings = {
      **self._common,
      **_model(self._shape(family)),
      'seed': seed,
      'steps': steps,
      'data.batch_size': self._batch(family),
      'schedule.name': s.schedule,
      'schedule.peak': s.large_peak if family.large else s.peak,
      'schedule.warmup': s.warmup or steps // 20,
      'eval.every': max(steps // 8, 1),
      'checkpoint.every': min(max(steps // 8, 1), 2000),
      'checkpoint.milestones': tuple(round(steps * b) for b in s.budgets if b < 1),
    }
    if clusters:
      settings |= {
        'data.level': clusters,
        'reparam.clusters': clusters,
        'data.rows_per_group': self._rows(family),
      }
    settings |= {k: clusters if v == 'clusters' else v for k, v in family.set.items()}
    if family.config == 'project':
      settings['reparam.last_layers'] = s.projected_layers
    run = f'{name}-{domain}-{seed}' if domain else f'{name}-{seed}'
    if family.init:
      settings['init'] = self._init(family, domain, seed)[-1]
      # Held where the rate of what it starts from was: a decay of its own would be an advantage.
      settings |= {'schedule.name': 'constant', 'schedule.peak': self._rate(family)}
    if family.select:
      how = {'domain': domain, 'domain_index': self._smallest(domain), 'seed': seed}
      if family.select['do'] == 'importance':
        how |= {'level': s.selection_level, 'tokens': steps * s.batch_size}
      how |= family.select
      settings['data.index'] = self._add(f'{name}-{domain}-rows-{seed}', evaluate=[], **how)
    if family.mix:
      settings |= {
        'data.mix_share': family.mix,
        'data.mix_set': domain,
        'data.mix_index': self._smallest(domain),
      }
    generic = [] if domain else ['generic/test']
    self._add(run, 'train', generic, config=family.config, set=settings)
    for budget in s.budgets if generic else ():
      self._add(self._at(run, family, budget), 'evaluate', generic)
    return run

  def _init(self, family: Family, domain: str, seed: int) -> tuple[str, ...]:
    """Name the pretraining that a family starts from, and the specialist taken out if one is."""
    run = self._pretrain(family.init, '', seed)
    ref = self._at(run, FAMILIES[family.init], family.init_share)
    if not family.init_rule:
      return (ref,)
    name = f'{family.init}-{domain}-{seed}-from{family.init_share:g}'
    how = {'run': ref, 'domain': domain, 'index': self._smallest(domain), 'rule': family.init_rule}
    return ref, self._add(name, 'specialise', [], **how)

  def _rate(self, family: Family) -> float:
    """Return the learning rate at the step whose weights a family starts from."""
    steps = self._steps(FAMILIES[family.init])
    warmup = self.scale.warmup or steps // 20
    found = {'name': self.scale.schedule, 'peak': self.scale.peak, 'warmup': warmup}
    schedule = optim.schedule(section('schedule', {**found, 'final': 0.1, 'decay': 0.2}), steps)
    return float(schedule(round(steps * family.init_share)))

  def _smallest(self, domain: str) -> str:
    return f'{domain}-{self.scale.sizes[0]}'

  def _generic_rows(self, methods: list[Method], seed: int) -> None:
    """Add the rows of losses on generic text: once for each family that is shared."""
    for name in dict.fromkeys(m.family for m in methods if m.family):
      if FAMILIES[name].per_domain:
        continue
      for budget in self.scale.budgets:
        ref = self._at(f'{name}-{seed}', FAMILIES[name], budget)
        first = next(m.name for m in methods if m.family == name)
        self._row(first, None, None, seed, budget, ref, Start(ref, (ref,)), ())

  def _start(self, method: Method, domain: str, seed: int, budget: float) -> Start:
    """Add what a method needs before it is fine-tuned on a domain."""
    if not method.family:
      return Start()
    family = FAMILIES[method.family]
    run = self._pretrain(method.family, domain if family.per_domain else '', seed)
    ref = self._at(run, family, budget)
    before = self._init(family, domain, seed) if family.init else ()
    if family.per_domain:
      return Start(ref, before[:1], (*before[1:], ref))
    if not method.rule:
      return Start(ref, (*before, ref))
    if method.rule == 'ensemble':
      name = self._add(f'{method.name}-{seed}' + _tag(budget), 'ensemble', [], run=ref)
      return Start(name, (*before, ref))
    name = f'{method.name.removesuffix("_noft")}-{domain}-{seed}' + _tag(budget)
    if method.rule == 'code':
      steps = self.scale.finetune_steps[0]
      settings = {**self._tuning(domain, 0, steps, seed), 'init': ref}
      self._add(name, 'train', self._tests(domain), config='code', set=settings)
    else:
      how = {'run': ref, 'domain': domain, 'index': self._smallest(domain), 'rule': method.rule}
      self._add(name, 'specialise', self._tests(domain), **how)
    return Start(name, (*before, ref), (name,))

  def _tuning(self, domain: str, i: int, steps: int, seed: int) -> dict[str, Any]:
    """Return the settings of any training on the i-th size of a domain's set."""
    return {
      **self._common,
      'seed': seed,
      'steps': steps,
      'data.set': domain,
      'data.index': f'{domain}-{self.scale.sizes[i]}',
      'data.batch_size': self.scale.finetune_batch,
      'schedule.warmup': min(10, steps // 2),
      'eval.every': max(steps // self.scale.finetune_evals, 1),
      'checkpoint.every': steps,
    }

  def _domains(self, method: Method) -> tuple[str, ...]:
    """Return the domains of a method: one if an ablation pretrains a model for each."""
    s = self.scale
    costly = method.family and FAMILIES[method.family].per_domain
    return s.domains[:1] if method.name in s.once and costly else s.domains

  def _method(self, method: Method, domain: str, seed: int) -> None:
    """Add a method's runs and rows on one domain."""
    s = self.scale
    budgets = s.budgets if method.name in s.budgeted else (1,)
    for budget in budgets:
      start = self._start(method, domain, seed, budget)
      if not method.tune:
        self._add(start.ref, 'evaluate', self._tests(domain))
        for size in self._sizes(method, budget):
          self._row(method.name, domain, size, seed, budget, start.ref, start, ())
        continue
      for i, size in enumerate(self._sizes(method, budget)):
        run, paid, generic = self._tune(method, start, domain, i, seed, budget), (), ()
        if method.teacher:
          teacher = next(m for m in METHODS if m.name == method.teacher)
          generic = self._start(teacher, domain, seed, budget).generic_runs
          paid = (f'{method.teacher}-{domain}-{size}-{seed}' + _tag(budget),)
        start_and = dataclasses.replace(start, generic_runs=start.generic_runs + generic)
        self._row(method.name, domain, size, seed, budget, run, start_and, (*paid, run))

  def _sizes(self, method: Method, budget: float) -> tuple[int, ...]:
    """Return the set sizes of a method: the smallest alone of variants and shorter budgets."""
    fewer = budget != 1 or method.name in self.scale.once
    return self.scale.sizes[:1] if fewer else self.scale.sizes

  def _tests(self, domain: str) -> list[str]:
    return [f'{domain}/{split}' for split in self.scale.eval_splits]

  def _tune(
    self, method: Method, start: Start, domain: str, i: int, seed: int, budget: float
  ) -> str:
    """Add a fine-tuning run on the i-th size."""
    s = self.scale
    steps, size = s.finetune_steps[i], s.sizes[i]
    if method.tune == 'mask':
      steps *= 4  # its scores have a rate of their own, a low one
    family = FAMILIES[method.family] if method.family else Family()
    settings = {
      **self._tuning(domain, i, steps, seed),
      **_model(self._shape(family)),
      'init': start.ref,
    }
    if method.tune != 'mask':
      # The paper fine-tunes at the pretraining's rate, and at a third of it on its smallest set.
      peak = (s.large_peak if family.large else s.peak) * s.finetune_rate
      settings['schedule.peak'] = peak / (1 if i else 3)
    if method.teacher:
      settings['teacher'] = f'{method.teacher}-{domain}-{size}-{seed}' + _tag(budget)
    name = f'{method.name}-{domain}-{size}-{seed}' + _tag(budget)
    config = method.tune
    return self._add(name, 'train', self._tests(domain), config=config, set=settings)

  def _row(
    self,
    method: str,
    domain: str | None,
    size: int | None,
    seed: int,
    budget: float,
    served: str,
    start: Start,
    tuned: tuple[str, ...],
  ) -> None:
    large = self.params(method) > 1.05 * self.params('slm')
    run = lambda names: [f'runs/{name}' for name in names]
    self.rows.append(
      {
        'method': method,
        'domain': domain,
        'size': size,
        'seed': seed,
        'budget': budget,
        'run': f'runs/{served}',
        'kind': 'large' if large else 'small',
        'generic_runs': run(start.generic_runs),
        'specialise_runs': run([*start.domain_runs, *tuned]),
      }
    )


def _tag(budget: float) -> str:
  return '' if budget == 1 else f'-budget{budget:g}'


def _model(shape: dict[str, int]) -> dict[str, int]:
  return {f'model.{k}': v for k, v in shape.items()}
