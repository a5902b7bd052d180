"""Command lines: names of commands and configs, checks of config keys, and --help."""

import ast
import difflib
import inspect
import re
import shlex
import sys
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from slm.base import schema

SLM = Path(__file__).resolve().parents[1]
CONFIGS = SLM.parent / 'configs'  # beside slm, also where it is installed
HELP = {'-h', '-?', '-help', '--help', '--helpshort', '--helpfull'}
_OVERRIDE = re.compile(r'--?(?:no)?config\.([\w.]+)')


def commands() -> dict[str, str]:
  """Return the first line of every command's docstring, by name."""
  summaries = {}
  for path in [*sorted(SLM.glob('*.py')), *sorted(SLM.glob('data/*.py'))]:
    text = path.read_text()
    if path.name != '__main__.py' and "if __name__ == '__main__':" in text:
      name = '.'.join(path.relative_to(SLM).with_suffix('').parts)
      summaries[name] = ast.get_docstring(ast.parse(text)).partition('\n')[0]
  return summaries


def suggestion(name: str, known: Iterable[str]) -> str:
  """Return '; did you mean X?' for the known name that is nearest, '' if none is near."""
  near = difflib.get_close_matches(name, list(known), 1)
  return f'; did you mean {near[0]}?' if near else ''


def arrange(argv: list[str], config: str, renamed: Mapping[str, str]) -> list[str]:
  """Return argv with the path of the config first, as --config=FILE, as ml_collections expects.

  `config` is the default of --config, '' for a command without one. `renamed` maps former flags to
  their replacements.

  Raises:
    ValueError: if a flag was renamed, or there is no such config or no such key in it.
  """
  program, *rest = argv
  for arg in rest:
    flag = re.match(r'--?(?:no)?(\w+)', arg)
    if flag and flag[1] in renamed:
      raise ValueError(f'--{flag[1]} is no longer a flag: write {renamed[flag[1]]}')
  if not config:
    return argv
  others, remaining = [], iter(rest)
  for arg in remaining:
    flag, equals, value = arg.partition('=')
    if flag in ('--config', '-config'):
      config = value if equals else next(remaining, '')
    else:
      others.append(arg)
  config = _find(config)
  _check_keys(config, others)
  return [program, f'--config={config}', *others]


def instead(module: str, argv: Sequence[str], without: Collection[str], *added: str) -> str:
  """Return the command line that runs another module with these arguments but the flags `without`.

  `argv` are as `arrange` returned them; a word without a dash is the value of the flag before it.
  """
  kept, dropping = [], False
  for word in argv:
    if word.startswith('-'):
      name, _, value = word.lstrip('-').partition('=')
      dropping = name in without
      word = f'--config={_shown_file(value)}' if name == 'config' else word
    if not dropping:
      kept.append(word)
  return shlex.join(['python', '-m', module, *added, *kept])


def _find(config: str) -> str:
  """Return the path of a config: an existing FILE[:ARGUMENT], or the NAME of one of slm's own."""
  file, colon, argument = config.partition(':')
  path = Path(file)
  if path.is_file():
    return config
  known = sorted(p.stem for p in CONFIGS.glob('*.py') if p.stem != '__init__')
  if path.stem in known and str(path.parent) in ('.', 'configs') and path.suffix in ('', '.py'):
    return f'{CONFIGS / path.stem}.py{colon}{argument}'
  near = suggestion(path.stem, known)
  raise ValueError(f'--config={file}: no such file{near}; slm has {", ".join(known)}')


def _shown_file(config: str) -> str:
  """Return a config's file as a message names it: configs/NAME.py for slm's own."""
  path = Path(config.partition(':')[0])
  return f'configs/{path.name}' if path.parent == CONFIGS else str(path)


def _read(config: str) -> ConfigDict:
  return config_flags.ConfigFileFlagParser('config').parse(config)


def _check_keys(config: str, argv: list[str]) -> None:
  """Check that the config has every overridden key; suggest the nearest if not."""
  overrides = [match[1] for match in map(_OVERRIDE.match, argv) if match]
  keys = [key for key, _ in _flatten(_read(config))] if overrides else []
  for key in overrides:
    if not any(known == key or known.startswith(f'{key}.') for known in keys):
      same_name = [known for known in keys if known.rpartition('.')[2] == key.rpartition('.')[2]]
      near = f'; did you mean {" or ".join(same_name)}?' if same_name else suggestion(key, keys)
      raise ValueError(f'--config.{key}: {_shown_file(config)} has no such key{near}')


def _flatten(config: ConfigDict, prefix: str = '') -> Iterator[tuple[str, Any]]:
  """Yield every (dotted key, value) of a config."""
  for name, value in config.items():
    if isinstance(value, ConfigDict) and value:
      yield from _flatten(value, f'{prefix}{name}.')
    else:
      yield f'{prefix}{name}', value


def help_text(argv: list[str], keys: type | None) -> str:
  """Return the running command's docstring, its flags and the keys of its config, if it takes one.

  `keys` is the config's dataclass, whose comments say what its keys mean.
  """
  own = flags.FLAGS.flags_by_module_dict().get(argv[0], [])
  lines = [
    inspect.cleandoc(sys.modules['__main__'].__doc__ or ''),
    *(['', 'Flags:'] if own else []),
  ]
  for flag in own:
    name = f'--{flag.name}' if flag.boolean else f'--{flag.name}={_shown(flag.default)}'
    lines.append(_columns(name, flag.help.partition(';\n    repeat this option')[0]))
  if 'config' in flags.FLAGS:
    config = argv[1].partition('=')[2]
    values = _read(config)
    meanings = _meanings(keys, values.to_dict())
    summary = f'A config, by file or name; the keys below are those of {_shown_file(config)}.'
    lines += [_columns('--config=FILE', summary), '']
    for key, value in _flatten(values):
      lines.append(_columns(f'--config.{key}={_shown(value)}', meanings.get(key, '')))
  return '\n'.join(lines)


def _meanings(kind: type, values: Mapping[str, Any], prefix: str = '') -> dict[str, str]:
  """Return the comments of a dataclass' fields, and of its sections', by dotted key."""
  meanings = {f'{prefix}{name}': text for name, text in _comments(kind).items()}
  for name, section in schema.sections(kind, values).items():
    meanings |= _meanings(section, values[name], f'{prefix}{name}.')
  return meanings


def _shown(value: Any) -> str:
  """Format a default as on the command line."""
  if isinstance(value, list):  # of a flag that may be repeated
    return ','.join(map(str, value))
  return '' if value is None else str(value)


def _columns(left: str, right: str) -> str:
  text = f'  {left:38s} {" ".join(right.split())}'.rstrip()
  unbroken = {'break_long_words': False, 'break_on_hyphens': False}
  return textwrap.fill(text, 100, subsequent_indent=' ' * 41, **unbroken)


def _comments(kind: type) -> dict[str, str]:
  """Return the comment beside, or else above, each field of a dataclass."""
  comments, above = {}, []
  for line in inspect.getsource(kind).splitlines():
    if line.lstrip().startswith('# '):
      above.append(line.lstrip(' #'))
      continue
    if field := re.match(r'  (\w+): ', line):
      comments[field[1]] = line.partition('  # ')[2] or ' '.join(above)
    above = []
  return comments
