"""Options for opening a model, the same for every command that opens one."""
import argparse

KINDS = ("a run's workdir, a portable folder, a .pth or a .safetensors file, a released model's name (m2d-clap models), or "
         'hf://ORGANISATION/NAME on the Hugging Face Hub')
FIELDS = ('sample_rate', 'text_encoder', 'input_size', 'heads')


def add_overrides(parser):
  """Adds options for values that a file may lack; `overrides` passes them to `weights.read`."""
  group = parser.add_argument_group('values that a public checkpoint may lack or state wrongly')
  group.add_argument('--sample_rate', type=int, metavar='HZ', help='16000 or 32000')
  group.add_argument('--text_encoder', metavar='NAME', help="the captions' encoder: model name, folder or minilm")
  group.add_argument('--input_size', type=pair, metavar='BINS,FRAMES', help='of a training crop, such as 80,608')
  group.add_argument('--heads', type=int, metavar='N', help="of the encoder's attention (default: width / 64)")


def add_pipeline(parser):
  """Adds the options of `open_pipeline`."""
  parser.add_argument('--model', required=True, help=KINDS)
  parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16'],
                      help='of the matrix products; bfloat16 is faster on accelerators (default: %(default)s)')
  parser.add_argument('--batch_size', type=positive, default=32, metavar='N',
                      help='chunks of audio that the device processes at a time (default: %(default)s)')
  add_overrides(parser)


def overrides(args) -> dict:
  """The given options of `add_overrides`, as arguments of `weights.read`."""
  return {name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None}


def open_pipeline(args):
  """The Pipeline of --model; UserError without a usable model."""
  from m2d_clap_jax.api import load
  return load(args.model, dtype=args.dtype, batch_size=args.batch_size, **overrides(args))


def pair(text: str) -> tuple[int, int]:
  """An option of two numbers: '80,608' or '80x608'."""
  try:
    first, second = (int(part) for part in text.replace('x', ',').split(','))
  except ValueError:
    raise argparse.ArgumentTypeError(f'{text!r} is not two numbers, as in 80,608') from None
  return first, second


def positive(text: str) -> int:
  """An option that counts something."""
  if not text.isdecimal() or not int(text):
    raise argparse.ArgumentTypeError(f'{text!r} is not a whole number of at least 1')
  return int(text)
