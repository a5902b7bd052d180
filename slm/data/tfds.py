"""Documents of a TensorFlow Datasets set on disk, read without TensorFlow.

A source is `tfds:NAME[/CONFIG][:VERSION]?split=train&data_dir=DIR`; without data_dir it is TFDS's
default. Nothing is downloaded: the set must have been built in a random-access format, `tfds build
NAME --file_format=array_record`.
"""

import re
import urllib.parse
from collections.abc import Iterator
from typing import Any

PREFIX = 'tfds:'


def expand(spec: str) -> dict[str, int]:
  """Return the shards of a split, as `SPEC#shard=I`, with their mean size in bytes.

  Raises:
    ValueError: if the set, the split or an option does not exist, or the format is not
      random-access.
  """
  builder, split = _open(spec)
  info = builder.info.splits[split]
  size = -(-int(info.num_bytes or 0) // info.num_shards)
  return {f'{spec}#shard={i}': size for i in range(info.num_shards)}


def read(path: str, text_field: str, id_field: str) -> Iterator[tuple[str, str]]:
  """Yield (text, id) of every document in a shard; id is '' without `id_field`."""
  spec, _, shard = path.partition('#shard=')
  builder, split = _open(spec)
  source = builder.as_data_source(split=f'{split}[{shard}shard]')
  for i in range(len(source)):
    example = source[i]
    for field in filter(None, (text_field, id_field)):
      if field not in example:
        raise ValueError(f'{spec}: no field {field!r}; examples have {", ".join(sorted(example))}')
    text = _decoded(example[text_field])
    if not isinstance(text, str):
      kind = type(text).__name__
      raise ValueError(f'{spec}: field {text_field!r} is {kind}, expected text')
    yield text, str(_decoded(example[id_field])) if id_field else ''


def _decoded(value: Any) -> Any:
  return value.decode('utf-8', 'replace') if isinstance(value, bytes) else value


def _open(spec: str) -> tuple[Any, str]:
  """Return the builder of the set that a spec names, and the name of the split."""
  # Imported here: it takes a second, and other sources do not need it.
  from tensorflow_datasets.core import file_adapters, read_only_builder, registered

  name, _, query = spec.removeprefix(PREFIX).partition('?')
  options = dict(urllib.parse.parse_qsl(query, strict_parsing=bool(query)))
  if not re.fullmatch(r'[\w/.-]+(:[\d.]+)?', name) or options.keys() - {'split', 'data_dir'}:
    raise ValueError(
      f'{spec}: expected tfds:NAME[/CONFIG][:VERSION], with ?split=SPLIT&data_dir=DIR as needed'
    )
  split = options.get('split', 'train')
  build = f'tfds build {name} --file_format=array_record'
  try:
    builder = read_only_builder.builder_from_files(name, data_dir=options.get('data_dir'))
  except (registered.DatasetNotFoundError, ValueError, FileNotFoundError):
    folder = options.get('data_dir', "TFDS's data directory")
    raise ValueError(f'{spec}: no such set in {folder}; make it with: {build}') from None
  if builder.info.file_format not in file_adapters.FileFormat.with_random_access():
    raise ValueError(
      f'{spec}: was built as {builder.info.file_format.value}, which has no random access; build '
      f'it again with: {build}'
    )
  if split not in builder.info.splits:
    raise ValueError(f'{spec}: no split {split!r}; there are: {", ".join(builder.info.splits)}')
  return builder, split
