"""MTEB's protocol: its own check passes, and local tasks give the scores of this package's evaluators."""
import io
import json

import numpy as np
import pytest
import soundfile

import m2d_clap_jax
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.eval import metrics
from m2d_clap_jax.eval.finished import evaluate
from m2d_clap_jax.weights.portable import save_portable
from tests.test_api import arpeggio, tiny_weights
from tests.test_eval_run import LABELS, sound

mteb = pytest.importorskip('mteb', reason="needs mteb: pip install -e '.[mteb]'")
maeb = pytest.importorskip('m2d_clap_jax.maeb')
datasets = pytest.importorskip('datasets')
COUNT = 24


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """24 recordings of three sounds, half a second each, as files; model/ is a random model."""
  folder = tmp_path_factory.mktemp('maeb')
  rows = ['file_name,label,caption,split']
  for i in range(COUNT):
    soundfile.write(folder / f'{i}.flac', sound(LABELS[i % 3], i), 16000)
    rows.append(f'{i}.flac,{LABELS[i % 3]},sound {i} is a {LABELS[i % 3]},test')
  (folder / 'task.csv').write_text('\n'.join(rows) + '\n')
  save_portable(tiny_weights(patch_size=(16, 16)), folder / 'model')
  return folder


@pytest.fixture(scope='module')
def encoder(root):
  return maeb.Encoder(str(root / 'model'))


def recordings(root):
  """A column of audio files, as data sets of the Hub have it."""
  table = datasets.Dataset.from_dict({'audio': [str(root / f'{i}.flac') for i in range(COUNT)]})
  return table.cast_column('audio', datasets.Audio())


def metadata(kind, name, category, score):
  return mteb.TaskMetadata(
      type=kind, name=name, category=category, main_score=score, modalities=['audio', 'text'], description='Of this test.',
      reference=None, dataset={'path': 'none', 'revision': 'none'}, eval_splits=['test'], eval_langs=['eng-Latn'], date=None,
      domains=[], task_subtypes=[], license=None, annotations_creators=None, dialect=[], sample_creation=None,
      bibtex_citation='')


def zero_shot_task(root):
  from mteb.abstasks.zeroshot_classification import AbsTaskZeroShotClassification as Base

  class ZeroShot(Base):
    metadata = globals()['metadata']('AudioZeroshotClassification', 'LocalZeroShot', 'a2t', 'accuracy')
    input_column_name = 'audio'

    def load_data(self, **_):
      table = recordings(root).add_column('label', [i % 3 for i in range(COUNT)])
      self.dataset, self.data_loaded = datasets.DatasetDict({'test': table}), True

    def get_candidate_labels(self):
      return [f'{label.replace("_", " ")} can be heard' for label in LABELS]
  return ZeroShot()


def retrieval_task(root):
  from mteb.abstasks.retrieval import AbsTaskRetrieval as Base

  class Retrieval(Base):
    metadata = globals()['metadata']('Any2AnyRetrieval', 'LocalRetrieval', 't2a', 'hit_rate_at_5')

    def load_data(self, **_):
      names = [str(i) for i in range(COUNT)]
      captions = [f'sound {i} is a {LABELS[i % 3]}' for i in range(COUNT)]
      self.corpus = {'test': recordings(root).add_column('id', names)}
      self.queries = {'test': datasets.Dataset.from_dict({'id': names, 'text': captions})}
      self.relevant_docs = {'test': {name: {name: 1} for name in names}}
      self.data_loaded = True
  return Retrieval()


def scores(encoder, task):
  return mteb.evaluate(encoder, task, cache=None, show_progress_bar=False).task_results[0].scores['test'][0]


def own(root, workdir, job):
  data = {'root': str(root), 'seconds': 0.5 if job == 'zeroshot' else None}
  evaluate(str(workdir), job=job, task='task', init=str(root / 'model'), data=data, seed=0, model={}, protocol={})
  return json.loads((workdir / 'results.json').read_text())


def test_a_local_zero_shot_task_gives_the_score_of_our_evaluator(root, encoder, tmp_path):
  expected = own(root, tmp_path, 'zeroshot')['score']
  assert scores(encoder, zero_shot_task(root))['accuracy'] == expected
  assert round(expected * COUNT) == pytest.approx(expected * COUNT) and 0 < expected < 1


def test_a_local_retrieval_task_gives_the_scores_of_our_evaluator(root, encoder, tmp_path):
  expected, found = own(root, tmp_path, 'retrieval')['text_to_audio'], scores(encoder, retrieval_task(root))
  for k in (1, 5, 10):
    assert found[f'hit_rate_at_{k}'] == pytest.approx(expected[f'R@{k}'], abs=1e-5)
  assert 0 < expected['R@5'] < 1


def test_mtebs_own_check_runs_all_ten_tasks_of_audio(encoder):
  pytest.importorskip('torchcodec', reason='the check makes its recordings with torchcodec, which needs FFmpeg',
                      exc_type=(ImportError, RuntimeError, OSError))
  from mteb.mocks import ALL_MOCK_TASK_TEST_GRID as grid
  audio = [task for task in grid if 'audio' in task.metadata.modalities and set(task.metadata.modalities) <= {'audio', 'text'}]
  results = mteb.evaluate(encoder, audio, cache=None, show_progress_bar=False, raise_error=False)
  assert not results.exceptions and len(results.task_results) == len(audio) >= 10
  assert all(np.isfinite(result.get_score()) for result in results.task_results)


def encode(encoder, modalities, **columns):
  """What `encode` gives for a data set with these columns."""
  from types import SimpleNamespace

  from torch.utils.data import DataLoader
  table = datasets.Dataset.from_dict(columns)
  if 'audio' in columns:
    table = table.cast_column('audio', datasets.Audio())
  return encoder.encode(DataLoader(table), task_metadata=SimpleNamespace(modalities=modalities), hf_split='test',
                        hf_subset='default')


def test_each_kind_of_task_is_given_its_embeddings_and_long_audio_is_averaged_over_windows(root, encoder, tmp_path):
  wave = arpeggio(44100)
  soundfile.write(tmp_path / 'long.wav', np.stack([wave, wave], 1), 44100, 'FLOAT')
  files = [str(tmp_path / 'long.wav'), str(root / '0.flac')]
  pipeline = m2d_clap_jax.load(str(root / 'model'))
  features, clap = pipeline.embed(files), pipeline.encode_audio(files)
  text = pipeline.encode_text(['a dog', 'rain'])
  np.testing.assert_array_equal(encode(encoder, ['audio'], audio=files), features)
  np.testing.assert_array_equal(encode(encoder, ['audio', 'text'], audio=files), clap)
  np.testing.assert_array_equal(encode(encoder, ['audio', 'text'], text=['a dog', 'rain']), text)
  both = encode(encoder, ['audio', 'text'], audio=files, text=['a dog', 'rain'])
  np.testing.assert_allclose(both, metrics.normalise(clap) + metrics.normalise(text), atol=1e-6)


def wav(wave) -> bytes:
  file = io.BytesIO()
  soundfile.write(file, wave, 16000, format='WAV')
  return file.getvalue()


def test_a_clip_of_nothing_is_silence_a_sample_is_a_clip_and_a_damaged_one_is_named(encoder):
  def rows(*contents):
    return encode(encoder, ['audio'], audio=[{'bytes': data, 'path': f'{i}.wav'} for i, data in enumerate(contents)])
  pytest.importorskip('torchcodec', reason='data sets of recordings in memory are made with it', exc_type=(
      ImportError, RuntimeError, OSError))
  nothing, empty, zero, sample = rows(wav([]), b'', wav([0.0]), wav([0.5]))
  np.testing.assert_array_equal(nothing, zero)
  np.testing.assert_array_equal(empty, zero)
  assert np.isfinite(sample).all() and np.abs(sample - zero).max() > 1e-4
  with pytest.raises(UserError, match=r'0\.wav: is cut off'):
    rows(wav(arpeggio(16000))[:9999])


def test_results_are_filed_under_the_weights_and_models_without_captions_are_for_audio_alone(root, encoder):
  about = encoder.mteb_model_meta
  assert (about.name, about.revision) == ('m2d-clap-jax/model', encoder.pipeline.fingerprint)
  assert about.framework == ['JAX'] and about.modalities == ['audio', 'text'] and about.embed_dim == [96, 480]
  assert isinstance(encoder, mteb.models.EncoderProtocol)
  without = maeb.Encoder(m2d_clap_jax.load(tiny_weights(text_width=None)))
  assert without.mteb_model_meta.modalities == ['audio'] and without.mteb_model_meta.embed_dim == [480]
  with pytest.raises(ValueError, match='none overlap|supports'):
    scores(without, zero_shot_task(root))
