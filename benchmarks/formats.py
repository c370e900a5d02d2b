"""How near the embedding of a recording in another format is to that of its WAV file.

  python -m benchmarks.formats runs/small recordings/*.wav

Each recording is encoded as phones, browsers and recorders do, decoded and embedded. A row has the cosines of `embed`
(and of `encode_audio`, if the model has a CLAP head) over the recordings. Two rows say what they are to be compared with:
the WAV file at 8 kHz, which is what a telephone codec is given, and other recordings of the list.
"""
import argparse
import itertools
import os
import pathlib
import tempfile

import numpy as np
import soundfile

import m2d_clap_jax
from benchmarks.recordings import encode
from m2d_clap_jax.audio.decode import load, resample
from m2d_clap_jax.eval.metrics import normalise

RATE = 48000  # of the recordings before they are encoded; the model then resamples all alike
TELEPHONE = 8000
# Ending -> codec of FFmpeg, and the rate in Hz that it is given; libsndfile writes ogg, for which PyAV has no encoder.
FORMATS = {'m4a': ('aac', RATE), 'mp3': ('libmp3lame', RATE), 'webm': ('libopus', RATE), 'wma': ('wmav2', RATE),
           'mp2': ('mp2', RATE), 'caf': ('alac', RATE), 'amr': ('amr_nb', TELEPHONE)}


def versions(path, folder: pathlib.Path) -> dict[str, str]:
  """{'wav': file, format: file} of a recording."""
  wave, _ = load(path, RATE)
  places = {'wav': folder / 'whole.wav', 'wav, 8 kHz': folder / 'telephone.wav', 'ogg': folder / 'a.ogg'}
  soundfile.write(places['wav'], wave, RATE)
  soundfile.write(places['wav, 8 kHz'], resample(wave, RATE, TELEPHONE), TELEPHONE)
  soundfile.write(places['ogg'], wave, RATE)
  for ending, (codec, rate) in FORMATS.items():
    places[ending] = folder / f'a.{ending}'
    encode(places[ending], wave, RATE, codec, to_rate=rate)
  return {name: os.fspath(place) for name, place in places.items()}


def cosines(model, recordings) -> dict[str, dict[str, np.ndarray]]:
  """{kind of embedding: {format: cosine of each recording's to its WAV file's}}."""
  kinds = {'embed': model.embed} | ({'encode_audio': model.encode_audio} if model.network.text_width else {})
  found: dict[str, dict[str, list]] = {kind: {} for kind in kinds}
  for recording in recordings:
    with tempfile.TemporaryDirectory(prefix='m2d_clap_formats_') as folder:
      files = versions(recording, pathlib.Path(folder))
      for kind, function in kinds.items():
        for name, row in zip(files, normalise(function(list(files.values())))):
          found[kind].setdefault(name, []).append(row)
  table = {}
  for kind, rows in found.items():
    wav = np.stack(rows.pop('wav'))
    table[kind] = {name: np.sum(wav * np.stack(each), axis=1) for name, each in rows.items()}
    table[kind]['another recording'] = np.array([a @ b for a, b in itertools.combinations(wav, 2)])
  return table


def main(argv=None):
  parser = argparse.ArgumentParser(prog='python -m benchmarks.formats', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('model', help='anything that m2d_clap_jax.load opens, with trained weights')
  parser.add_argument('recordings', nargs='+', metavar='FILE')
  args = parser.parse_args(argv)
  table = cosines(m2d_clap_jax.load(args.model), args.recordings)
  print(f'{len(args.recordings)} recordings; cosine to the WAV file: ' + ', '.join(f'{kind} median, lowest' for kind in table))
  for name in table['embed']:
    values = '  '.join(f'{np.median(kind[name]):.4f} {kind[name].min():.4f}' for kind in table.values() if len(kind[name]))
    print(f'{name:18} {values}')


if __name__ == '__main__':
  main()
