"""`m2d-clap plan`: settings for pre-training on a TPU, from its compiler."""
import sys

from m2d_clap_jax.errors import UserError

EPOCHS, CLIPS = 300, 2_000_000  # of AudioSet, the paper's run


def add_arguments(p):
  """Declares the TPU, the size of the model and the batch."""
  p.description = """\
Compiles the pre-training update for a TPU, without one, and prints settings
with which it fits: whether to divide the state (fsdp), to recompute
activations (remat) or to compute the batch in parts (accumulate), with the
memory of a device and the least possible time. Needs libtpu
(pip install 'm2d-clap-jax[tpu-compile]'); takes minutes on a few cores."""
  p.epilog = """\
example:
  m2d-clap plan --topology=v5e-256 --size=base"""
  p.add_argument('--topology', required=True, metavar='TYPE-N', help='v5e-N, v5p-N or v6e-N, as Cloud TPU counts')
  p.add_argument('--size', choices=('base', 'large'), default='base', help='of the model (default: base)')
  p.add_argument('--batch', type=int, default=2048, help='over all devices (default: 2048)')


def run(args):
  """Compiles until an update fits, and prints its settings; UserError if none does."""
  import jax
  jax.config.update('jax_platforms', 'cpu')  # a TPU that is there is not needed either
  from m2d_clap_jax.models import M2DCLAP, SIZES
  from m2d_clap_jax.planning import machines
  from m2d_clap_jax.planning.choice import trials
  machine = machines.find(args.topology)
  if args.batch < 1 or args.batch % machine.devices:
    raise UserError(f'--batch={args.batch}: must be a multiple of the {machine.devices} devices of {args.topology}')
  machines.devices(machine)
  model, chip = M2DCLAP(**SIZES[args.size], dtype='bfloat16'), machine.chip
  print(f'{args.topology}: {machine.devices} devices of {chip.teraflops} TFLOP/s and {chip.memory / 2 ** 30:.2f} GB; '
        f'{args.size}, batch {args.batch}, {args.batch // machine.devices} samples a device')

  def started(plan):
    print(f'compiling with {plan.options()} ...', file=sys.stderr)
  for trial in trials(model, machine, args.batch, started):
    if trial.memory > chip.memory:
      print(f'too much: {trial.memory / 2 ** 30:.1f} GB with {trial.plan.options()}')
  if trial.memory > chip.memory:
    raise UserError(f'{args.size} with --batch={args.batch} does not fit on {args.topology}: take more devices or a smaller '
                    'batch')
  seconds, own = trial.needs.seconds(chip), args.batch / machine.devices
  print(f'use: --config=configs/pretrain.py:{args.size} --config.batch_size={args.batch} {trial.plan.options()}\n'
        f'memory of a device: {trial.memory / 2 ** 30:.1f} of {chip.memory / 2 ** 30:.2f} GB\n'
        f'an update: at least {1e3 * seconds:.1f} ms, at most {trial.needs.utilisation(model, own, chip):.0%} of the peak rate\n'
        f'{EPOCHS} epochs of AudioSet ({CLIPS:,} clips): at least {EPOCHS * CLIPS / args.batch * seconds / 3600:.1f} hours')
