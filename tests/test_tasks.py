"""Evaluation tasks: metadata as EVAR writes it or of one's own, and what is wrong with it."""
import numpy as np
import pytest

from m2d_clap_jax.errors import UserError
from m2d_clap_jax.tasks.metadata import check_all_have, check_classes, open_task, read_metadata
from m2d_clap_jax.tasks.names import unnamed
from m2d_clap_jax.tasks.table import PAPER, TASKS


def write(tmp_path, text, name='esc50.csv', files=('a.wav', 'b.wav', 'c.wav')):
  for file in files:
    (tmp_path / file).write_bytes(b'x')
  (tmp_path / name).write_text(text)
  return tmp_path


def test_folds_become_test_and_training_clips(tmp_path):
  root = write(tmp_path, 'file_name,label,fold\na.wav,dog,1\nb.wav,rain_drops,2\nc.wav,dog,2\n')
  task = open_task('esc50', root)
  assert (task.classes, task.folds, task.seconds, task.metric) == (('dog', 'rain_drops'), (1, 2), 5.0, 'accuracy')
  assert task.captions == ('dog can be heard', 'rain drops can be heard')
  parts = task.splits(1)
  assert [clip.file for clip in parts['test']] == ['a.wav'] and [clip.file for clip in parts['train']] == ['b.wav', 'c.wav']
  np.testing.assert_array_equal(task.targets(task.clips), [[1, 0], [0, 1], [1, 0]])


def test_a_comma_in_any_label_makes_a_task_multi_label(tmp_path):
  root = write(tmp_path, 'file_name,label,split\na.wav,"dog,rain",train\nb.wav,rain,valid\nc.wav,dog,test\n')
  task = open_task('mine', root, str(root / 'esc50.csv'), seconds=1.5)
  assert task.multi_label and task.metric == 'mAP' and task.seconds == 1.5
  np.testing.assert_array_equal(task.targets(task.clips), [[1, 1], [0, 1], [1, 0]])
  assert [len(part) for part in task.splits().values()] == [1, 1, 1]


def test_a_table_without_parts_gets_test_clips_of_each_class_whatever_the_order_of_its_rows(tmp_path, capsys):
  rows = [f'{i}.wav,{label}' for i, label in enumerate('x' * 10 + 'y' * 4 + 'z')]
  files = [f'{i}.wav' for i in range(15)]

  def tests(rows):
    root = write(tmp_path, '\n'.join(['file_name,label', *rows]), 'mine.csv', files)
    task = open_task('mine', root, seconds=1)
    assert check_classes(task) == ''
    return {clip.file: clip.labels[0] for clip in task.splits()['test']}
  found = tests(rows)
  assert sorted(found.values()) == ['x', 'x', 'y'] and tests(rows[::-1]) == found
  assert 'has neither split nor fold: 3 of its 15 clips, a fifth of each class, are test clips' in capsys.readouterr().err


HEARD = {
    'cremad': {'ANG': 'angry person talking', 'DIS': 'someone talking in disgust',
               'FEA': 'someone talking with a sense of fear', 'HAP': 'someone talking happily and joyfully',
               'NEU': 'someone talking calmly', 'SAD': 'someone talking sadly'},
    'gtzan': {'hiphop': 'hiphop music', 'rock': 'rock music'},
    'nsynth': {'bass': 'the musical instrument sound of bass', 'synth_lead': 'the musical instrument sound of synth lead'},
}


@pytest.mark.parametrize('name', TASKS)
def test_zero_shot_captions_of_every_task_end_in_can_be_heard(name, tmp_path):
  heard = HEARD.get(name, {'dog_bark': 'dog bark', 'rain': 'rain'})
  rows = [f'a{i}.wav,{label},test' for i, label in enumerate(heard)]
  root = write(tmp_path, '\n'.join(['file_name,label,split', *rows]), f'{name}.csv', [row.split(',')[0] for row in rows])
  assert open_task(name, root).captions == tuple(f'{heard[label]} can be heard' for label in sorted(heard))
  assert open_task(name, root, template='a {} sound').captions == tuple(
      f'a {label.replace("_", " ")} sound' for label in sorted(heard))


@pytest.mark.parametrize('name, seconds, metric', [
    ('esc50', 5.0, 'accuracy'), ('us8k', 4.0, 'accuracy'), ('spcv2', 1.0, 'accuracy'), ('vc1', 8.2, 'accuracy'),
    ('voxforge', 5.8, 'accuracy'), ('cremad', 2.5, 'accuracy'), ('gtzan', 30.0, 'accuracy'), ('nsynth', 4.0, 'accuracy'),
    ('surge', 4.0, 'accuracy'), ('fsd50k', 7.6358, 'mAP'), ('as20k', 10.0, 'mAP'), ('as', 10.0, 'mAP'),
    ('audiocaps', 10.0, 'accuracy'), ('clotho', 30.0, 'accuracy'), ('mine', 2.0, 'accuracy')])
def test_the_table_decides_what_is_scored_whatever_the_commas(name, seconds, metric, tmp_path):
  root = write(tmp_path, 'file_name,label,split\na.wav,dog,train\nb.wav,rain,test\n', f'{name}.csv')
  task = open_task(name, root, seconds=2.0 if name == 'mine' else None)
  assert (task.seconds, task.metric, task.multi_label) == (seconds, metric, metric == 'mAP')


def test_several_labels_where_the_table_has_accuracy_are_told(tmp_path):
  root = write(tmp_path, 'file_name,label,split\na.wav,dog,train\nb.wav,"dog,rain",test\n')
  with pytest.raises(UserError, match=r'esc50: is scored by accuracy, .* b.wav has 2 \(dog, rain\)'):
    open_task('esc50', root)


def test_a_split_called_val_is_valid(tmp_path):
  root = write(tmp_path, 'file_name,label,split\na.wav,dog,train\nb.wav,rain,val\nc.wav,dog,test\n')
  assert [clip.file for clip in open_task('esc50', root).splits()['valid']] == ['b.wav']


def test_labels_and_captions_stand_side_by_side(tmp_path):
  root = write(tmp_path, 'file_name,label,caption,split\na.wav,dog,barking,train\na.wav,dog,woof,train\n'
                         'b.wav,rain,it rains,test\nc.wav,,silence,test\n', 'clotho.csv')
  task = open_task('clotho', root)
  assert task.clips[0].labels == ('dog',) and task.clips[0].captions == ('barking', 'woof')
  assert task.classes == ('dog', 'rain') and task.metric == 'accuracy' and task.seconds == 30
  assert open_task('clotho', root, whole=True).seconds is None
  check_all_have(task, 'captions')
  with pytest.raises(UserError, match='clotho: 1 of 3 clips have no labels, such as c.wav: complete'):
    check_classes(task)
  with pytest.raises(UserError, match='config.data.seconds=3: retrieval is of whole clips'):
    open_task('clotho', root, whole=True, seconds=3)


def test_several_captions_of_a_clip_make_a_retrieval_task(tmp_path):
  root = write(tmp_path, 'file_name,caption,split\na.wav,"a dog, barking",test\na.wav,woof,test\nb.wav,rain,test\n',
               'clotho.csv')
  task = open_task('clotho', root)
  assert task.clips[0].captions == ('a dog, barking', 'woof') and not task.classes
  with pytest.raises(UserError, match='clotho: has no labels: add the column label to its CSV, or use configs/retrieval'):
    check_classes(task)


@pytest.mark.parametrize('text, message', [
    ('name,label,split\na.wav,x,train\n', 'columns are name, label, split; expected file_name'),
    ('', 'columns are none'),
    ('file_name,label,split\n', 'no rows'),
    ('file_name,label,split\na.wav,x,eval\n', "line 2: split 'eval' is none of"),
    ('file_name,label,fold\na.wav,x,one\n', "line 2: fold 'one' is no number"),
    ('file_name,label,split\na.wav,,train\n', 'line 2: label or caption is empty: complete'),
    ('file_name,label,split\na.wav,x,train\na.wav,y,test\n', 'line 3: a.wav was in train above and is in test'),
])
def test_wrong_metadata_is_told_by_line(text, message, tmp_path):
  (tmp_path / 'x.csv').write_text(text)
  with pytest.raises(UserError, match=message):
    read_metadata(str(tmp_path / 'x.csv'))


def test_a_wrong_folder_or_task_is_told(tmp_path):
  root = write(tmp_path, 'file_name,label,split\nx/1.wav,dog,train\nx/2.wav,dog,test\n', files=())
  with pytest.raises(UserError, match='1 of 1 files looked for are not there, such as x/2.wav'):
    open_task('esc50', root)
  with pytest.raises(UserError, match='no metadata there'):
    open_task('us8k', root)
  with pytest.raises(UserError, match='is none of esc50, .* also give config.data.seconds'):
    open_task('mine', root)


def test_the_table_has_every_task_of_the_papers_numbers():
  assert all(set(scores) <= set(TASKS) for scores in PAPER.values())
  assert abs(np.mean(list(PAPER['linear'].values())) - 80.8) < 0.05


@pytest.mark.parametrize('rows, message', [
    ('split\na.wav,dog,train\nb.wav,cat,train\nc.wav,rain,test\n', "c.wav in test has the label 'rain', which no training"),
    ('split\na.wav,dog,train\na2.wav,cat,train\nb.wav,rain,valid\nc.wav,dog,test\n', "b.wav in valid has the label 'rain'"),
    ('fold\na.wav,dog,1\nb.wav,rain,1\nc.wav,dog,1\n', 'has no train clips when fold 1 is the test'),
    ('split\na.wav,dog,train\nb.wav,rain,train\nc.wav,dog,valid\n', 'has no test clips'),
    ('split\na.wav,dog,train\nb.wav,dog,train\nc.wav,dog,test\n', "the one label 'dog'"),
])
def test_classes_that_cannot_be_learned_are_told(rows, message, tmp_path):
  task = open_task('esc50', write(tmp_path, 'file_name,label,' + rows))
  with pytest.raises(UserError, match=message):
    check_classes(task)


def test_labels_of_one_fold_alone_are_told_and_kept(tmp_path):
  root = write(tmp_path, 'file_name,label,fold\na.wav,dog,1\nb.wav,dog,2\nc.wav,rain,2\n')
  assert '1 clips have labels of one fold alone (1 of 2: rain)' in check_classes(open_task('esc50', root))
  root = write(tmp_path, 'file_name,label,fold\na.wav,dog,1\nb.wav,dog,2\nc.wav,rain,2\na2.wav,rain,1\n')
  assert check_classes(open_task('esc50', root)) == ''


def test_names_of_audioset_stand_for_its_identifiers(tmp_path):
  root = write(tmp_path, 'file_name,label,split\na.wav,"/m/09x0r,/t/dd00003",train\nb.wav,/m/09x0r,test\n', 'as20k.csv')
  assert unnamed(open_task('as20k', root).captions) == '/m/09x0r can be heard'
  names = tmp_path / 'class_labels_indices.csv'
  names.write_text('index,mid,display_name\n0,/m/09x0r,Speech\n1,/t/dd00003,"Male singing, loud"\n')
  task = open_task('as20k', root, names=str(names))
  assert task.names == ('Speech', 'Male singing, loud') and not unnamed(task.captions)
  assert task.captions == ('Speech can be heard', 'Male singing, loud can be heard')
  names.write_text('index,display_name\n0,Speech\n')
  with pytest.raises(UserError, match="has no column 'mid'"):
    open_task('as20k', root, names=str(names))
