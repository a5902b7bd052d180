"""Build a small TFDS set of toy documents: python toy_tfds.py DATA_DIR."""

import sys

import numpy as np
import tensorflow_datasets as tfds
import toy


class ToyText(tfds.core.GeneratorBasedBuilder):
  """Documents with a name and a number."""

  VERSION = tfds.core.Version('1.2.0')

  def _info(self):
    text, number = tfds.features.Text(), tfds.features.Scalar(np.int32)
    features = tfds.features.FeaturesDict({'text': text, 'name': text, 'number': number})
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, manager):
    return {'train': self._generate_examples(200, 0), 'test': self._generate_examples(20, 1)}

  def _generate_examples(self, count, seed):
    for i, text in enumerate(toy.documents(list(toy.TOPICS), count, seed)):
      yield i, {'text': text, 'name': f'document {i}', 'number': i}


if __name__ == '__main__':
  config = tfds.download.DownloadConfig(num_shards=3)
  ToyText(data_dir=sys.argv[1], file_format='array_record').download_and_prepare(
    download_config=config
  )
  assert 'tensorflow' not in sys.modules
