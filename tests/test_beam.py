"""The pipeline of Apache Beam: the local path's rows, at addresses too; what is refused."""

import dataclasses
import hashlib
import json
import pathlib

import numpy as np
import pytest
import toy

from slm.data import (
  decontaminate,
  documents,
  importance,
  loader,
  prepare,
  rows,
  settings,
  work,
)

pytest.importorskip('apache_beam')

from apache_beam.io import filesystem, localfilesystem  # noqa: E402

from slm.data import distributed  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent


class Bucket(localfilesystem.LocalFileSystem):
  """Addresses toy://PATH, which are files of this machine."""

  scheme = classmethod(lambda cls: 'toy')

  def exists(self, path):
    return super().exists(path.removeprefix('toy:/'))

  def metadata(self, path):
    found = super().metadata(path.removeprefix('toy:/'))
    return filesystem.FileMetadata(path, found.size_in_bytes)

  def _path_open(self, path, *arguments, **named):
    path = pathlib.Path(path.removeprefix('toy:/'))
    path.parent.mkdir(parents=True, exist_ok=True)
    return super()._path_open(str(path), *arguments, **named)

  def _list(self, dir_or_prefix):
    for entry in super()._list(dir_or_prefix.removeprefix('toy:/')):
      yield filesystem.FileMetadata(f'toy:/{entry.path}', entry.size_in_bytes)


def near(text: str, changed: int) -> str:
  """Return a text with its last words changed."""
  words = text.split()
  return ' '.join(words[:-changed] + ['changed'] * changed)


def corpus(root: pathlib.Path) -> dict[str, dict[str, str]]:
  """Write sets with exact copies and near-duplicates within and across sets, splits and files."""
  generic = toy.documents(list(toy.TOPICS), 480, 0)
  law = toy.documents(['law', 'law', 'sea'], 90, 1)
  generic += [*generic[:40], *(near(t, 2) for t in generic[20:80]), *law[60:70]]
  law[20:30] = [near(t, 1) for t in law[70:80]]
  law += [near(near(t, 1), 3) for t in law[:20]] + generic[100:120]
  paths = {}
  for i in range(5):
    toy.write_jsonl(root / f'generic-{i}.jsonl{".gz" * (i % 2)}', generic[i::5])
  for split, texts in {'train': law[:60] + law[90:], 'test': law[60:90]}.items():
    paths[split] = str(toy.write_jsonl(root / f'law-{split}.jsonl', texts))
  return {'generic': {'all': str(root / 'generic-*')}, 'law': paths}


def records(out: str) -> dict[str, str]:
  """Return the hash of the sorted records of every split."""
  hashes = {}
  for name, splits in loader.manifest(out)['sets'].items():
    for split, facts in splits.items():
      shards = [pathlib.Path(out) / name / split / shard for shard in facts['shards']]
      found = sorted(data for shard in shards for data in work.read_records(shard))
      assert len(found) == facts['rows']
      hashes[f'{name}/{split}'] = hashlib.sha256(b''.join(found)).hexdigest()
  return hashes


def state(out: str) -> dict[str, str]:
  """Hash the files that later commands read, and the manifest without the cost."""
  root = pathlib.Path(out)
  kept = [
    path
    for pattern in ('tokenizer/*', 'clusters/*', '*/*/*.array_record', '*/*/*.npy', 'index/*')
    for path in root.glob(pattern)
    if path.suffix != '.png' and path.name != 'stage.json'
  ]
  manifest = loader.manifest(out)
  del manifest['cost']
  hashes = {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}
  return hashes | {'manifest': json.dumps(manifest, sort_keys=True)}


@pytest.fixture(scope='module')
def small_shards():
  """Make reading tasks, document shards and blocks of rows small enough for several of each."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(documents, '_TASK', 20_000)
    patch.setattr(documents, '_SHARD', 8_000)
    patch.setattr(rows, 'BLOCK', 3)
    yield


@pytest.fixture(scope='module')
def made(tmp_path_factory, small_shards):
  """Prepare the corpus locally and with Beam's runner of this machine; return both directories."""
  root = tmp_path_factory.mktemp('beam')
  sets = corpus(root)
  tokenizer = settings.TokenizerConfig('sentencepiece', 400)
  make = lambda name: toy.config(
    root, sets, out=str(root / name), tokenizer=tokenizer, near_duplicates=0.7, workers=0
  )
  local, piped = dataclasses.replace(make('local'), workers=1), make('piped')
  prepare.prepare(local)
  prepare.prepare(piped, runner='direct')
  return local, piped


def test_rows_are_the_same_set_and_the_same_bytes(made):
  local, piped = (cfg.out for cfg in made)
  assert records(local) == records(piped)
  assert state(local) == state(piped)
  facts = loader.manifest(piped)['sets']
  assert len(facts['generic']['train']['shards']) > 2
  assert min(facts['generic']['train']['duplicates'], facts['law']['train']['duplicates']) > 20


def test_importance_weights_and_costs_are_those_of_local_rows(made):
  chosen = []
  for cfg in made:
    request = importance.Request(
      data=cfg.out, domain='law', tokens=3000, out='law-is', level=8, seed=1
    )
    importance.sample(request)
    chosen.append(np.load(f'{cfg.out}/index/law-is.npy'))
  np.testing.assert_array_equal(*chosen)
  local, piped = (loader.manifest(cfg.out)['cost'] for cfg in made)
  assert piped.keys() == local.keys()
  assert piped['clusters']['flops'] == pytest.approx(local['clusters']['flops'], rel=1e-3)


def test_a_finished_directory_is_left_alone_and_repaired_locally(made):
  _, piped = made
  before = state(piped.out)
  next(pathlib.Path(piped.out).glob('generic/train/*.array_record')).unlink()
  prepare.prepare(dataclasses.replace(piped, workers=1))
  assert state(piped.out) == before


def test_addresses_are_read_and_written(tmp_path):
  sets = toy.corpus(tmp_path)
  here = toy.config(tmp_path, sets)
  prepare.prepare(here)
  there = {s: {k: f'toy:/{v}' for k, v in splits.items()} for s, splits in sets.items()}
  cfg = toy.config(tmp_path, there, out=f'toy:/{tmp_path}/there', workers=0)
  manifest = prepare.prepare(cfg, runner='direct')
  assert prepare.prepare(cfg, runner='direct') == manifest  # it is complete
  out = str(tmp_path / 'there')
  prepare.prepare(dataclasses.replace(cfg, out=out), runner='direct')  # indexes and histograms
  assert records(out) == records(here.out)
  assert state(out) == state(here.out)


@pytest.mark.parametrize(
  ('changes', 'named', 'message'),
  [
    ({}, {'runner': 'direct', 'verify': True}, '--verify .* not with --runner=direct'),
    ({'workers': 2}, {'runner': 'spark'}, 'workers=2: with --runner=spark its own options'),
    ({}, {'runner': 'dataflow'}, 'workers of Dataflow do not see this machine: expected gs://'),
    ({'sets': {'generic': {'all': 'python:docs'}}}, {'runner': 'flink'}, 'the packages of one'),
    ({'sets': {'generic': {'all': 'nope://b/*.txt'}}}, {'runner': 'direct'}, 'nope://b/.*: cannot'),
    ({}, {'runner': 'direct', 'options': ['--nope=1']}, '--nope: Apache Beam has no such option'),
    ({}, {'runner': 'direct', 'options': ['--direct_num_workers=x']}, 'direct_num_workers: inval'),
    ({}, {'runner': 'direct', 'options': ['--runner=x']}, '--runner=x: stands before --, as one'),
  ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(tmp_path, changes, named, message):
  cfg = toy.config(tmp_path, **{'sets': toy.corpus(tmp_path), 'workers': 0} | changes)
  with pytest.raises(ValueError, match=message):
    prepare.prepare(cfg, **named)
  assert not (tmp_path / 'out').exists()


def test_what_a_function_raises_is_one_line(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"text": "one"}\n{"body": "two"}\n')
  cfg = toy.config(tmp_path, {'generic': {'all': str(tmp_path / 'a.jsonl')}}, workers=0)
  with pytest.raises(ValueError, match=r"^\S+a.jsonl:2: no field 'text'; the line has body$"):
    prepare.prepare(cfg, runner='direct')


@pytest.mark.parametrize('address', ['', 'toy:/'])
def test_overlap_with_evaluations_is_the_same(address, tmp_path):
  texts = toy.documents(list(toy.TOPICS), 60, 0)
  for i in range(3):
    toy.write_jsonl(tmp_path / f'train-{i}.jsonl{".gz" * (i % 2)}', texts[i::3])
  exam = toy.write_jsonl(tmp_path / 'exam.jsonl', [*texts[:40:5], *toy.documents(['law'], 9, 7)])

  def made(name, address, **named):
    request = decontaminate.Request(
      train=(f'{address}{tmp_path}/train-*',), eval=(str(exam),), out=str(tmp_path / name),
      action='drop-rows', **named,
    )  # fmt: skip
    report = decontaminate.decontaminate(request)
    out = tmp_path / name
    clean = sorted(path for path in out.glob('clean/**/*') if path.is_file())
    matches = b''.join(path.read_bytes() for path in sorted(out.glob('hits/*.jsonl')))
    found = [(out / 'report.md').read_bytes(), matches.replace(b'toy:/', b'')]
    return report['evaluations']['exam'], found, {path.name: path.read_bytes() for path in clean}

  here = made('here', '', workers=1)
  assert here[0]['overlapped'] == 8 and len(here[2]) == 3
  assert made('piped', address, runner='direct')[1:] == here[1:]


@pytest.mark.parametrize('runner, options', [
  ('flink', ['--flink_master=host:8081', '--parallelism=64', '--environment_type=DOCKER',
             '--environment_config=IMAGE']),
  ('spark', ['--spark_master_url=spark://host:7077', '--environment_type=DOCKER',
             '--environment_config=IMAGE']),
  ('dataflow', ['--project=NAME', '--region=us-central1', '--temp_location=gs://BUCKET/tmp',
                '--sdk_container_image=IMAGE', '--max_num_workers=200']),
])  # fmt: skip
def test_options_of_the_runners_reach_beam(runner, options):
  given = distributed.parse(runner, options).get_all_options(retain_unknown_options=True)
  assert given['runner'] == settings.RUNNERS[runner]
  for option in options:
    name, _, value = option.removeprefix('--').partition('=')
    assert str(given[name]) == value
