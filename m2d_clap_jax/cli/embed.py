"""`m2d-clap embed`: embeddings of many audio files in one file."""
from m2d_clap_jax.audio.names import printable
from m2d_clap_jax.cli import model_options
from m2d_clap_jax.errors import UserError


def add_arguments(p):
  """Declares files, the kind of embedding and the file to write."""
  p.description = """\
Audio files of any rate and length -> a file of their embeddings: clip
embeddings for transfer learning by default, others with --clap or --frames.
Folders are searched with all sub-folders. Files that cannot be used are left
out and listed in OUT.rejected.csv."""
  p.epilog = """\
examples:
  m2d-clap embed recordings/ --model runs/clips -o recordings.npz
  m2d-clap embed a.wav b.mp3 --model exported/ --frames -o frames.parquet

A .npz contains files [n] and embeddings [n, C]; with --frames, files [n] and
for file i frames/i [T, C], times/i [T] in ms. A .parquet has one row per clip
or frame: file, time_ms (of frames), embedding."""
  p.add_argument('paths', nargs='+', metavar='FILE|FOLDER', help='audio: wav, flac, mp3, m4a, ogg, webm and others')
  p.add_argument('-o', '--out', required=True, metavar='OUT', help='file to write: .npz or .parquet')
  kind = p.add_mutually_exclusive_group()
  kind.add_argument('--frames', action='store_true', help='one feature per time column (160 ms for most models)')
  kind.add_argument('--clap', action='store_true', help='CLAP audio embeddings, comparable with captions')
  model_options.add_pipeline(p)


def run(args):
  """Embeds the files into --out and prints how many; UserError if none can be used."""
  from m2d_clap_jax.audio import files
  from m2d_clap_jax.cli import embedding_files
  writer_kind = embedding_files.writer_for(args.out)
  names = files.find(args.paths)
  rejected, count = [], 0
  with embedding_files.replacing(args.out) as temporary:
    model = model_options.open_pipeline(args)
    function, width = _function(args, model)
    about = {'model': model.weights.source, 'fingerprint': model.fingerprint, 'sample_rate': model.sample_rate,
             'kind': 'frames' if args.frames else 'clap' if args.clap else 'clip'}
    with writer_kind(temporary, width, args.frames, about) as writer:
      for name, result, reason, _ in files.results(names, function):
        if reason:
          rejected.append((printable(name), reason))
        else:
          writer.add(printable(name), *result)
          count += 1
      if not count:
        raise UserError(f'none of the {len(names)} files can be used (the first: {rejected[0][0]}: {rejected[0][1]}); '
                        f'{args.out} was not written')
  listed = embedding_files.write_rejected(args.out, rejected)
  left_out = f'; {len(rejected)} left out, listed in {listed}' if rejected else ''
  print(f'{args.out}: {count} of {len(names)} files, {width} numbers {"a frame" if args.frames else "each"}{left_out}')


def _function(args, model):
  """-> (function of clips that returns, for each, the arguments of `Writer.add` after the name; embedding width)."""
  width = model.network.width
  if args.frames:
    return lambda clips: list(zip(*model.encode_frames(clips))), model.network.grid[0] * width
  if args.clap:
    if model.network.text_width is None:
      raise UserError(f'--clap: {model.weights.source} has no CLAP head; leave --clap out')
    return lambda clips: [(row,) for row in model.encode_audio(clips)], width
  return lambda clips: [(row,) for row in model.embed(clips)], model.network.grid[0] * width
