"""Published data sets as they come out of their archives, prepared and evaluated on without a script."""
import json
import os

import pytest

from configs import finetune, linear, retrieval, zeroshot
from m2d_clap_jax.data.read import Folder
from m2d_clap_jax.errors import UserError
from m2d_clap_jax.eval import finished
from m2d_clap_jax.tables.layouts import LAYOUTS
from m2d_clap_jax.tasks.clips import missing_files
from m2d_clap_jax.tasks.metadata import check_classes, open_task, read_metadata
from m2d_clap_jax.train import finetune as finetuning, task_data
from tests.command_helpers import run, save_model
from tests.published_sets import SETS, clotho, esc50, fsd50k, gtzan, sound, speech_commands, wavcaps
from tests.test_finetune import tiny_config
from tests.test_pretrain import one_device  # noqa: F401

# {split: {recording: (captions, labels)}}; a caption that is not given is made of the labels.
EXPECTED = {
    'esc50': {'fold1': {'audio/1-100032-A-0.wav': (['The sound of dog.'], ['dog']),
                        'audio/1-100038-A-14.wav': (['The sound of chirping birds.'], ['chirping_birds'])},
              'fold2': {'audio/2-100210-A-36.wav': (['The sound of chirping birds.'], ['chirping_birds']),
                        'audio/2-9.wav': (['The sound of dog.'], ['dog'])}},
    'urbansound8k': {'fold5': {'audio/fold5/100032-3-0-0.wav': (['The sound of dog bark.'], ['dog_bark']),
                               'audio/fold5/100263-2-0-117.wav': (['The sound of children playing.'], ['children_playing'])},
                     'fold10': {'audio/fold10/100648-1-0-0.wav': (['The sound of children playing.'], ['children_playing']),
                                'audio/fold10/7383-3-0-0.wav': (['The sound of dog bark.'], ['dog_bark'])}},
    'fsd50k': {'train': {'FSD50K.dev_audio/64760.wav': (['The sound of Electric guitar, Guitar, and Music.'],
                                                        ['Electric_guitar', 'Guitar', 'Music']),
                         'FSD50K.dev_audio/16399.wav': (['The sound of Rain, and Water.'], ['Rain', 'Water'])},
               'valid': {'FSD50K.dev_audio/345111.wav': (['The sound of Electric guitar, Guitar, and Music.'],
                                                         ['Electric_guitar', 'Guitar', 'Music'])},
               'test': {'FSD50K.eval_audio/37199.wav': (['The sound of Electric guitar, Guitar, and Music.'],
                                                        ['Electric_guitar', 'Guitar', 'Music'])}},
    'gtzan': {'train': {f'genres/{genre}/{genre}.{number:05d}.wav': ([f'The sound of {genre}.'], [genre])
                        for genre in ('blues', 'hiphop') for number in (0, 12)}},
    'speech_commands': {'train': {f'{word}/a_nohash_0.wav': ([f'The sound of {word}.'], [word]) for word in ('left', 'right')},
                        'valid': {'right/b_nohash_0.wav': (['The sound of right.'], ['right'])},
                        'test': {'left/c_nohash_0.wav': (['The sound of left.'], ['left'])}},
    'audiocaps': {'train': {'train/r1nicOVtvkQ_130.wav': (['A woman talks nearby as water pours'], []),
                            'train/YUDGBjjwyaqE.flac': (['Multiple clanging, and clanking sounds'], [])},
                  'valid': {'val/vfY_TJq7n_U.wav': (['Rustling occurs'], [])},
                  'test': {'test/7fmOlUlwoNg.wav': (['Constant rattling noise', 'A machine rattles'], [])}},
    'clotho': {split: {f'{part}/{file}': (['A muddled noise of broken channel, on the TV', f'Two of {part}.', 'Three.',
                                           'Four.', 'Five.'], [])}
               for split, part, file in (('train', 'development', 'Distorted AM Radio noise.wav'),
                                         ('valid', 'validation', 'Train coming.wav'),
                                         ('test', 'evaluation', 'Santa Motor.wav'))},
    'wavcaps': {'train': {'AudioSet_SL_flac/Yb0RFKhbpFJA.flac': (['AudioSet_SL Yb0RFKhbpFJA.wav'], []),
                          'SoundBible_flac/2218.flac': (['SoundBible 2218'], []),
                          'FreeSound_flac/17.flac': (['FreeSound 17'], [])}},
    'auto_acd': {'train': {'audio/oPRC3zComfA_000117.wav': (['A man speaks, and birds sing'], [])},
                 'test': {'audio/Y-0jeONf82dE.wav': (['A crowd cheers'], [])}},
    'musiccaps': {'train': {'wavs/-0SdAVK79lg.wav': (['A guitar.'], ['guitar song'])},
                  'test': {'wavs/[-0Gj8-vB1q4]-[30-40].wav': (
                      ['The low quality recording features a ballad, with strings.'],
                      ['low quality', 'sad, slow', "child's voice"])}},
    'vggsound': {'train': {'audio/--0PQM4-hqg.wav': (['The sound of playing violin, fiddle.'], ['playing violin, fiddle'])},
                 'test': {'audio/---g-f_I2yQ_000001.wav': (['The sound of people marching.'], ['people marching'])}},
}
# Recordings that are no longer to be had, as rejected.csv names them.
MISSING = {'audiocaps': '3hsbYWdj8XY_30', 'wavcaps': '17', 'auto_acd': 'AAAAAAAAAAA_000030', 'vggsound': '--56QUhyDQM_000185'}


@pytest.mark.parametrize('name', LAYOUTS)
def test_a_published_set_is_prepared_from_its_archive(name, tmp_path):
  SETS[name](tmp_path / 'set')
  assert run('prepare', f'--manifest={tmp_path}/set', f'--like={name}', f'--out={tmp_path}/out', '--text_encoder=none',
             '--workers=1') == 0
  folder = Folder(tmp_path / 'out')
  found = {}
  for split in folder.splits:
    records = folder.split(split)
    found[split] = {clip.key: (list(clip.captions), list(clip.labels)) for clip in records.clips(range(records.num_clips))}
  assert found == EXPECTED[name]
  counts = folder.meta['splits'].values()
  rejected = (tmp_path / 'out/rejected.csv').read_text().splitlines()[1:]
  assert sum(n['rejected_rows'] for n in counts) == len(rejected) == (name in MISSING)
  if name in MISSING:
    assert rejected[0].replace('"', '').startswith(f'{MISSING[name]},no such file (looked for {MISSING[name]}')


TASKS = {  # task: (set, metric, classes, clips of train, valid and test, or of the folds)
    'esc50': ('esc50', 'accuracy', ('chirping_birds', 'dog'), {1: 2, 2: 2}),
    'us8k': ('urbansound8k', 'accuracy', ('children_playing', 'dog_bark'), {5: 2, 10: 2}),
    'fsd50k': ('fsd50k', 'mAP', ('Electric_guitar', 'Guitar', 'Music', 'Rain', 'Water'), {'train': 2, 'valid': 1, 'test': 1}),
    'gtzan': ('gtzan', 'accuracy', ('blues', 'hiphop'), {1: 2, 2: 2}),
    'spcv2': ('speech_commands', 'accuracy', ('left', 'right'), {'train': 2, 'valid': 1, 'test': 1}),
    'audiocaps': ('audiocaps', 'accuracy', (), {'train': 3, 'valid': 1, 'test': 1}),
    'clotho': ('clotho', 'accuracy', (), {'train': 1, 'valid': 1, 'test': 1}),
}


@pytest.mark.parametrize('name', TASKS)
def test_a_task_is_its_unpacked_archive(name, tmp_path):
  like, metric, classes, sizes = TASKS[name]
  SETS[like](tmp_path)
  task = open_task(name, str(tmp_path), whole=not classes)
  assert (task.metric, task.classes) == (metric, classes)
  assert {part: sum(part in (clip.split, clip.fold) for clip in task.clips) for part in sizes} == sizes
  assert len(task.clips) == sum(sizes.values())
  assert list(missing_files(task)) == ([MISSING['audiocaps']] if name == 'audiocaps' else [])
  if classes:
    assert check_classes(task) == ''
  else:
    assert len(next(clip for clip in task.clips if clip.split == 'test').captions) == {'audiocaps': 2, 'clotho': 5}[name]


def test_one_table_of_a_set_is_prepared_alone_and_knows_its_part_and_folder(tmp_path):
  fsd50k(tmp_path)
  assert run('prepare', f'--manifest={tmp_path}/FSD50K.ground_truth/eval.csv', '--like=fsd50k', f'--out={tmp_path}/out',
             '--text_encoder=none', '--workers=1') == 0
  splits = json.loads((tmp_path / 'out/prepare.json').read_text())['splits']
  assert {split: n['clips'] for split, n in splits.items()} == {'test': 1}


def test_any_table_is_read_by_the_names_of_its_columns(tmp_path, capsys):
  esc50(tmp_path)
  common = ['prepare', f'--manifest={tmp_path}/meta/esc50.csv', f'--audio_root={tmp_path}/audio', '--text_encoder=none',
            '--workers=1']
  assert run(*common, '--columns=file_name:filename,label:category,fold:fold', f'--out={tmp_path}/folds') == 0
  assert Folder(tmp_path / 'folds').splits == ['fold1', 'fold2']
  assert run(*common, '--columns=file_name:filename,label:category,label:esc10', f'--out={tmp_path}/all') == 0
  records = Folder(tmp_path / 'all').split('train')
  assert {clip.key: clip.labels for clip in records.clips(range(4))}['2-9.wav'] == ['dog', 'True']
  capsys.readouterr()
  for columns, told in (('file_name:filename,label:klass', '--columns=label:klass: '), ('name:filename', 'is not OURS:THEIRS'),
                        ('file_name:filename,file_name:fold', 'file_name is one column'), ('file_name', 'is not OURS:THEIRS'),
                        ('split:fold,fold:fold', 'a split or to a fold')):
    try:
      code = run(*common, f'--columns={columns}', f'--out={tmp_path}/no')
    except SystemExit as end:  # argparse's own
      code = end.code
    error = capsys.readouterr().err
    assert code == 2 and told in error, error
  assert run(*common, '--columns=file_name:filename', '--like=esc50', f'--out={tmp_path}/no') == 2


@pytest.mark.parametrize('config,kind', [(linear, 'label'), (zeroshot, 'label'), (retrieval, 'caption'), (finetune, 'label')])
def test_evaluations_and_fine_tuning_take_any_table_by_the_names_of_its_columns(config, kind, tmp_path):
  esc50(tmp_path)
  data = config.get_config().data.to_dict() | {
      'root': str(tmp_path / 'audio'), 'csv': str(tmp_path / 'meta/esc50.csv'), 'seconds': None if kind == 'caption' else 0.5}
  if config is finetune:
    def opened(columns):
      return task_data.open_data(tmp_path / 'run', 'mine', None, beat=print, **data | {'columns': columns})[0].task
  else:
    del data['damaged']

    def opened(columns):
      return finished.open_data('mine', whole=kind == 'caption', tests=config is not linear, **data | {'columns': columns})
  task = opened(f'file_name:filename,{kind}:category,fold:fold')
  found = {clip.file: (clip.fold, clip.labels or clip.captions) for clip in task.clips}
  assert found == {name.removeprefix('audio/'): (int(part.removeprefix('fold')), tuple(labels))
                   for part, clips in EXPECTED['esc50'].items() for name, (_, labels) in clips.items()}
  for columns, told in (('', 'config.data.columns=file_name:NAME,caption:NAME,label:NAME,fold:NAME'),
                        ('file_name:filename,label:klass,fold:fold', 'config.data.columns=label:klass: .* has no such column'),
                        ('filename', "config.data.columns=filename: 'filename' is not OURS:THEIRS")):
    with pytest.raises(UserError, match=told):
      opened(columns)
  data['csv'] = ''
  with pytest.raises(UserError, match='config.data.columns=.*: of which table'):
    opened('file_name:filename')


TABLES = {
    'zeroshot': (esc50, 'audio', 'meta/esc50.csv', 'file_name:filename,label:category,fold:fold'),
    'finetune': (esc50, 'audio', 'meta/esc50.csv', 'file_name:filename,label:category,fold:fold'),
    'retrieval': (clotho, 'evaluation', 'clotho_captions_evaluation.csv',
                  ','.join(['file_name:file_name', *(f'caption:caption_{i}' for i in range(1, 6))]))}


@pytest.mark.parametrize('job', TABLES)
def test_a_published_table_is_scored_as_it_is(job, tmp_path, capsys, one_device):  # noqa: F811
  make, root, table, columns = TABLES[job]
  make(tmp_path)
  config = {'zeroshot': zeroshot.get_config, 'retrieval': retrieval.get_config, 'finetune': lambda: tiny_config('')}[job]()
  config.task, config.init = 'mine', '' if job == 'finetune' else save_model(tmp_path / 'model')
  config.data.update({'root': str(tmp_path / root), 'csv': str(tmp_path / table), 'columns': columns})
  if job != 'retrieval':
    config.data.seconds = 0.5
  if job == 'finetune':
    config.update({'epochs': 1, 'batch_size': 2})
  {'finetune': finetuning}.get(job, finished).run(config, str(tmp_path / 'run'))
  results = json.loads((tmp_path / 'run/results.json').read_text())
  if job == 'retrieval':  # a table of test clips alone: it has no column that says so
    assert results['captions'] == 5 and results['text_to_audio']['R@1'] == 1
    assert 'clotho_captions_evaluation.csv: has neither split nor fold: all its clips are test clips' in capsys.readouterr().err
  else:
    assert results['metric'] == 'accuracy' and results['chance'] == 0.5
    assert [trial['fold'] for trial in results.get('trials', [])] == ([1, 2] if job == 'finetune' else [])


def test_a_named_fold_counts_where_a_table_has_splits_too(tmp_path):
  sound(tmp_path / 'a.wav')
  (tmp_path / 'mine.csv').write_text('file_name,label,split,part\na.wav,dog,train,3\n')
  clip, = read_metadata(str(tmp_path / 'mine.csv'), str(tmp_path), 'fold:part')
  assert (clip.fold, clip.split) == (3, '')
  clip, = read_metadata(str(tmp_path / 'mine.csv'), str(tmp_path))
  assert (clip.fold, clip.split) == (None, 'train')


def test_a_folder_that_is_not_the_set_is_told(tmp_path):
  (tmp_path / 'meta').mkdir()
  (tmp_path / 'meta/esc50.csv').write_text('file,fold\na.wav,1\n')
  with pytest.raises(UserError, match='esc50.csv: has no column category, as esc50 has; its columns are file, fold'):
    open_task('esc50', str(tmp_path))
  for task, told in (('us8k', 'contains no table of urbansound8k'), ('gtzan', 'contains no folders of classes')):
    with pytest.raises(UserError, match=f'no metadata there .* give config.data.csv=FILE, and .* {told}'):
      open_task(task, str(tmp_path))


def test_lists_that_are_missing_or_name_missing_recordings_are_told(tmp_path):
  speech_commands(tmp_path)
  with open(tmp_path / 'testing_list.txt', 'a') as file:
    file.write('left/gone.wav\n')
  assert missing_files(open_task('spcv2', str(tmp_path))) == {'left/gone.wav': 'no such file'}
  with open(tmp_path / 'testing_list.txt', 'a') as file:
    file.write('right/b_nohash_0.wav\n')
  with pytest.raises(UserError, match='testing_list.txt: right/b_nohash_0.wav is in the list of valid too'):
    open_task('spcv2', str(tmp_path))
  (tmp_path / 'validation_list.txt').unlink()
  with pytest.raises(UserError, match='validation_list.txt: is missing'):
    open_task('spcv2', str(tmp_path))


def test_recordings_that_only_might_be_meant_are_not_taken(tmp_path, capsys):
  wavcaps(tmp_path / 'set')
  sound(tmp_path / 'set/more/2218.wav')  # beside SoundBible's own
  sound(tmp_path / 'set/FreeSound_flac/copy/17.wav')
  assert run('prepare', f'--manifest={tmp_path}/set', '--like=wavcaps', f'--out={tmp_path}/out', '--text_encoder=none',
             '--workers=1') == 0
  rejected = (tmp_path / 'out/rejected.csv').read_text()
  assert 'several recordings have its name' in rejected and '2218' not in rejected
  assert 'bbc_final.json; its rows are left out' in capsys.readouterr().err


def test_names_that_are_no_text_are_rejected_one_by_one(tmp_path, capsys):
  gtzan(tmp_path)
  for byte in (b'\xe9', b'\xea'):
    sound(tmp_path / 'x.wav')
    os.rename(tmp_path / 'x.wav', os.fsencode(tmp_path / 'genres/blues') + b'/blues.00001' + byte + b'.wav')
  assert run('prepare', f'--manifest={tmp_path}', '--like=gtzan', f'--out={tmp_path}/out', '--text_encoder=none',
             '--workers=1') == 0
  rejected = (tmp_path / 'out/rejected.csv').read_text()
  assert all(rf'blues.00001\x{byte}.wav,' in rejected for byte in ('e9', 'ea')) and rejected.count('not valid UTF-8') == 2
  output = capsys.readouterr()
  assert 'genres: 7 files: 6 recordings of classes, 1 others (genres/bextract_single.mf)' in output.out
  assert 'rows: 6 = 4 written + 2 rejected' in output.out


def test_rows_that_lead_out_of_a_published_set_are_refused(tmp_path):
  clotho(tmp_path)
  with open(tmp_path / 'clotho_captions_evaluation.csv', 'a') as file:
    file.write('../../secret.wav,1,2,3,4,5\n')
  with pytest.raises(UserError, match='clotho_captions_evaluation.csv line 3: .*path is outside the audio root'):
    open_task('clotho', str(tmp_path), whole=True)
