"""The compiler's analysis of a compiled program: its costs and its communication between devices."""
import re
from typing import NamedTuple

import numpy as np

COLLECTIVES = 'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute'
BYTES = {'f32': 4, 's32': 4, 'u32': 4, 'bf16': 2, 'f16': 2, 'pred': 1, 'u8': 1}


class Cost(NamedTuple):
  """Costs per device and call: GFLOP, GB accessed, MB of arguments (state and batch), temporary and total memory."""
  flops: float
  accessed: float
  state: float
  temporary: float
  total: float


def cost(compiled) -> Cost:
  """`compiled`: of jax.jit(...).lower(...).compile(); figures are XLA's cost analysis and buffer assignment."""
  analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
  arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  # Donated memory is both argument and output.
  total = arguments + memory.output_size_in_bytes - memory.alias_size_in_bytes + temporary
  return Cost(analysis.get('flops', 0) / 1e9, analysis.get('bytes accessed', 0) / 1e9,
              *(size / 2 ** 20 for size in (arguments, temporary, total)))


def collectives(compiled) -> list[tuple[str, list[tuple[str, tuple[int, ...]]]]]:
  """[(operation, [(type, shape) of its results])] of the program's communication between devices."""
  found = []
  for results, name in re.findall(rf'= (.*?) ({"|".join(COLLECTIVES)})(?:-start)?\(', compiled.as_text()):
    found.append((name, [(kind, tuple(int(n) for n in dims.split(',') if n))
                         for kind, dims in re.findall(r'(\w+)\[([\d,]*)\]', results)]))
  return found


def size_of(results) -> int:
  """Bytes of an operation's results."""
  return sum(BYTES[kind] * int(np.prod(shape)) for kind, shape in results if kind in BYTES)
