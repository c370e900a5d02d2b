"""The compiler's own analysis of a compiled program; what its text says is read by m2d_clap_jax.planning.program."""
from typing import NamedTuple


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
