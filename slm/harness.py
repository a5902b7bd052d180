r"""The lm-evaluation-harness on a run, or on a directory of transformers, without a download.

    python -m slm.harness run --model=slm --model_args=pretrained=RUN --tasks=arc_easy

is the harness's own command with this model registered; from Python it is
`lm_eval.simple_evaluate(model=slm.harness.SLM(RUN), tasks=[...])`. Needs the extra slm[eval].
"""

import sys

from slm.base import arguments, console

try:
  from lm_eval.__main__ import cli_evaluate

  from slm.inference.harness import SLM as SLM  # registers it too
except ModuleNotFoundError as e:
  if __name__ != '__main__':
    raise
  if arguments.HELP.intersection(sys.argv[1:]):  # the options are lm_eval's
    print(__doc__)
    sys.exit()
  sys.exit(f"error: slm.harness needs lm_eval: pip install 'slm[eval]' ({e})")

if __name__ == '__main__':
  with console.one_line_errors():
    cli_evaluate()
