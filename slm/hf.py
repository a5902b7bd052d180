r"""Import a model of `transformers`, or export a run as one.

    python -m slm.hf import HF_DIR RUN
    python -m slm.hf export RUN HF_DIR [--dtype=bfloat16]
    python -m slm.hf verify HF_DIR [OTHER_HF_DIR or RUN] [--tolerance=1e-4]
    python -m slm.hf card HF_DIR [--licence=apache-2.0]

`verify` compares logits and token ids with transformers, and with a second directory or a run. It
needs transformers, the extra slm[hf].
"""

from pathlib import Path

from absl import flags

from slm.base import console
from slm.interchange import card, convert, verify

USAGES = {
  'import': 'HF_DIR RUN',
  'export': 'RUN HF_DIR',
  'verify': 'HF_DIR [OTHER]',
  'card': 'HF_DIR',
}


def main(argv: list[str]) -> None:
  """Run the command."""
  command, paths = console.subcommand(argv, USAGES)
  f = flags.FLAGS
  if command == 'import':
    cfg = convert.import_model(*paths)
    for line in convert.remarks(paths[1]):
      print(line)
    print(f'{paths[1]}: {cfg.hf["config"]["model_type"]}, ready to use as a run')
  elif command == 'export':
    about = convert.export_model(*paths, dtype=f.dtype)
    print(
      f'{paths[1]}: {about["family"]}, {about["total_parameters"]:,} parameters in '
      f'{about["dtype"]}, tokenizer: {", ".join(about["tokenizer"]) or "none"}'
    )
  elif command == 'card':
    print(card.write(Path(paths[0]), f.licence))
  else:
    worst = verify.verify(paths, f.tolerance)
    if worst > f.tolerance:
      raise ValueError(f'largest difference {worst:.3g} is above --tolerance={f.tolerance:g}')


if __name__ == '__main__':
  flags.DEFINE_string('dtype', '', 'export: float32 | bfloat16 | float16; default: as imported.')
  flags.DEFINE_float('tolerance', 1e-4, 'verify: allowed difference of logits over the largest.')
  flags.DEFINE_string('licence', '', 'card: SPDX identifier of the licence, if you may choose it.')
  console.run(main, positional=True)
