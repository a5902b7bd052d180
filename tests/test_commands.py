"""The command line: one grammar, flags in any order, configs by name, --help, the `slm` command."""

import re
import runpy
import sys

import pytest
from absl import flags

from slm import __main__, __version__
from slm.base import arguments
from slm.data import loader
from slm.training import aot

pytestmark = pytest.mark.filterwarnings('ignore::RuntimeWarning')  # runpy: already imported
COMMANDS = [name for name in arguments.commands() if name != 'harness']  # that one is lm-eval's own


@pytest.fixture
def call(monkeypatch, capsys):
  """Return call(command, *arguments) -> (exit status, stdout, stderr), in this process."""

  def run(*argv, main=__main__.main):
    monkeypatch.setattr(sys, 'argv', ['slm', *argv])
    before, code = set(flags.FLAGS), 0
    try:
      main()
    except SystemExit as e:
      code = e.code
    finally:
      for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
    return code, *capsys.readouterr()

  return run


def test_flags_come_in_any_order_and_configs_by_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  own = f'--config={arguments.CONFIGS}'
  arrange = lambda *argv, config='base': arguments.arrange(['slm', *argv], config, {})[1:]
  assert arrange('--config.steps=3', '--config=pretrain', 'x') == [
    f'{own}/pretrain.py', '--config.steps=3', 'x'
  ]  # fmt: skip
  assert arrange('--config.steps=3') == [f'{own}/base.py', '--config.steps=3']
  assert arrange('a', '--config', 'configs/moe.py') == [f'{own}/moe.py', 'a']
  assert arrange('--config=data:generic=a:b') == [f'{own}/data.py:generic=a:b']
  assert arrange('a', '--b', config='') == ['a', '--b']


def test_a_config_of_ones_own_comes_before_those_of_slm(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs/pretrain.py').write_text('')
  find = lambda name: arguments.arrange(['slm', f'--config={name}'], 'base', {})[1]
  assert find('configs/pretrain.py') == '--config=configs/pretrain.py'
  assert find('configs/finetune.py') == f'--config={arguments.CONFIGS / "finetune.py"}'
  for name in ('elsewhere/finetune.py', f'{tmp_path}/finetune.py', 'finetune.yaml'):
    with pytest.raises(ValueError, match='no such file'):
      find(name)


@pytest.mark.parametrize(
  ('argument', 'message'),
  [
    ('--config=configs/nope.py', '--config=configs/nope.py: no such file; slm has base, '),
    ('--config=pretrian', '--config=pretrian: no such file; did you mean pretrain?'),
    ('--config.contxt=3', '.contxt: configs/data.py has no such key; did you mean context?'),
    ('--config.tokenizer.vocb=3', 'did you mean tokenizer.vocab?'),
    ('--config.vocab=3', 'did you mean tokenizer.vocab?'),
    ('--noconfig.context.deep', '--config.context.deep: configs/data.py has no such key'),
    ('--old=3', '--old is no longer a flag: write --new=NAME'),
    ('--noold', '--old is no longer a flag'),
  ],
)  # fmt: skip
def test_mistakes_are_named_before_any_work(argument, message):
  with pytest.raises(ValueError) as e:
    arguments.arrange(['slm', argument], 'data', {'old': '--new=NAME'})
  assert message in str(e.value) and '\n' not in str(e.value) and '\\' not in str(e.value)


@pytest.mark.parametrize(
  ('command', 'old', 'new'),
  [
    ('evaluate', '--split=test', '--on=SET/SPLIT'),
    ('signals', '--teacher=RUN', '--run=RUN'),
    ('signals', '--index=law-2000', '--on=SET/SPLIT@INDEX'),
    ('specialise', '--domain=law', '--on=SET/train[@INDEX]'),
    ('specialise', '--index=law-2000', '--on=SET/train[@INDEX]'),
    ('prune', '--set=law', '--on=SET/SPLIT[@INDEX]'),
    ('data.importance', '--domain=law', '--on=SET/train[@INDEX]'),
    ('data.dsir', '--domain_index=law-2000', '--on=SET/train[@INDEX]'),
  ],
)
def test_old_spellings_name_the_new_one(call, command, old, new):
  code, out, err = call(command, old)
  assert code == 1 and not out and new in err
  assert err.startswith('error: --') and err.count('\n') == 1


RECIPE = ['--config=minitron_published:nemo_8b'] + [
  f'--config.recover.{setting}'
  for setting in ('data.batch_size=2', 'model.remat=dots', 'mesh.data=1', 'mesh.fsdp=-1')
]


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    (['--decode=-4'], 'flag --decode=-4'),
    (['--context=-8'], 'flag --context=-8'),
    ([], 'without data.path: expected --config.model.vocab and --context'),
    (['--decode=4', '--autotune'], '--autotune: looks for settings of a training step: leave out'),
    (['--context=8', *(f'--config.{x}=2' for x in ('model.vocab', 'data.batch_size', 'mesh.fsdp'))],
     'needs 9G; --autotune tries 2 settings, from --config.model.remat=dots'),
    (RECIPE, 'needs 9G; --autotune tries 1 settings, from --config.recover.model.remat=full'),
    ([*RECIPE, '--autotune'], 'needs 9G; it fits with --config.recover.model.remat=full'),
  ],
)  # fmt: skip
def test_what_compile_refuses_names_the_flags(call, argv, message, monkeypatch):
  def compile_step(cfg, *_):
    if cfg.model.remat != 'full':
      raise aot.DoesNotFitError('needs 9G')

  monkeypatch.setattr(aot, 'devices', lambda topology: [None] * 2)
  monkeypatch.setattr(aot, 'compile_step', compile_step)
  code, out, err = call('compile', '--topology=v5e:1x2', *argv)
  assert code == 1 and not out and message in err.splitlines()[-1], err


@pytest.mark.parametrize(
  ('module', 'argv', 'message'),
  [
    ('specialise', ['--dry_run', '--topology=v5e:2x2'], '--dry_run, --topology: expected one of'),
    ('specialise', ['--out='], 'expected --out'),
    ('minitron', ['--out='], 'expected --out'),
    ('speed', ['--out='], 'expected --out'),
    ('speed', ['--rounds=-1'], 'flag --rounds=-1'),
    ('faults', ['--out='], 'expected --out'),
    ('faults', ['--seed=-1'], 'flag --seed=-1'),
  ],
)
def test_what_experiments_refuse_names_the_flags(call, module, argv, message, monkeypatch):
  main = lambda: runpy.run_module(f'experiments.{module}.run', run_name='__main__')
  code, out, err = call(*argv, main=main)
  assert code == 1 and not out and message in err, err


def test_commands_share_one_grammar():
  for command in arguments.commands():
    text = (arguments.SLM / f'{command.replace(".", "/")}.py').read_text()
    defined = set(re.findall(r"flags\.DEFINE_\w+\(\s*'(\w+)'", text))
    assert not defined & {'set', 'split', 'index', 'domain', 'domain_index', 'teacher'}, command


def test_rows_are_named_in_one_way(tiny_data):
  parse = lambda on, split='': loader.parse_on(tiny_data, on, split)
  assert parse('court/test') == ('court', 'test', '')
  assert parse('court/train@court-2000', 'train') == ('court', 'train', 'court-2000')
  for on in ('court', 'court/', 'court/tset', 'court/test@', 'court/test/a', 'x/test', ''):
    with pytest.raises(ValueError) as e:
      parse(on)
    assert str(e.value).startswith(f'{on}: expected SET/SPLIT[@INDEX], such as ')
    assert 'generic/train, generic/validation' in str(e.value)
  with pytest.raises(ValueError, match='such as court/t'):
    parse('court')
  with pytest.raises(ValueError, match='expected court/train: held-out rows may not choose data'):
    parse('court/test', 'train')


@pytest.mark.parametrize('command', COMMANDS)
def test_help_shows_flags_and_config_keys(call, command):
  code, out, err = call(command, '--help')
  assert code == 0 and not err and f'python -m slm.{command}' in out
  assert 'absl' not in out and '--help' not in out and 'repeat this option' not in out
  source = (arguments.SLM / f'{command.replace(".", "/")}.py').read_text()
  assert ('\n  --' in out) == ('flags.DEFINE' in source)
  assert ('--config.' in out.partition('\nFlags:')[2]) == (
    command in ('train', 'prune', 'minitron', 'tulu', 'data.prepare', 'compile')
  )


def test_help_has_the_defaults_and_comments_of_the_config_that_is_named(call):
  base = call('train', '--help')[1]
  assert '--config.steps=1000\n' in base and '--config.teacher=  ' in base
  assert '--config.log_every=10                  steps; 0: at evaluations and saves only\n' in base
  tuned = call('train', '--help', '--config=finetune')[1]
  assert '--config.eval.every=20                 steps; 0: only at the end\n' in tuned
  assert '--config.reparam.alpha=16.0            the change is (alpha' in call(
    'train', '--config=lora', '-h'
  )[1]  # fmt: skip
  assert '--config.tokenizer.vocab=4096          pieces of a' in call('data.prepare', '--help')[1]


def test_slm_lists_its_commands_and_names_the_nearest(call):
  code, out, _ = call()
  assert code == 0 and out == call('--help')[1]
  assert {'train', 'evaluate', 'data.prepare', 'hf'} <= {
    line.split()[0] for line in out.splitlines() if line.startswith('  ')
  }
  assert call('--version')[1] == f'slm {__version__}\n'
  assert call('trian')[0] == "error: slm has no command 'trian'; did you mean train?"
  assert call('xyzzy')[0] == "error: slm has no command 'xyzzy'; slm --help lists them"
