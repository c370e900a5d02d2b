"""How published data sets are laid out: their tables, what the columns are called, and where a row's recording is.

Names of columns and files are those of the published archives, as of 2026. What is not there is not guessed: a row whose
recording is missing is rejected by its name.
"""
import dataclasses

from m2d_clap_jax.errors import UserError

# Ours -> what such a column may be called. A fold is read where it is asked for.
COLUMNS = {'file_name': ('file_name',), 'caption': ('caption', 'captions'), 'label': ('label', 'labels'),
           'split': ('split',)}
WITH_FOLDS = COLUMNS | {'fold': ('fold',)}


@dataclasses.dataclass(frozen=True)
class Part:
  """A table of a set.

  Attributes:
    tables: its path in the unpacked set, or several customary ones, of which the first that is there counts.
    split: of its rows, where it has no column that says so.
    folders: of its recordings; those in the folders of other parts are not looked at.
  """
  tables: tuple[str, ...]
  split: str = ''
  folders: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Layout:
  """A published data set.

  Attributes:
    parts: its tables; () where folders are the classes.
    columns: {ours: theirs}, theirs being one name or several (five captions).
    files: where a row's recording is, the first that is there: a path in the set with the table's columns in braces, or
      **/ and a name without ending, which may be anywhere and in any format.
    header: names of the columns of tables that have no header.
    splits: {theirs: ours}.
    labels: what separates the labels in a field: ',', '' (nothing: it is one label) or '[]' (a list as Python prints it).
    classes: where the folders of the classes are, the first that is there counts; '' is the set's root.
    lists: {file that lists recordings: their split}, the others being 'train'; for folders of classes.
    left_out: folders that are no classes.
    tenths: without official parts, ten folds of neighbouring numbers in the files' names.
  """
  parts: tuple[Part, ...] = ()
  columns: dict[str, str | tuple[str, ...]] = dataclasses.field(default_factory=dict)
  files: tuple[str, ...] = ()
  header: tuple[str, ...] = ()
  splits: dict[str, str] = dataclasses.field(default_factory=dict)
  labels: str = ','
  classes: tuple[str, ...] = ()
  lists: dict[str, str] = dataclasses.field(default_factory=dict)
  left_out: tuple[str, ...] = ()
  tenths: bool = False


THIRDS = {'train': 'train', 'val': 'valid', 'test': 'test'}

LAYOUTS = {
    'esc50': Layout(
        parts=(Part(('meta/esc50.csv',)),),
        columns={'file_name': 'filename', 'label': 'category', 'fold': 'fold'},
        files=('audio/{filename}', '{filename}')),
    'urbansound8k': Layout(
        parts=(Part(('metadata/UrbanSound8K.csv', 'UrbanSound8K.csv')),),
        columns={'file_name': 'slice_file_name', 'label': 'class', 'fold': 'fold'},
        files=('audio/fold{fold}/{slice_file_name}', 'fold{fold}/{slice_file_name}')),
    'fsd50k': Layout(
        parts=(Part(('FSD50K.ground_truth/dev.csv', 'dev.csv'), 'train', ('FSD50K.dev_audio',)),
               Part(('FSD50K.ground_truth/eval.csv', 'eval.csv'), 'test', ('FSD50K.eval_audio',))),
        columns={'file_name': 'fname', 'label': 'labels', 'split': 'split'},
        files=('{folder}/{fname}.wav', '**/{fname}'), splits=THIRDS),
    'gtzan': Layout(classes=('genres', 'genres_original', 'Data/genres_original', ''), tenths=True),
    'speech_commands': Layout(
        classes=('',), left_out=('_background_noise_',),
        lists={'validation_list.txt': 'valid', 'testing_list.txt': 'test'}),
    'audiocaps': Layout(
        parts=tuple(Part((f'{theirs}.csv', f'dataset/{theirs}.csv', f'audiocaps_{theirs}.csv'), ours, (theirs, ours))
                    for theirs, ours in THIRDS.items()),
        columns={'file_name': 'youtube_id', 'caption': 'caption'},
        files=('**/{youtube_id}_{start_time}', '**/Y{youtube_id}_{start_time}', '**/{youtube_id}_{start_time:06d}',
               '**/{youtube_id}', '**/Y{youtube_id}', '**/{audiocap_id}')),
    'clotho': Layout(
        parts=(Part(('clotho_captions_development.csv',), 'train', ('development', 'clotho_audio_development')),
               Part(('clotho_captions_validation.csv',), 'valid', ('validation', 'clotho_audio_validation')),
               Part(('clotho_captions_evaluation.csv',), 'test', ('evaluation', 'clotho_audio_evaluation'))),
        columns={'file_name': 'file_name', 'caption': tuple(f'caption_{i}' for i in range(1, 6))},
        files=('{folder}/{file_name}', 'clotho_audio_{folder}/{folder}/{file_name}', 'clotho_audio_{folder}/{file_name}',
               '{file_name}')),
    'wavcaps': Layout(
        parts=tuple(Part((f'json_files/{source}/{file}_final.json', f'{source}/{file}_final.json', f'{file}_final.json'),
                         'train', (source,))
                    for source, file in (('AudioSet_SL', 'as'), ('BBC_Sound_Effects', 'bbc'), ('FreeSound', 'fsd'),
                                         ('SoundBible', 'sb'))),
        columns={'file_name': 'id', 'caption': 'caption'}, files=('**/{id}',)),
    'auto_acd': Layout(
        parts=(Part(('train.csv',), 'train', ('train',)), Part(('test.csv',), 'test', ('test',))),
        columns={'file_name': 'youtube_id', 'caption': 'caption'},
        files=('**/{youtube_id}', '**/Y{youtube_id}', '**/{youtube_id:.11}', '**/Y{youtube_id:.11}')),
    'musiccaps': Layout(
        parts=(Part(('musiccaps-public.csv',)),),
        columns={'file_name': 'ytid', 'caption': 'caption', 'label': 'aspect_list', 'split': 'is_audioset_eval'},
        files=('**/{ytid}_{start_s}', '**/[{ytid}]-[{start_s}-{end_s}]', '**/{ytid}_{start_s}_{end_s}', '**/{ytid}',
               '**/Y{ytid}'),
        splits={'false': 'train', 'true': 'test'}, labels='[]'),
    'vggsound': Layout(
        parts=(Part(('vggsound.csv', 'data/vggsound.csv')),),
        header=('id', 'start', 'label', 'split'),
        columns={'file_name': 'id', 'label': 'label', 'split': 'split'},
        files=('**/{id}_{start:06d}', '**/{id}_{start}', '**/{id}', '**/Y{id}'),
        splits={'train': 'train', 'test': 'test'}, labels=''),
}


def layout_of(name: str, option: str) -> Layout:
  """The layout of a name, such as 'esc50'; UserError, naming the option, for one that is not known."""
  if name not in LAYOUTS:
    raise UserError(f'{option}={name}: known are {", ".join(LAYOUTS)}; for another table say which of its columns is '
                    'which, as in --columns=file_name:filename,label:category')
  return LAYOUTS[name]
