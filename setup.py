"""Packaging only; settings of the tools live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r"__version__ = '(.+)'", (HERE / 'slm/__init__.py').read_text()).group(1)

setup(
  name='slm',
  version=VERSION,
  description='Small specialised language models in JAX',
  long_description=(HERE / 'README.md').read_text(),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  packages=find_packages(include=['slm', 'slm.*', 'configs']),
  package_data={'slm.reporting': ['*.csv']},
  entry_points={'console_scripts': ['slm = slm.__main__:main']},
  python_requires='>=3.11',
  # The oldest are those of requirements.txt, what every committed number was measured with. Seen
  # passing: Python 3.11 with jax 0.10.2, 3.12 with jax 0.11.2, and with jax 0.12.0.1.
  install_requires=[
    'absl-py>=2.5',
    'array-record>=0.8.6',
    'datasketch>=2.0',
    'etils[epath]>=1.15',
    'flax>=0.12.8',
    'grain>=0.2.18',
    'jax>=0.10.2',
    'jinja2>=3.1.6',
    'matplotlib>=3.11',
    'ml-collections>=1.1',
    'numpy>=2.4',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12.8',
    'packaging',
    'pyyaml>=6',
    'rich>=15',
    'safetensors>=0.8',
    'scikit-learn>=1.9',
    'scipy>=1.17',
    'sentencepiece>=0.2.3',
    'tensorboardX>=2.6.5',
    'tensorflow-datasets>=4.9.10',
    'threadpoolctl>=3.8',
    'tokenizers>=0.23',
    'zstandard>=0.25',
  ],
  extras_require={
    'cuda': ['jax[cuda12]>=0.10.2'],
    'tpu': ['jax[tpu]>=0.10.2'],
    'hf': ['torch>=2.13', 'transformers>=5.23'],
    'gguf': ['gguf>=0.19'],
    'eval': ['lm-eval>=0.4.13'],
    # Requires a protobuf before 7; what that takes away is in docs/data.md.
    'beam': ['apache-beam>=2.77'],
    # Verifiers. SymPy reads LaTeX by the grammar of one version of antlr4 alone.
    'rl': [
      'antlr4-python3-runtime==4.11.*',
      'jsonschema>=4.26',
      'langdetect>=1.0.9',
      'math-verify>=0.9',
      'reasoning-gym>=0.1.25',
      'sympy>=1.14',
    ],
    # Data and runs at gs:// addresses; s3fs and adlfs read data at s3:// and az://.
    'gcs': ['gcsfs>=2026.9'],
    'sbert': ['sentence-transformers>=6.2'],
    # Writers of metrics.
    'wandb': ['wandb>=0.31'],
    'mlflow': ['mlflow>=3.17'],
    'trackio': ['trackio>=0.43'],
    # Exact, as requirements.txt is: what lints and tests.
    'test': [
      'gcsfs==2026.10.1',
      'hypothesis==6.170.17',
      'pytest==9.2.0',
      'pytest-xdist==3.8.0',
      'ruff==0.17.6',
    ],
    # Other people's implementations.
    'reference': [
      'torch==2.13.0',
      'transformers==5.23.0',
      'data-selection==1.0.3',
      'sentence-transformers==6.2.0',
      'lm-eval[ifeval,math]==0.4.13',
      'accelerate==1.15.0',
      'gguf==0.19.0',
      'jsonschema==4.26.0',
      'langdetect==1.0.9',
      'math-verify==0.9.0',
      'kubeflow-trainer-api==2.3.0',
      'trl==1.16.0',
      'xllamacpp==2026.10.11549',
    ],
  },
)
