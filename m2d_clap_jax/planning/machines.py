"""TPUs by name: their data sheets, and their devices as the compiler sees them, on a machine that has none."""
import importlib.util
import math
import os
import re
from typing import NamedTuple

from m2d_clap_jax.errors import UserError


class Chip(NamedTuple):
  """A device. Rates are those of its page in Google's documentation (docs.cloud.google.com/tpu/docs/v5e, v5p, v6e).

  teraflops: dense bfloat16 peak; bandwidth: GB/s of its main memory; links: GB/s that it sends to its neighbours, half of
  the bidirectional rate; memory: bytes that a program may use, as the compiler's own out-of-memory error states them.
  """
  name: str
  teraflops: float
  bandwidth: float
  links: float
  memory: int


CHIPS = {chip.name: chip for chip in (
    Chip('v5e', 197, 819, 200, int(15.75 * 2 ** 30)),
    Chip('v5p', 459, 2765, 600, int(95.74 * 2 ** 30)),
    Chip('v6e', 918, 1638, 400, int(31.25 * 2 ** 30)))}
# Number in a machine's name -> its grid of chips. v5p counts cores, of which a chip has two.
FLAT = {4: '2x2', 8: '2x4', 16: '4x4', 32: '4x8', 64: '8x8', 128: '8x16', 256: '16x16'}
GRIDS = {'v5e': FLAT, 'v6e': FLAT,
         'v5p': {8: '2x2x1', 16: '2x2x2', 32: '2x2x4', 64: '2x4x4', 128: '4x4x4', 256: '4x4x8', 512: '4x8x8',
                 1024: '8x8x8'}}


class Machine(NamedTuple):
  """name: as in 'v5e-256'; grid: of its chips, as in '16x16'."""
  name: str
  chip: Chip
  grid: str

  @property
  def devices(self) -> int:
    return math.prod(map(int, self.grid.split('x')))


def find(name: str) -> Machine:
  """'v5e-256', also 'v5litepod-256' as Google Cloud has it -> its description; UserError for others."""
  kind, _, number = name.replace('v5litepod', 'v5e').partition('-')
  if kind not in GRIDS or not re.fullmatch(r'\d+', number) or int(number) not in GRIDS[kind]:
    known = '; '.join(f'{kind}-N with N one of {", ".join(map(str, grids))}' for kind, grids in GRIDS.items())
    raise UserError(f'--topology={name}: unknown; known are {known}')
  return Machine(name, CHIPS[kind], GRIDS[kind][int(number)])


def devices(machine: Machine) -> list:
  """The machine's devices, for meshes of programs that are compiled but not run. UserError without libtpu."""
  if not importlib.util.find_spec('libtpu'):
    raise UserError('compiling for a TPU needs libtpu, which runs on any Linux machine: pip install "m2d-clap-jax[tpu-compile]"')
  # No device is opened: the compiler need not ask the network which TPU this is, and may run beside other processes.
  for name, value in {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
                      'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0'}.items():
    os.environ.setdefault(name, value)
  from jax.experimental import topologies
  return topologies.get_topology_desc(platform='tpu', topology_name=f'{machine.chip.name}:{machine.grid}').devices
