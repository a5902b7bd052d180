r"""The lm-evaluation-harness on a run, or on a directory of transformers, without a download.

    python -m slm.harness run --model=slm --model_args=pretrained=RUN --tasks=arc_easy

is the harness's own command with this model registered; from Python it is
`lm_eval.simple_evaluate(model=slm.inference.harness.SLM(RUN), tasks=[...])`. Its dependency is the
extra slm[eval].
"""

import sys

from slm.base import console

if __name__ == '__main__':
  try:
    from lm_eval.__main__ import cli_evaluate

    import slm.inference.harness  # noqa: F401  registers the model
  except ModuleNotFoundError as e:
    sys.exit(f"error: slm.harness needs lm_eval: pip install 'slm[eval]' ({e})")
  with console.one_line_errors():
    cli_evaluate()
