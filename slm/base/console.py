"""The command line of every command: flags, one-line errors, progress."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import rich.console
import rich.progress
import rich.text
from absl import app, flags, logging
from ml_collections import config_flags

from slm.base import arguments, stage

_LONGEST = 2000  # characters of an error
_PLAIN_EVERY = 10.0  # seconds between lines when the output is a file


class Interrupted(BaseException):
  """Raised where SIGTERM or SIGINT stops a command."""

  def __init__(self, text: str = '', number: int = signal.SIGTERM):
    super().__init__(text)
    self.number = number


def run(
  main: Callable[[list[str]], Any],
  *,
  config: str = '',
  keys: type | None = None,
  positional: bool = False,
  renamed: Mapping[str, str] | None = None,
) -> None:
  """Run an absl main; bad input becomes one line on stderr and exit status 1.

  `config` is the default of --config ('': the command takes none) and `keys` its dataclass, whose
  comments --help shows. `renamed` maps former flags to their replacements.
  """
  with one_line_errors():
    if config:
      config_flags.DEFINE_config_file('config')
    sys.argv = arguments.arrange(sys.argv, config, renamed or {})
    if arguments.HELP.intersection(sys.argv[1:]):
      print(arguments.help_text(sys.argv, keys))
      return

  def guarded(argv: list[str]) -> Any:
    if not flags.FLAGS['verbosity'].present:
      logging.set_verbosity(logging.WARNING)  # libraries log every checkpoint at INFO
      # Errors that are logged with a traceback are raised too.
      logging.get_absl_logger().addFilter(lambda record: not record.exc_info)
    with one_line_errors():
      # For instance the False of `--flag False`, which absl reads as --flag.
      if len(argv) > 1 and not positional:
        raise ValueError(f'unexpected argument {argv[1]!r}; flags are --name=value')
      return main(argv)

  signal.signal(signal.SIGTERM, _interrupt)
  app.run(guarded, flags_parser=_parse)


def subcommand(argv: list[str], usages: Mapping[str, str]) -> tuple[str, list[str]]:
  """Return the subcommand of a command line and its positional arguments.

  `usages` names the positional arguments of every subcommand: optional ones in brackets, and a last
  one that ends with dots may be repeated.

  Raises:
    ValueError: if there is no such subcommand, or it takes another number of arguments.
  """
  name, *given = argv[1:] or ['']
  if name not in usages:
    near = arguments.suggestion(name, usages)
    raise ValueError(f'expected one of {", ".join(usages)}; found {name or "nothing"!r}{near}')
  wanted = usages[name].split()
  most = len(given) if usages[name].endswith('...') else len(wanted)
  if not sum(not arg.startswith('[') for arg in wanted) <= len(given) <= most:
    expected = usages[name] or 'flags alone'
    raise ValueError(f'{name}: expected {expected}; found {" ".join(given) or "nothing"}')
  return name, given


def required(*names: str) -> None:
  """Raise ValueError naming those of the flags that were not given."""
  missing = [f'--{name}' for name in names if flags.FLAGS[name].value in (None, '', [])]
  if missing:
    raise ValueError(f'expected {" and ".join(missing)} (see --help)')


def _interrupt(number: int, _: Any) -> None:
  raise Interrupted('', number)


def _parse(argv: list[str]) -> list[str]:
  with one_line_errors():
    return flags.FLAGS(argv)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
  """Turn errors of bad input into one line on stderr and exit status 1.

  So do SIGINT, with exit status 130, and SIGTERM, with 143.
  """
  try:
    yield
    sys.stdout.flush()
  except (Interrupted, KeyboardInterrupt) as e:
    number = getattr(e, 'number', signal.SIGINT)
    text = str(e) or '; '.join(['interrupted', *getattr(e, '__notes__', ())[-1:]])
    print(stage.named(text), file=sys.stderr)
    raise SystemExit(128 + number) from None
  except BrokenPipeError:  # the reader of the output, such as head, has gone
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at exit
    raise SystemExit(1) from None
  except (ValueError, OSError, FloatingPointError, flags.Error) as e:
    if sys.flags.dev_mode:  # python -X dev shows the traceback
      raise
    text = str(e)
    if isinstance(e, OSError) and e.strerror:  # without the number of the error
      text = f'{e.filename}: {e.strerror}' if e.filename else e.strerror
    if 'Traceback' in text:  # ml_collections wraps what a config file raised
      text = text.strip().splitlines()[-1]
    text = stage.named(' '.join(text.split()))
    if len(text) > _LONGEST:  # it quotes a file of something else
      text = f'{text[: _LONGEST // 2]} [...] {text[-_LONGEST // 2 :]}'
    print(f'error: {text}'.encode(errors='replace').decode(), file=sys.stderr)
    raise SystemExit(1) from None


def marked(parts: Iterable[tuple[str, bool]]) -> None:
  """Print a text from (part, mark): marked parts in colour, or between ⟦ and ⟧ in a file."""
  out, text = rich.console.Console(soft_wrap=True), rich.text.Text()
  for part, mark in parts:
    shown = f'⟦{part}⟧' if mark and not out.is_terminal else part
    text.append(shown, 'black on green' if mark else '')
  out.print(text, end='')


class Progress:
  """Counts work done; shows its share, rate, time left and the latest fields."""

  def __init__(self, description: str, total: float, unit: str, show: bool = True):
    """Describe work of `total` units (0: unknown)."""
    self._description, self._total, self._unit = description, total, unit
    self._show = show
    self._done, self._printed, self._info = 0.0, time.monotonic(), ''
    self._line = ''  # the latest one printed
    # Time and work at the first update; the rate leaves out compilation and earlier runs.
    self._clock: tuple[float, float] | None = None
    self._bar = None

  def __enter__(self) -> 'Progress':
    console = rich.console.Console(stderr=True)
    if self._show and console.is_terminal:
      self._bar = rich.progress.Progress(
        rich.progress.TextColumn('{task.description}'),
        rich.progress.BarColumn(bar_width=24),
        rich.progress.TaskProgressColumn(),
        rich.progress.TextColumn('{task.fields[info]}'),
        console=console,
      )
      self._bar.start()
      self._task = self._bar.add_task(self._description, total=self._total or None, info='')
    return self

  def __exit__(self, kind: type | None, *_: object) -> None:
    if self._bar:
      self._bar.stop()
    elif self._line and kind is None:
      self._print()  # the final state

  def skip(self, n: float) -> None:
    """Count work that was done earlier."""
    self._done += n

  def say(self, text: str) -> None:
    """Show what happens before the first unit is done."""
    if self._bar:
      self._bar.update(self._task, completed=self._done, info=text)
    elif self._show:
      print(f'{self._description}: {text}', file=sys.stderr, flush=True)

  def update(self, n: float, **fields: float | str) -> None:
    """Advance by n units and show the fields beside the bar."""
    self._done += n
    now = time.monotonic()
    self._clock = self._clock or (now, self._done)
    rate = (self._done - self._clock[1]) / max(now - self._clock[0], 1e-9)
    parts = [f'{name} {_short(value)}' for name, value in fields.items()]
    if rate:
      left = (self._total - self._done) / rate if self._total else 0.0
      parts = [f'{_short(rate)} {self._unit}/s', f'{duration(left)} left', *parts]
    self._info = '  '.join(parts)
    if self._bar:
      self._bar.update(self._task, completed=self._done, info=self._info)
    elif self._show and now - self._printed >= _PLAIN_EVERY:
      self._printed = now
      self._print()

  def _print(self) -> None:
    share = f'{100 * self._done / self._total:.0f}%' if self._total else _short(self._done)
    line, self._line = self._line, f'{self._description}: {share}  {self._info}'.rstrip()
    if line != self._line:
      print(self._line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
  """Format a time in the units that a reader needs, as 1.5 ms, 42 s, 3 min 05 s or 7 h 20 min."""
  minutes, rest = divmod(round(seconds), 60)
  if seconds > 0 and not (minutes or rest):
    return f'{1e3 * seconds:.3g} ms'
  if minutes < 60:
    return f'{minutes} min {rest:02d} s' if minutes else f'{rest} s'
  return f'{minutes // 60:,} h {minutes % 60:02d} min'


def _short(value: float | str) -> str:
  if isinstance(value, str):
    return value
  for size, suffix in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if abs(value) >= size:
      return f'{value / size:.1f}{suffix}'
  return f'{value:.4g}'
