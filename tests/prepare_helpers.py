"""Small corpora and a stand-in for the text encoder, for the tests of data preparation."""
import csv
import hashlib

import numpy as np
import soundfile

RATE = 16000


class FakeEncoder:
  """Embeddings whose last bits depend on what else is in the batch, only much more so than a real encoder's."""
  name, width = 'fake', 8

  def __init__(self, weights_hash='0123456789abcdef'):
    self.weights_hash = weights_hash
    self.calls = []

  def __call__(self, texts):
    self.calls.append(list(texts))
    seed = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) for text in texts]
    rows = [np.random.default_rng(s).standard_normal(self.width) for s in seed]
    return np.asarray(rows, np.float32) + np.float32(0.01 * len(texts))


def noise(seconds, rate=RATE, seed=0, channels=1):
  wave = 0.1 * np.random.default_rng(seed).standard_normal((int(seconds * rate), channels))
  return wave if channels > 1 else wave[:, 0]


def write_manifest(path, rows, columns=('file_name', 'caption', 'label', 'split')):
  with open(path, 'w', newline='', encoding='utf-8') as f:
    table = csv.writer(f)
    table.writerow(columns)
    table.writerows(rows)
  return path


def corpus(folder, count, seconds=0.1):
  """`count` wav files with two captions each, and their manifest."""
  folder.mkdir(parents=True, exist_ok=True)
  rows = []
  for i in range(count):
    soundfile.write(folder / f'{i}.wav', noise(seconds, seed=i), RATE)
    rows += [(f'{i}.wav', f'sound number {i}', f'c{i % 3}'), (f'{i}.wav', f'kind {i % 5}', f'c{i % 3}')]
  return write_manifest(folder / 'manifest.csv', rows, ('file_name', 'caption', 'label'))


def contents(folder):
  """{file name: bytes} of a data folder."""
  return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
