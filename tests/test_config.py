"""Configs: read once, errors that name the key, and the same config read back from a run."""

import dataclasses
import importlib
import json
from pathlib import Path

import pytest

from slm.base import schema
from slm.models.config import DecoderConfig
from slm.reparam.dense import FullConfig, LoraConfig
from slm.reparam.projection import CodeConfig, ProjectConfig
from slm.runs import config, load
from slm.runs.config import DistillConfig, NextTokenConfig, RunConfig
from slm.training import loop

NAMES = sorted(
  p.stem
  for p in (Path(__file__).parent.parent / 'configs').glob('*.py')
  if p.stem not in ('__init__', 'data') and not p.stem.startswith(('minitron', 'tulu'))
)


def given(**changes) -> dict:
  return {**config.defaults(), **changes}


@pytest.mark.parametrize('name', NAMES)
def test_a_config_is_the_same_again_from_its_plain_values(name):
  values = importlib.import_module(f'configs.{name}').get_config().to_dict()
  values['model']['vocab'] = 100
  cfg = config.read(values)
  again = config.read(json.loads(json.dumps(schema.plain(cfg))))
  assert again == cfg and hash(again.model) == hash(cfg.model)


def test_defaults_are_those_of_the_dataclasses():
  cfg = RunConfig(model=DecoderConfig(vocab=7), data=config.loader.DataConfig())
  values = given()
  values['model']['vocab'] = 7
  assert config.read(values) == cfg
  assert 'rows' not in values and 'tokenizer' not in values  # they are found out


def test_keys_that_a_config_lacks_take_their_defaults():
  few = {'model': {'vocab': 7}, 'objective': {'name': 'distill'}, 'mesh': {'fsdp': 2}}
  cfg = RunConfig(
    model=DecoderConfig(vocab=7), data=config.loader.DataConfig(), objective=DistillConfig(),
    mesh=config.MeshConfig(fsdp=2), context=64,
  )  # fmt: skip
  assert config.without_data(few, 64) == cfg
  with pytest.raises(ValueError, match='data.path: expected the directory'):
    loop.train({}, 'run')


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'stepss': 3}, "config: has no key 'stepss'; did you mean 'steps'?"),
    ({'eval': {'evry': 3}}, "eval: has no key 'evry'; did you mean 'every'?"),
    ({'eval': 3}, 'eval: expected a section of keys, found 3'),
    ({'steps': 1.5}, 'steps: expected a whole number, found 1.5'),
    ({'steps': True}, 'steps: expected a whole number, found True'),
    ({'dtype': 'float8'}, "dtype: expected one of float32, bfloat16, found 'float8'"),
    ({'init': 3}, 'init: expected text, found 3'),
    ({'checkpoint': {'milestones': 3}}, 'checkpoint.milestones: expected a list, found 3'),
    ({'reparam': {'name': 'lorra'}}, "reparam.name: expected one of full, .* found 'lorra'"),
    ({'reparam': {'name': 'lora', 'leaves': [1]}}, 'reparam.leaves: expected text, found 1'),
    ({'objective': {'name': 'distill', 'mixing': 2}}, 'expected 0 <= mixing <= 1'),
    ({'optim': {'clip': -1}}, 'optim.clip: expected a norm'),
    ({'eval': {'batch_size': 0}}, 'eval.batch_size: expected at least 1'),
    ({'model': {'vocab': 5, 'head_dim': 3}}, 'model.head_dim: RoPE needs an even size'),
  ],
)
def test_a_wrong_value_is_refused_by_key(changes, message):
  values = {'model': {'vocab': 5}, 'data': {}, **changes}
  with pytest.raises(ValueError, match=message):
    config.read(values)


def test_values_are_converted_as_the_fields_say():
  lora = config.section('reparam', {'name': 'lora', 'alpha': 4, 'leaves': ['wq']})
  assert lora == LoraConfig(alpha=4.0, leaves=('wq',)) and isinstance(lora.alpha, float)
  code = config.section('reparam', {'name': 'code', 'of': {'name': 'project', 'code': 3}})
  assert code == CodeConfig(of=ProjectConfig(code=3))
  assert config.section('objective', {'name': 'distill'}) == DistillConfig()
  assert config.section('objective', lora_free := NextTokenConfig()) is lora_free


def test_a_derived_run_is_dense_and_has_no_start():
  parent = RunConfig(
    model=DecoderConfig(vocab=5), data=config.loader.DataConfig(level=2, batch_size=8),
    reparam=ProjectConfig(clusters=2), init='before', teacher='guide', hf={'path': 'x'},
    source_steps={'init': 3},
  )  # fmt: skip
  made = config.derive(parent, 'select', specialist={'of': 'run'})
  assert made.reparam == FullConfig() and not (made.init or made.teacher or made.hf)
  assert made.source_steps is None
  assert made.data == dataclasses.replace(parent.data, level=0)
  assert made.specialist == {'of': 'run'} and made.phase == 'select' and made.model == parent.model


def test_a_run_of_before_some_keys_goes_on(tmp_path):
  """A config.json without newer keys is the same run: they take their defaults."""
  cfg = RunConfig(model=DecoderConfig(vocab=5), data=config.loader.DataConfig())
  values = schema.plain(cfg)
  del values['objective']['balance'], values['tensorboard'], values['model']['rope_low']
  del values['eval']['patience']
  (tmp_path / 'config.json').write_text(json.dumps(values))
  config.check_run(tmp_path, cfg)
  assert config.of(tmp_path) == cfg
  (tmp_path / 'result.json').write_text('{"steps": 1000, "best_step": 200}')
  assert load.served_step(tmp_path) == 1000
  with pytest.raises(ValueError, match='holds another run: steps was 1000, now 3'):
    config.check_run(tmp_path, dataclasses.replace(cfg, steps=3, log_every=1))
  (tmp_path / 'config.json').write_text(json.dumps(values | {'gone': 1}))
  with pytest.raises(ValueError, match=r"config\.json: config: has no key 'gone'"):
    config.of(tmp_path)
