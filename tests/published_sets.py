"""Small copies of published data sets: their real folders, names of columns and ways to write rows, with noise for sound."""
import json

import soundfile

from tests.prepare_helpers import RATE, noise


def sound(path, seed=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  soundfile.write(path, noise(0.05, seed=seed), RATE)


def text(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(content)


def esc50(root):
  text(root / 'meta/esc50.csv', 'filename,fold,target,category,esc10,src_file,take\n'
       '1-100032-A-0.wav,1,0,dog,True,100032,A\n1-100038-A-14.wav,1,14,chirping_birds,False,100038,A\n'
       '2-100210-A-36.wav,2,36,chirping_birds,False,100210,A\n2-9.wav,2,0,dog,True,9,A\n')
  for name in ('1-100032-A-0', '1-100038-A-14', '2-100210-A-36', '2-9'):
    sound(root / f'audio/{name}.wav')


def urbansound8k(root):
  text(root / 'metadata/UrbanSound8K.csv', 'slice_file_name,fsID,start,end,salience,fold,classID,class\n'
       '100032-3-0-0.wav,100032,0.0,0.317551,1,5,3,dog_bark\n100263-2-0-117.wav,100263,58.5,62.5,1,5,2,children_playing\n'
       '100648-1-0-0.wav,100648,4.8,5.4,2,10,2,children_playing\n7383-3-0-0.wav,7383,0,4,1,10,3,dog_bark\n')
  for name in ('fold5/100032-3-0-0', 'fold5/100263-2-0-117', 'fold10/100648-1-0-0', 'fold10/7383-3-0-0'):
    sound(root / f'audio/{name}.wav')


def fsd50k(root):
  guitar = '"Electric_guitar,Guitar,Music","/m/02sgy,/m/0342h,/m/04rlf"'
  text(root / 'FSD50K.ground_truth/dev.csv', f'fname,labels,mids,split\n64760,{guitar},train\n16399,"Rain,Water","/m/a,/m/b",'
       f'train\n345111,{guitar},val\n')
  text(root / 'FSD50K.ground_truth/eval.csv', f'fname,labels,mids\n37199,{guitar}\n')
  for name in ('dev_audio/64760', 'dev_audio/16399', 'dev_audio/345111', 'eval_audio/37199', 'eval_audio/64760'):
    sound(root / f'FSD50K.{name}.wav')


def gtzan(root):
  for genre in ('blues', 'hiphop'):
    for number in (0, 12):
      sound(root / f'genres/{genre}/{genre}.{number:05d}.wav')
  text(root / 'genres/bextract_single.mf', 'not a recording')


def speech_commands(root):
  for name in ('right/a_nohash_0', 'left/a_nohash_0', 'right/b_nohash_0', 'left/c_nohash_0', '_background_noise_/pink_noise'):
    sound(root / f'{name}.wav')
  text(root / 'validation_list.txt', 'right/b_nohash_0.wav\n')
  text(root / 'testing_list.txt', 'left/c_nohash_0.wav\n')
  text(root / 'README.md', 'about it')


def audiocaps(root):
  header = 'audiocap_id,youtube_id,start_time,caption\n'
  text(root / 'train.csv', header + '91139,r1nicOVtvkQ,130,A woman talks nearby as water pours\n'
       '58146,UDGBjjwyaqE,20,"Multiple clanging, and clanking sounds"\n11542,3hsbYWdj8XY,30,Gone\n')
  text(root / 'val.csv', header + '97151,vfY_TJq7n_U,130,Rustling occurs\n')
  text(root / 'test.csv', header + '103549,7fmOlUlwoNg,0,Constant rattling noise\n103548,7fmOlUlwoNg,0,A machine rattles\n')
  for name in ('train/r1nicOVtvkQ_130.wav', 'train/YUDGBjjwyaqE.flac', 'val/vfY_TJq7n_U.wav', 'test/7fmOlUlwoNg.wav',
               'test/3hsbYWdj8XY.wav'):  # the last is another part's
    sound(root / name)
  text(root / 'train/r1nicOVtvkQ_130.txt', 'no sound')


def clotho(root):
  for part, file in (('development', 'Distorted AM Radio noise.wav'), ('validation', 'Train coming.wav'),
                     ('evaluation', 'Santa Motor.wav')):
    text(root / f'clotho_captions_{part}.csv', 'file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n'
         f'{file},"A muddled noise of broken channel, on the TV",Two of {part}.,Three.,Four.,Five.\n')
    sound(root / part / file)


def wavcaps(root):
  for source, file, ids in (('AudioSet_SL', 'as', ['Yb0RFKhbpFJA.wav']), ('SoundBible', 'sb', ['2218', '17']),
                            ('FreeSound', 'fsd', ['17'])):
    entries = [{'id': i, 'caption': f'{source} {i}', 'audio': 'wav_path', 'duration': 10.0} for i in ids]
    text(root / f'json_files/{source}/{file}_final.json', json.dumps({'num_captions_per_audio': 1, 'data': entries}))
  for name in ('AudioSet_SL_flac/Yb0RFKhbpFJA.flac', 'SoundBible_flac/2218.flac', 'FreeSound_flac/17.flac'):
    sound(root / name)


def auto_acd(root):
  text(root / 'train.csv', 'youtube_id,caption\noPRC3zComfA_000117,"A man speaks, and birds sing"\nAAAAAAAAAAA_000030,Gone\n')
  text(root / 'test.csv', 'youtube_id,caption\n-0jeONf82dE_000021,A crowd cheers\n')
  for name in ('oPRC3zComfA_000117', 'Y-0jeONf82dE'):
    sound(root / f'audio/{name}.wav')


def musiccaps(root):
  text(root / 'musiccaps-public.csv', 'ytid,start_s,end_s,audioset_positive_labels,aspect_list,caption,author_id,'
       'is_balanced_subset,is_audioset_eval\n-0Gj8-vB1q4,30,40,"/m/0140xf,/m/02cjck","[\'low quality\', \'sad, slow\', '
       '""child\'s voice""]","The low quality recording\nfeatures a ballad, with strings.",4,False,True\n'
       '-0SdAVK79lg,30,40,/m/0155w,[\'guitar song\'],A guitar.,0,False,False\n')
  sound(root / 'wavs/[-0Gj8-vB1q4]-[30-40].wav')
  sound(root / 'wavs/-0SdAVK79lg.wav')


def vggsound(root):
  text(root / 'vggsound.csv', '---g-f_I2yQ,1,people marching,test\n--0PQM4-hqg,30,"playing violin, fiddle",train\n'
       '--56QUhyDQM,185,playing tennis,train\n')
  sound(root / 'audio/---g-f_I2yQ_000001.wav')
  sound(root / 'audio/--0PQM4-hqg.wav')


SETS = {function.__name__: function for function in (
    esc50, urbansound8k, fsd50k, gtzan, speech_commands, audiocaps, clotho, wavcaps, auto_acd, musiccaps, vggsound)}
