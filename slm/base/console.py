"""What every entry point shares: one-line errors and progress."""

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import rich.console
import rich.progress
from absl import app, flags, logging
from ml_collections import config_flags

from slm.base import arguments

_PLAIN_EVERY = 10.0  # seconds between lines when the output is a file


class Interrupted(BaseException):
  """A command was asked to stop, by a signal: SIGTERM or SIGINT."""

  def __init__(self, text: str = '', number: int = signal.SIGTERM):
    super().__init__(text)
    self.number = number


def run(
  main: Callable[[list[str]], Any], *, config: str = '', keys: type | None = None,
  positional: bool = False,
  renamed: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
  """Run an absl main; bad input becomes one line on stderr and exit status 1.

  A command with a `config`, the default, takes --config and --config.KEY, whose comments in the
  dataclass `keys` --help shows. `renamed` maps the flags
  that there were to what is written instead.
  """
  with one_line_errors():
    if config:
      config_flags.DEFINE_config_file('config')
    sys.argv = arguments.arrange(sys.argv, config, renamed or {})
    if arguments.wants_help(sys.argv):
      print(arguments.help_text(sys.argv, keys))
      return

  def guarded(argv: list[str]) -> Any:
    if not flags.FLAGS['verbosity'].present:
      logging.set_verbosity(logging.WARNING)  # libraries log every checkpoint at INFO
      # What is logged with a traceback is raised too, and becomes one line.
      logging.get_absl_logger().addFilter(lambda record: not record.exc_info)
    with one_line_errors():
      # Such as the False of `--flag False`, which absl reads as --flag.
      if len(argv) > 1 and not positional:
        raise ValueError(f'unexpected argument {argv[1]!r}; flags are --name=value')
      return main(argv)

  signal.signal(signal.SIGTERM, _interrupt)
  app.run(guarded, flags_parser=_parse)


def required(*names: str) -> None:
  """Refuse flags that were left out.

  Raises:
    ValueError: naming them.
  """
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
  """Turn the errors that bad input raises into one line on stderr and exit status 1.

  SIGINT becomes a line and exit status 130, SIGTERM 143.
  """
  try:
    yield
  except (Interrupted, KeyboardInterrupt) as e:
    number = getattr(e, 'number', signal.SIGINT)
    print(str(e) or '; '.join(['interrupted', *getattr(e, '__notes__', ())[-1:]]))
    raise SystemExit(128 + number) from None
  except (ValueError, OSError, FloatingPointError, flags.Error) as e:
    if sys.flags.dev_mode:  # python -X dev shows the traceback
      raise
    text = e.strerror if isinstance(e, OSError) and e.strerror and not e.filename else str(e)
    if 'Traceback' in text:  # ml_collections wraps what a config file raised
      text = text.strip().splitlines()[-1]
    print(f'error: {" ".join(text.split())}', file=sys.stderr)
    raise SystemExit(1) from None


class Progress:
  """Counts work done; shows rate, share, time left and the latest fields."""

  def __init__(self, description: str, total: float, unit: str, show: bool = True):
    self._description, self._total, self._unit = description, total, unit
    self._show = show
    self._done, self._printed, self._info = 0.0, time.monotonic(), ''
    self._line = ''  # the latest one printed
    # When the first unit was done and what was then: what comes before is compiled in, or done by
    # an earlier run, and says nothing of the rate.
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
      self._print()  # where it ended

  def skip(self, n: float) -> None:
    """Count work that an earlier run did."""
    self._done += n

  def say(self, text: str) -> None:
    """Show what is done before the first unit is."""
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
    left = (self._total - self._done) / rate if self._total and rate else 0.0
    pace = [f'{_short(rate)} {self._unit}/s', f'{left:.0f} s left'] if rate else []
    self._info = '  '.join([*pace, *(f'{k} {_short(v)}' for k, v in fields.items())])
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


def progress(description: str, total: float, unit: str, show: bool = True) -> Progress:
  """Open a progress display; `total` 0 means unknown."""
  return Progress(description, total, unit, show)


def _short(value: float | str) -> str:
  if isinstance(value, str):
    return value
  for size, suffix in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if abs(value) >= size:
      return f'{value / size:.1f}{suffix}'
  return f'{value:.4g}'
