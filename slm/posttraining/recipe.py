"""The stages of a recipe, each a run directory that a second call continues."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slm.base import artifact, files
from slm.data.settings import TokenizerConfig
from slm.inference import answering, rewards, scoring
from slm.inference import tasks as tasks_lib
from slm.inference.tasks import Task
from slm.interchange import convert
from slm.objectives import heldout
from slm.posttraining import settings
from slm.posttraining.material import Material
from slm.posttraining.settings import STAGES, TuluConfig
from slm.reporting import posttraining as report
from slm.runs import load, rundir
from slm.training import loop
from slm.weights import sharding


@artifact.writes('workdir')
def tulu(given: Mapping[str, Any], workdir: Path) -> str:
  """Run or continue a recipe below a directory; returns the report as Markdown.

  Writes start/ (if imported), data/, a run for each stage, answers/ (if drawn), report.html and
  report.md.

  Raises:
    ValueError: if a part of the config does not fit, or a directory holds what another made.
  """
  cfg, folder = settings.read(given), Path(workdir)
  if (folder / 'config.json').exists():
    raise ValueError(f'{folder}: holds a run: choose another directory')
  start = _start(cfg, folder)
  material = Material(cfg, folder / 'data', _tokenizer(cfg, start))
  material.make()
  runs = {'start': start} if start else {}
  for stage in cfg.stages:
    if STAGES[stage] == 'pairs' and cfg.answers.count and 'pairs' not in material.prepared:
      _answer(cfg, runs.get('sft', start), material, folder / 'answers')
    made_from = str(runs.get(cfg.parent(stage), '')), material.rows(STAGES[stage])
    training = settings.training(cfg, stage, *made_from, str(runs.get('reward', '')))
    loop.train(training, folder / stage, reward=rewards.reward)
    runs[stage] = folder / stage
  tasks, text = _tasks(cfg, material), material.text()
  for stage, run in runs.items():
    if stage != 'reward':  # its weights score answers and write none
      _evaluate(cfg, run, tasks, text)
  files.write_json(folder / 'recipe.json', _about(cfg, folder, runs, tasks, text))
  return report.write(folder)


def _start(cfg: TuluConfig, folder: Path) -> Path | None:
  """Return the run that the recipe starts from, which is imported if need be."""
  if not cfg.start:
    return None
  start = Path(cfg.start)
  if rundir.of_transformers(rundir.split_ref(start)[0]):
    convert.import_model(start, folder / 'start')
    start = folder / 'start'
  return start


def _tokenizer(cfg: TuluConfig, start: Path | None) -> TokenizerConfig:
  """Return the tokenizer of the model that the recipe starts from."""
  if not start:
    return cfg.tokenizer
  loaded = load.load(start, load.mesh_for(start))
  return TokenizerConfig(path=str(load.tokenizer_of(loaded)))


def _answer(cfg: TuluConfig, run: Path, material: Material, out: Path) -> None:
  """Draw answers of a run to prompts, and keep pairs of those that pass and that fail."""
  a = cfg.answers
  prompts = material.source(a.prompts or cfg.prompts.train)
  answering.write(
    str(run), prompts, str(out), count=a.count, max_tokens=a.max_tokens, temperature=a.temperature,
    top_p=1.0, seed=0, batch_size=a.batch_size, relax=False,
  )  # fmt: skip


def _tasks(cfg: TuluConfig, material: Material) -> list[Task]:
  """Return the tasks of the evaluation: held-out prompts, greedy and sampled, and others."""
  e, found = cfg.evaluate, []
  if e.prompts and cfg.prompts.validation:
    how = {'chat': True, 'max_tokens': e.max_tokens, 'limit': e.prompts, 'ended': e.ended}
    path = str(material.prompts())
    found.append(Task(report.GREEDY, path, 'labelled', **how))
    if e.samples:
      found.append(Task(report.SAMPLED, path, 'labelled', samples=e.samples, **how))
  for task in cfg.tasks():
    places = {name: material.named(getattr(task, name)) for name in ('file', 'shots_from')}
    found.append(Task(**{**vars(task), **places}))
  return found


def _evaluate(cfg: TuluConfig, run: Path, tasks: list[Task], text: str) -> None:
  """Evaluate a run on tasks and on general text; what was evaluated before is kept."""
  mesh, e = sharding.fit_mesh(scoring.shape(run).embed), cfg.evaluate
  if tasks:
    context = e.context or cfg.conversations.context
    tasks_lib.perform(run, tasks, mesh, e.batch_size, context=context)
  if text:
    heldout.run(run, text, [report.TEXT], mesh, e.batch_size, e.text_rows)


def _about(
  cfg: TuluConfig, folder: Path, runs: Mapping[str, Path], tasks: list[Task], text: str
) -> dict[str, Any]:
  """Say which run is which stage, for the report."""
  place = lambda run: str(run.relative_to(folder)) if run.is_relative_to(folder) else str(run)
  return {
    'runs': {stage: place(run) for stage, run in runs.items()},
    'parents': {stage: cfg.parent(stage) for stage in runs if stage != 'start'},
    'tasks': [task.name for task in tasks],
    'text': report.TEXT if text else '',
    'examples': cfg.evaluate.examples,
  }
