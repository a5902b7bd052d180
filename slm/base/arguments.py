"""Command lines: configs found by name, flags in any order, keys checked first, and --help."""

import ast
import difflib
import inspect
import io
import re
import sys
import textwrap
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from slm.base import schema

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'  # beside slm, also where it is installed
_HELP = {'-h', '-?', '-help', '--help', '--helpshort', '--helpfull'}
_OVERRIDE = re.compile(r'--?(?:no)?config\.([\w.]+)')


def suggestion(name: str, known: Iterable[str]) -> str:
  """Return '; did you mean X?' for the known name that is nearest, '' if none is near."""
  near = difflib.get_close_matches(name, list(known), 1)
  return f'; did you mean {near[0]}?' if near else ''


def arrange(argv: list[str], config: str, renamed: Mapping[str, str]) -> list[str]:
  """Return argv with --config=FILE first, which ml_collections asks for, and its file found.

  `config` is what a command takes if no --config is given, '' if it takes none. `renamed` maps the
  names of flags that there were to what is written instead.

  Raises:
    ValueError: if a flag was renamed, or there is no such config or no such key in it.
  """
  program, *rest = argv
  for flag in filter(None, (re.match(r'--?(?:no)?(\w+)', arg) for arg in rest)):
    if flag[1] in renamed:
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


def _find(config: str) -> str:
  """Return a config that is there: FILE[:ARGUMENT] as it is, or the NAME of one of slm's own."""
  file, colon, argument = config.partition(':')
  path = Path(file)
  if path.is_file():
    return config
  known = sorted(p.stem for p in CONFIGS.glob('*.py') if p.stem != '__init__')
  if path.stem in known and str(path.parent) in ('.', 'configs') and path.suffix in ('', '.py'):
    return f'{CONFIGS / path.stem}.py{colon}{argument}'
  near = suggestion(path.stem, known)
  raise ValueError(f'--config={file}: no such file{near}; slm brings {", ".join(known)}')


def _shown_file(config: str) -> str:
  """Return a config's file, without the place of those that come with slm."""
  path = Path(config.partition(':')[0])
  return f'configs/{path.name}' if path.parent == CONFIGS else str(path)


def _read(config: str) -> ConfigDict:
  return config_flags.ConfigFileFlagParser('config').parse(config)


def _check_keys(config: str, argv: list[str]) -> None:
  """Refuse an override of a key that the config lacks, naming the nearest that it has."""
  overrides = [match[1] for match in map(_OVERRIDE.match, argv) if match]
  values = _read(config) if overrides else ConfigDict()
  for key in overrides:
    node = values
    for name in key.split('.'):
      if not isinstance(node, ConfigDict) or name not in node:
        keys = [known for known, _ in _flatten(values)]
        moved = [known for known in keys if known.rpartition('.')[2] == key.rpartition('.')[2]]
        near = f'; did you mean {" or ".join(moved)}?' if moved else suggestion(key, keys)
        raise ValueError(f'--config.{key}: {_shown_file(config)} has no such key{near}')
      node = node[name]


def _flatten(config: ConfigDict, prefix: str = '') -> Iterator[tuple[str, Any]]:
  """Yield every (dotted key, value) of a config."""
  for name, value in config.items():
    if isinstance(value, ConfigDict) and value:
      yield from _flatten(value, f'{prefix}{name}.')
    else:
      yield f'{prefix}{name}', value


def wants_help(argv: list[str]) -> bool:
  """Say whether an argument asks for help."""
  return bool(_HELP.intersection(argv[1:]))


def help_text(argv: list[str], keys: type | None) -> str:
  """Return the running command's docstring, its flags and the keys of its config, if it takes one.

  `keys` is the config's dataclass, whose comments say what its keys mean.
  """
  lines = [inspect.cleandoc(sys.modules['__main__'].__doc__ or ''), '', 'Flags:']
  for flag in flags.FLAGS.flags_by_module_dict().get(argv[0], []):
    name = f'--{flag.name}' if flag.boolean else f'--{flag.name}={_shown(flag.default)}'
    lines.append(_columns(name, flag.help.partition(';\n    repeat this option')[0]))
  if 'config' in flags.FLAGS:
    config = argv[1].partition('=')[2]
    values = _read(config)
    meanings = _meanings(keys, values.to_dict())
    about = f'A config, by file or by name; the keys below are those of {_shown_file(config)}.'
    lines += [_columns('--config=FILE', about), '']
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
  """Return a default as it is written on the command line."""
  if isinstance(value, list):  # of a flag that may be repeated
    return ','.join(map(str, value))
  return '' if value is None else str(value)


def _columns(left: str, right: str) -> str:
  text = f'  {left:38s} {" ".join(right.split())}'.rstrip()
  return textwrap.fill(text, 100, subsequent_indent=' ' * 41, break_long_words=False,
                       break_on_hyphens=False)  # fmt: skip


def _comments(kind: type) -> dict[str, str]:
  """Return the comment beside, or else above, each field of a dataclass."""
  source = textwrap.dedent(inspect.getsource(kind))
  beside, above = {}, {}
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type == tokenize.COMMENT:
      alone = token.line.lstrip().startswith('#')
      (above if alone else beside)[token.start[0]] = token.string.lstrip('# ')

  def note(line: int) -> str:
    first = line
    while first - 1 in above:
      first -= 1
    return beside.get(line) or ' '.join(above[i] for i in range(first, line))

  fields = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.AnnAssign))
  return {ast.unparse(field.target): note(field.lineno) for field in fields}
