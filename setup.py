"""Packaging only; settings of the tools live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r"__version__ = '(.+)'", (HERE / 'slm/__init__.py').read_text()).group(1)
LINES = (HERE / 'requirements.txt').read_text().splitlines()

setup(
  name='slm',
  version=VERSION,
  description='Small specialised language models in JAX',
  license='Apache-2.0',
  packages=find_packages(include=['slm', 'slm.*', 'configs']),
  python_requires='>=3.11',
  install_requires=[line for line in LINES if line and not line.startswith('#')],
  extras_require={
    'test': ['pytest==9.2.0', 'pytest-xdist==3.8.0', 'ruff==0.17.6'],
    'cuda': ['jax[cuda12]==0.10.2'],
    'tpu': ['jax[tpu]==0.10.2'],
    'hf': ['torch==2.13.0', 'transformers==5.23.0'],
    'gguf': ['gguf==0.19.0'],
    'eval': ['lm-eval==0.4.13'],
    'sbert': ['sentence-transformers==6.2.0'],
    # Other people's implementations.
    'reference': [
      'torch==2.13.0',
      'transformers==5.23.0',
      'data-selection==1.0.3',
      'sentence-transformers==6.2.0',
      'lm-eval==0.4.13',
      'accelerate==1.15.0',
      'gguf==0.19.0',
      'xllamacpp==2026.10.11549',
    ],
  },
)
