"""Text to rows: `python -m slm.data.prepare --config=configs/data.py:SETS --out=DIR`.

SETS is `name=source,...` with one set named generic. A source is a glob of .jsonl or .txt files
(.gz or .zst too), a TFDS set that is on disk, `tfds:c4/en?split=train` (slm/data/tfds.py), or
`python:docs` or `python:licences`, optionally with `?max_mb=NUMBER`.
`name=source` is split by a hash of the document; `name.train=source,name.test=source` is not.
A training document whose exact text is held out, in any set, is dropped, and near-duplicates with
near_duplicates.
Without SETS: docstrings of Python and of what slm requires, and their licences as the domain.
"""

from ml_collections import config_dict

_PYTHON = 'generic=python:docs?max_mb=12,licences=python:licences'


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Describe the text to prepare; `arg` is SETS."""
  c = config_dict.ConfigDict()
  c.out = ''  # directory to write to (or --out)
  c.sets = _sets(arg or _PYTHON)  # set -> split -> source; split 'all' is split by hash
  c.tokenizer = dict(
    name='sentencepiece',  # sentencepiece | bytes | huggingface (the one at path)
    vocab=4096,  # pieces of a SentencePiece model trained on generic/train
    path='',  # a .model, a tokenizer.json or a folder with one to use, whatever the name
  )
  c.context = 256  # tokens in a row
  c.levels = (16, 64)  # numbers of clusters; coarser ones are unions of finer ones
  c.fit_windows = 20_000  # windows of generic/train that the clusters are fitted on
  c.dims = 64  # of a window's embedding by TF-IDF and SVD
  c.sbert = ''  # directory of a sentence-transformers model to embed windows with instead
  c.sizes = (20_000, 80_000)  # tokens of the nested specialisation sets of each domain
  c.text_field = 'text'  # field of a JSON line that holds the document
  c.id_field = ''  # field whose hash chooses the split; '' = the text's hash
  c.heldout = (0.05, 0.1)  # shares of documents for validation and test
  c.near_duplicates = 0.0  # drop training documents this similar (Jaccard, 0.8 say); 0: exact only
  c.workers = 0  # processes; 0 = one per usable core
  c.seed = 0  # of samples, clusters and nested sets
  return c


def _sets(arg: str) -> dict[str, dict[str, str]]:
  sets: dict[str, dict[str, str]] = {}
  for item in arg.split(','):
    key, equals, source = item.partition('=')
    name, _, split = key.partition('.')
    if not (equals and name and source):
      raise ValueError(
        f'configs/data.py: expected name=source or name.split=source, found {item!r}'
      )
    splits = sets.setdefault(name, {})
    if (split or 'all') in splits:
      raise ValueError(f'configs/data.py: {key} is given twice')
    splits[split or 'all'] = source
  return sets
