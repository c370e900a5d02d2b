"""Everything in a bucket: data, workdirs, models and outputs, against a local server of Cloud Storage's interface."""
import io
import json
import os
import signal

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

import m2d_clap_jax
from m2d_clap_jax import paths
from m2d_clap_jax.audio import decode
from m2d_clap_jax.data import prepare
from m2d_clap_jax.data.batches import TrainingBatches, embeddings
from m2d_clap_jax.data.read import Folder
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.eval.finished import evaluate
from m2d_clap_jax.tasks import clips
from m2d_clap_jax.tasks.metadata import open_task
from m2d_clap_jax.train import finetune, pretrain
from m2d_clap_jax.train.checkpoint import Checkpoints
from m2d_clap_jax.train.step import TrainState
from m2d_clap_jax.weights.portable import save_portable
from m2d_clap_jax.workdir import make_workdir
from tests import launched, test_finetune
from tests.cloud_storage import Server
from tests.command_helpers import run as command_line
from tests.prepare_helpers import FakeEncoder, contents, corpus, noise
from tests.small_model import tiny_weights
from tests.test_pretrain import ENVIRONMENT, flags, one_device, tiny_config, wait_for  # noqa: F401

pytestmark = pytest.mark.usefixtures('one_device')


@pytest.fixture(scope='module')
def server():
  with Server('bucket') as server:
    yield server


@pytest.fixture(scope='module')
def bucket(server):
  """'gs://bucket' on a server in this process, for this process and those that it starts."""
  with pytest.MonkeyPatch.context() as patch:
    url = f'http://127.0.0.1:{server.server_port}'
    settings = {'STORAGE_EMULATOR_HOST': url, 'TENSORSTORE_GCS_HTTP_URL': url, 'FSSPEC_GCS_TOKEN': 'anon',
                'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'any',
                'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false'}  # asks by gRPC what kind of bucket it is
    for name, value in settings.items():
      patch.setenv(name, value)
    fsspec.config.set_conf_env(fsspec.config.conf)
    yield 'gs://bucket'


@pytest.fixture(scope='module')
def data(bucket, tmp_path_factory):
  """40 clips of 0.5 s: their folder, and the prepared data of them on a disk."""
  folder = tmp_path_factory.mktemp('data')
  manifest = corpus(folder / 'audio', 40, seconds=0.5)
  prepare.prepare(manifest, folder / 'audio', folder / 'records', text_encoder=FakeEncoder(), workers=2, num_shards=4)
  for path in (folder / 'audio').iterdir():
    paths.write_bytes(f'{bucket}/audio/{path.name}', path.read_bytes())
  return folder


@pytest.fixture(scope='module')
def records(bucket, data):
  """The same prepared in the bucket, by two tasks one after the other."""
  for i in range(2):
    meta = prepare.prepare(f'{bucket}/audio/manifest.csv', f'{bucket}/audio', f'{bucket}/records',
                           text_encoder=FakeEncoder(), workers=2, num_shards=4, task=(i, 2))
    assert (meta is None) == (i == 0)
  return f'{bucket}/records'


def test_disks_and_stores_answer_alike(bucket, tmp_path):
  for root in (str(tmp_path / 'a'), f'{bucket}/alike'):
    place = paths.as_path(root)
    paths.make_folder(place)
    paths.write_text(place / 'one.txt', 'äb\r\n')
    paths.write_bytes(place / 'sub' / 'two.bin', bytes(5))
    with pytest.raises(ZeroDivisionError):
      with paths.replacing(place / 'three') as name:
        open(name, 'wb').close()
        raise ZeroDivisionError
    assert paths.files_under(place) == ['one.txt', 'sub/two.bin'] and paths.names_in(place) == ['one.txt', 'sub']
    assert paths.glob(f'{root}/*.txt') == [f'{root}/one.txt']
    assert paths.size(place / 'sub' / 'two.bin') == 5
    with paths.open_text(place / 'one.txt') as text, paths.local_copy(place / 'one.txt') as name:
      assert text.read() == 'äb\r\n' == open(name, newline='', encoding='utf-8').read()
    before = paths.stamps(place, ['one.txt', 'sub/two.bin', 'no.txt'])
    paths.write_text(place / 'one.txt', 'changed')
    after = paths.stamps(place, ['one.txt', 'sub/two.bin'])
    assert sorted(before) == ['one.txt', 'sub/two.bin'] and before['one.txt'] != after['one.txt']
    assert before['sub/two.bin'] == after['sub/two.bin']
    paths.move(place / 'sub', place / 'other')
    assert paths.files_under(place) == ['one.txt', 'other/two.bin'] and not (place / 'sub').exists()
    paths.remove_folder(place / 'other')
    assert paths.names_in(place) == ['one.txt']


def test_data_prepared_in_a_bucket_are_the_bytes_prepared_on_a_disk(data, records):
  expected = {name: value for name, value in contents(data / 'records').items() if not name.startswith('.lock')}
  there = {name: paths.as_path(f'{records}/{name}').read_bytes() for name in paths.files_under(records)}
  assert sorted(there) == sorted(expected)
  for name, value in expected.items():
    if name.endswith('.tfrecord.json'):  # which state when the audio was changed, and a sum of it all
      there[name], value = ({**json.loads(text), 'stamps': 0, 'checksum': 0} for text in (there[name], value))
    if name != 'dataset_info.json':  # which has the folder's name
      assert there[name] == value, name


def test_batches_from_a_bucket_are_those_from_a_disk(data, records):
  batches = [TrainingBatches(Folder(place).split('train'), frames=32, batch_size=16, seed=1, captions=embeddings)
             for place in (data / 'records', records)]
  for step in (0, 7):
    for key in ('logmel', 'text'):
      np.testing.assert_array_equal(*(each(step)[key] for each in batches))


def test_a_damaged_shard_in_a_bucket_is_named_or_its_clips_left_out(bucket, data, capsys):
  folder = f'{bucket}/damaged'
  for name, value in contents(data / 'records').items():
    cut = value[:len(value) // 2] if name == 'train-00001-of-00004.tfrecord' else value
    paths.write_bytes(f'{folder}/{name}', cut)
  with pytest.raises(UserError, match='gs://bucket/damaged/train-00001-of-00004.tfrecord: shard has'):
    Folder(folder).split('train')
  clips = Folder(folder).split('train', damaged='skip').clips(range(40))
  assert len(clips) == 40 and 30 < len({clip.key for clip in clips}) < 40
  assert 'note: clip left out' in capsys.readouterr().err


def test_killed_and_continued_in_a_bucket_a_run_is_that_of_a_disk(bucket, data, records, tmp_path):
  options = dict(steps=32, log_every=4, save_every=8, statistics_every=16, evals_every=32)
  pretrain.run(tiny_config(data / 'records', **options), str(tmp_path / 'whole'))
  config, workdir = tiny_config(records, **options), f'{bucket}/run'
  process = launched.Main(*flags(config), f'--workdir={workdir}', env=os.environ | {'XLA_FLAGS': ENVIRONMENT['XLA_FLAGS']})
  wait_for(process, lambda: paths.as_path(f'{workdir}/checkpoints/16/commit_success.txt').exists())
  process.send_signal(signal.SIGKILL)
  error = process.communicate()[1].decode()
  assert process.returncode == -signal.SIGKILL, error
  first = Checkpoints(workdir).latest()
  assert 16 <= first < 32
  # Of the newest checkpoint, one file is lost: the run goes on from the one before.
  paths.as_path(f'{workdir}/checkpoints/{first}/state/manifest.ocdbt').unlink()
  pretrain.run(config, workdir)
  ours, theirs = losses(workdir), losses(tmp_path / 'whole')
  assert ours.keys() == theirs.keys()
  for step, row in theirs.items():  # this process, which pretends to have eight devices, rounds in other ways
    assert ours[step] == pytest.approx(row, rel=1e-5), step
  assert any(name.startswith(f'{first}-') for name in paths.names_in(f'{workdir}/damaged_checkpoints'))
  assert Checkpoints(workdir).latest() == 32
  assert {'curves.png', 'mask.png', 'metrics.jsonl'} <= set(paths.names_in(workdir))
  events = [name for name in paths.names_in(workdir) if 'tfevents' in name]
  assert len(events) == 2 and all(paths.size(f'{workdir}/{name}') > 1000 for name in events)


def losses(workdir):
  """{step: values} without timings; a step that was logged twice would be a mistake."""
  rows = {}
  for line in (paths.as_path(workdir) / 'metrics.jsonl').read_text().splitlines():
    row = json.loads(line)
    assert not set(row) - {'step'} & set(rows.get(row['step'], {}))
    rows.setdefault(row['step'], {}).update({k: v for k, v in row.items() if k not in ('samples_per_second',
                                                                                        'data_wait')})
  return rows


def test_a_model_and_its_sounds_in_a_bucket_give_the_same_numbers(bucket, data, tmp_path, capsys):
  local = save_portable(tiny_weights(), tmp_path / 'model')
  assert command_line('convert', local, f'{bucket}/model') == 0
  names = [f'{i}.wav' for i in range(4)]
  expected = m2d_clap_jax.load(local).embed([str(data / 'audio' / name) for name in names])
  model = m2d_clap_jax.load(f'{bucket}/model')
  np.testing.assert_array_equal(model.embed([f'{bucket}/audio/{name}' for name in names]), expected)
  for kind in ('npz', 'parquet'):
    assert command_line('embed', f'{bucket}/audio', '--model', f'{bucket}/model', '-o', f'{bucket}/out/e.{kind}') == 0
  with np.load(io.BytesIO(paths.as_path(f'{bucket}/out/e.npz').read_bytes())) as found:
    assert list(found['files']) == sorted(f'{bucket}/audio/{i}.wav' for i in range(40))
    np.testing.assert_array_equal(found['embeddings'][0], expected[0])
  assert paths.names_in(f'{bucket}/out') == ['e.npz', 'e.parquet']
  capsys.readouterr()
  assert command_line('info', f'{bucket}/model', '--json') == 0
  assert json.loads(capsys.readouterr().out)['fingerprint'] == model.fingerprint


def test_an_evaluation_in_a_bucket_and_its_report(bucket, capsys, monkeypatch):
  save_portable(tiny_weights(), f'{bucket}/tiny')
  lines = ['file_name,label,split']
  for i in range(30):
    data = io.BytesIO()
    soundfile.write(data, noise(0.3, seed=i) * (10 if i % 2 else 1), 16000, format='FLAC')
    paths.write_bytes(f'{bucket}/task/{i}.flac', data.getvalue())
    lines.append(f'{i}.flac,{"loud" if i % 2 else "soft"},{("train", "valid", "test")[i // 2 % 3]}')
  paths.write_text(f'{bucket}/task/mine.csv', '\n'.join(lines))
  given = dict(job='zeroshot', task='mine', init=f'{bucket}/tiny', seed=0, model={}, protocol={})
  paths.as_path(f'{bucket}/task/5.flac').unlink()
  with pytest.raises(UserError, match='1 of 10 clips cannot be read .*5.flac'):
    evaluate(f'{bucket}/zeroshot', data={'root': f'{bucket}/task', 'seconds': 0.3}, **given)
  evaluate(f'{bucket}/zeroshot', data={'root': f'{bucket}/task', 'seconds': 0.3, 'damaged': 'skip'}, **given)
  assert {'results.json', 'results.md', 'rejected.csv', 'classes.png', 'similarity.png'} <= set(
      paths.names_in(f'{bucket}/zeroshot'))
  task = open_task('mine', f'{bucket}/task', seconds=0.3)
  task = task.restrict({clip.file for clip in task.splits()['test']})
  monkeypatch.setattr(clips, '_compute', None)  # what the evaluation has extracted is found again
  assert len(clips.extract(m2d_clap_jax.load(f'{bucket}/tiny'), task, f'{bucket}/zeroshot/features')[1].files) == 9
  capsys.readouterr()
  assert command_line('report', f'{bucket}/zeroshot') == 0
  assert '| mine |' in capsys.readouterr().out


def test_fine_tuning_in_a_bucket(bucket, tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  rows = [(f'{i}.wav', [list(test_finetune.CLASSES)[i % 3]], 'split', ('train', 'train', 'valid', 'test')[i // 3 % 4])
          for i in range(24)]
  for path in test_finetune.tones(tmp_path / 'tones', rows).iterdir():
    paths.write_bytes(f'{bucket}/tones/{path.name}', path.read_bytes())
  config = test_finetune.tiny_config(f'{bucket}/tones', batch_size=8, epochs=2)
  finetune.run(config, f'{bucket}/tuned')
  assert json.loads(paths.as_path(f'{bucket}/tuned/results.json').read_text())['clips']['used'] == 24
  there = paths.names_in(f'{bucket}/tuned/run0')
  assert {'best', 'result.json', 'metrics.jsonl'} <= set(there) and not [name for name in there if 'best-' in name]
  assert m2d_clap_jax.load(f'{bucket}/tuned/run0/best').classes == tuple(sorted(test_finetune.CLASSES))
  assert (tmp_path / '.cache' / 'm2d_clap_jax' / 'waves').is_dir()  # mapped into memory from a disk


def test_a_store_that_fails_ends_a_preparation_and_rejects_nothing(bucket, data, server, monkeypatch):
  monkeypatch.setattr(server.bucket, 'broken', '/audio/17.wav')
  with pytest.raises(UserError, match='gs://bucket/audio/17.wav: cannot be read from the store .*repeat the command'):
    prepare.prepare(data / 'audio' / 'manifest.csv', f'{bucket}/audio', f'{bucket}/again', text_encoder=None, workers=1)
  assert not [name for name in paths.names_in(f'{bucket}/again') if name.startswith('train')]
  monkeypatch.undo()
  meta = prepare.prepare(data / 'audio' / 'manifest.csv', f'{bucket}/audio', f'{bucket}/again', text_encoder=None)
  assert meta['splits']['train']['clips'] == 40


def test_a_store_that_fails_neither_ends_in_a_traceback_nor_costs_a_checkpoint(bucket, server, monkeypatch):
  state = TrainState(jnp.array(3), {'w': jnp.ones((4, 4))}, {}, (), jax.random.key_data(jax.random.key(0)))
  saved = Checkpoints(f'{bucket}/refused')
  saved.save(state, {})
  saved.wait()
  for what in ('/refused/checkpoints/3/state', '/refused/checkpoints/3/state/manifest'):  # by gcsfs, by TensorStore
    monkeypatch.setattr(server.bucket, 'broken', what)
    with pytest.raises(UserError, match='gs://bucket/refused/checkpoints/3: cannot be read'):
      saved.restore(state)
  monkeypatch.setattr(server.bucket, 'broken', 'refused/checkpoints/4/state/d/')  # TensorStore's, once all has begun
  with pytest.raises(UserError, match='gs://bucket/refused/checkpoints: the checkpoint of .* could not be written'):
    saved.save(state.replace(step=jnp.array(4)), {})
    saved.wait()
  monkeypatch.undo()
  again = Checkpoints(f'{bucket}/refused')
  assert again.latest() == 3 and int(again.restore(state)[0].step) == 3
  assert not paths.as_path(f'{bucket}/refused/damaged_checkpoints').exists()


def test_mistakes_with_stores_are_told(bucket, monkeypatch):
  with pytest.raises(UserError, match='ftp://x/y: ftp:// is not a known kind of store; known: gs://, s3://'):
    m2d_clap_jax.load('ftp://x/y')
  with pytest.raises(UserError, match='gs://bucket/nothing: no such file'):
    m2d_clap_jax.load(f'{bucket}/nothing')
  with pytest.raises(UserError, match='--workdir=gs://other/run: cannot be written'):
    make_workdir('gs://other/run')
  with pytest.raises(UserError, match='gs://bucket/nothing: is not a prepared data folder'):
    Folder(f'{bucket}/nothing')
  with pytest.raises(decode.AudioError, match='no such file'):
    decode.load(f'{bucket}/audio/no.wav', 16000)
  monkeypatch.setattr(paths.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r"s3://x/y: s3:// needs the package s3fs: pip install 'm2d-clap-jax\[s3\]'"):
    paths.as_path('s3://x/y')
  with pytest.raises(UserError, match='s3://x/run: checkpoints can be on local disks and in gs:// buckets'):
    Checkpoints('s3://x/run')
