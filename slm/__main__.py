"""`slm COMMAND ...` is `python -m slm.COMMAND ...`; `slm` alone lists the commands."""

import runpy
import sys

import slm
from slm.base import arguments, console


@console.one_line_errors()
def main() -> None:
  """Run the command that the first argument names."""
  name, known = (sys.argv[1:] or ['--help'])[0], arguments.commands()
  if name == '--version':
    print(f'slm {slm.__version__}')
  elif name in ('-h', '--help', 'help'):
    lines = [f'{slm.__doc__}\n', 'slm COMMAND --help shows the flags of a command:\n']
    print('\n'.join([*lines, *(f'  {name:18s} {line}' for name, line in known.items())]))
  elif name in known:
    del sys.argv[1]
    runpy.run_module(f'slm.{name}', run_name='__main__', alter_sys=True)
  else:
    near = arguments.suggestion(name, known)
    sys.exit(f'error: slm has no command {name!r}{near or "; slm --help lists them"}')


if __name__ == '__main__':
  main()
