"""Caption embeddings that were computed elsewhere: from the list of captions to a model that is trained on them."""
import hashlib
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import m2d_clap_jax
from m2d_clap_jax.data.read import Folder
from m2d_clap_jax.data.vectors import Vectors
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.train import pretrain
from tests.command_helpers import run
from tests.prepare_helpers import corpus
from tests.test_pretrain import get_config, one_device, tiny_config  # noqa: F401

NAME = 'nvidia/NV-Embed-v2'


def vector(caption, width):
  seed = int.from_bytes(hashlib.sha256(caption.encode()).digest()[:4])
  return np.random.default_rng(seed).standard_normal(width).astype(np.float16)


def save(path, captions, width=12, encoder=NAME):
  """Vectors of captions as people write them: with a type of their own, in groups of rows."""
  vectors = np.stack([vector(caption, width) for caption in captions])
  if path.suffix == '.npz':
    np.savez(path, caption=np.array(captions), vector=vectors, encoder=encoder)
  else:
    table = pyarrow.table({'caption': captions, 'vector': list(vectors), 'encoder': [encoder] * len(captions)})
    pyarrow.parquet.write_table(table, path, row_group_size=3)
  return path


def prepared(place, *options):
  return run('prepare', f'--manifest={place}/audio/manifest.csv', f'--out={place}/out', '--workers=1', *options)


@pytest.fixture
def place(tmp_path):
  """9 clips with two captions each; captions.txt lists them."""
  corpus(tmp_path / 'audio', 9)
  assert run('captions', tmp_path / 'audio' / 'manifest.csv', '-o', tmp_path / 'captions.txt') == 0
  return tmp_path


def listed(place):
  return (place / 'captions.txt').read_text().splitlines()


def test_each_caption_is_listed_once_with_those_made_from_labels(place, tmp_path):
  assert sorted(listed(place)) == sorted([f'sound number {i}' for i in range(9)] + [f'kind {i}' for i in range(5)])
  (tmp_path / 'audio' / 'labels.csv').write_text('name,what\n0.wav,"dog,rain"\n1.wav,cat\n2.wav,cat\n')
  options = '--columns=file_name:name,label:what', '-o', tmp_path / 'made.txt'
  assert run('captions', tmp_path / 'audio' / 'labels.csv', *options) == 0
  assert (tmp_path / 'made.txt').read_text() == 'The sound of dog, and rain.\nThe sound of cat.\n'


@pytest.mark.parametrize('kind', ['npz', 'parquet'])
def test_the_records_have_the_vectors_and_the_folder_tells_whose(kind, place):
  captions = listed(place)
  np.random.default_rng(0).shuffle(captions)
  file = save(place / f'vectors.{kind}', ['of something else', *captions])
  assert prepared(place, f'--caption_embeddings={file}') == 0
  folder = Folder(place / 'out')
  assert folder.meta['text_encoder'] == {'name': NAME, 'hash': None, 'width': 12}
  assert folder.split('train').num_clips == 9 and not (place / 'out' / 'missing_captions.txt').exists()
  for clip in folder.split('train').clips(range(9)):
    assert len(clip.captions) == 2
    np.testing.assert_array_equal(clip.caption_embeddings, np.stack([vector(text, 12) for text in clip.captions]))


def test_clips_without_a_vector_are_rejected_and_written_once_there_is_one(place, capsys):
  first = save(place / 'first.parquet', [text for text in listed(place) if text not in ('kind 0', 'sound number 1')])
  assert prepared(place, f'--caption_embeddings={first}') == 0
  notice = capsys.readouterr().err
  assert '2 of 14 captions have no vector' in notice and 'their 3 clips are rejected' in notice
  assert sorted((place / 'out' / 'missing_captions.txt').read_text().splitlines()) == ['kind 0', 'sound number 1']
  meta = json.loads((place / 'out' / 'prepare.json').read_text())['splits']['train']
  assert (meta['clips'], meta['rejected'], meta['rejected_rows'], meta['rows']) == (6, 3, 6, 18)
  assert "1.wav,no vector of its caption 'sound number 1'" in (place / 'out' / 'rejected.csv').read_text()
  more = save(place / 'more.npz', ['kind 0', 'sound number 1'])
  assert prepared(place, f'--caption_embeddings={first}', f'--caption_embeddings={more}') == 0
  assert Folder(place / 'out').split('train').num_clips == 9 and not (place / 'out' / 'missing_captions.txt').exists()


def test_vectors_are_found_in_any_order(tmp_path):
  captions = [f'caption {i}' for i in range(3000)]
  vectors = Vectors([str(save(tmp_path / 'a.parquet', captions[:2500])), str(save(tmp_path / 'b.npz', captions[2400:]))])
  for _ in range(5):
    asked = np.random.default_rng(1).choice(captions, 50).tolist()
    np.testing.assert_array_equal(vectors(asked), np.stack([vector(text, 12) for text in asked]))
  assert 'caption 3000' not in vectors and sorted(captions, key=vectors.order) == captions


def test_files_that_do_not_fit_are_told_in_one_line(place, capsys):
  good = save(place / 'good.npz', ['a'])
  np.savez(place / 'short.npz', caption=np.array(['a', 'b']), vector=np.zeros((1, 4)), encoder='x')
  np.savez(place / 'part.npz', caption=np.array(['a']), vector=np.zeros((1, 4)))
  np.savez(place / 'pickle.npz', caption=np.array(['a'], object), vector=np.zeros((1, 4)), encoder='x')
  (place / 'bad.parquet').write_bytes(b'PAR1 and nothing else')
  pyarrow.parquet.write_table(pyarrow.table({'caption': ['a', 'b'], 'vector': [[1.0], [1.0, 2.0, 3.0]], 'encoder': ['x', 'x']}),
                              place / 'ragged.parquet')
  pyarrow.parquet.write_table(pyarrow.table({'caption': ['a', 'b'], 'vector': [[1.0], [2.0]], 'encoder': ['x', 'y']}),
                              place / 'two.parquet')
  for files, told in [(['short.npz'], r'[2] captions and vectors [1, 4]'), (['part.npz'], 'has no encoder'),
                      (['pickle.npz'], 'does not contain captions'), (['bad.parquet'], 'does not contain captions'),
                      (['ragged.parquet'], 'of lengths [1, 3]'), (['two.parquet'], 'x, y, not one name'),
                      (['nowhere.npz'], 'cannot be read'), (['good.txt'], 'unknown kind of file'),
                      ([good.name, save(place / 'other.npz', ['b'], encoder='other').name], 'give files of one encoder')]:
    assert prepared(place, *(f'--caption_embeddings={place / file}' for file in files)) == 2
    error = capsys.readouterr().err
    assert told in error and error.count('\n') == 1, error
  assert prepared(place, f'--caption_embeddings={good}', '--text_encoder=minilm') == 2
  assert 'leave one of them out' in capsys.readouterr().err


def test_a_model_of_such_captions_is_trained_through_a_linear_layer_and_says_that_its_encoder_does_not_run_here(place):
  assert prepared(place, f'--caption_embeddings={save(place / "nv.parquet", listed(place), 4096)}') == 0
  published = get_config('clap2025')
  assert (published.seed, published.model.audio_projector, published.model.text_width) == (7, 'semantic', 4096)
  config = tiny_config(place / 'out', batch_size=8, steps=2, **{'model.text_width': published.model.text_width})
  pretrain.run(config, place / 'run')
  model = m2d_clap_jax.load(place / 'run')
  assert model.weights.trees['params']['text_proj/kernel'].shape == (4096, 32)
  assert model.encode_audio(np.zeros(16000, np.float32)).shape == (1, 32)
  with pytest.raises(UserError, match='NV-Embed-v2: is a Mistral of 7 billion parameters, and only BERT .* runs here'):
    model.encode_text(['a dog'])
  config.evals.sounds = {'kind': 'zeroshot', 'split': 'train'}
  with pytest.raises(UserError, match='only BERT .* runs here'):
    pretrain.run(config, place / 'again')
