"""Reads compiled programs: memory, arithmetic, traffic of the main memory, and communication between devices.

A program's text (`compiled.as_text()`) lists computations of instructions, in the order in which they run:

  %fusion.1 = bf16[64,768]{1,0:T(8,128)(2,1)S(1)} fusion(%copy.3, %param.2), kind=kOutput, calls=%fused_computation.1

A layout's T(8,128) says that the last two axes are padded to tiles of 8 x 128; S(1) that the array lies in the fast
memory of a TPU core (VMEM) and not in its main memory (HBM).
"""
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from m2d_clap_jax.planning.arithmetic import convolution_flops

COLLECTIVES = 'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute'
BITS = {'f32': 32, 's32': 32, 'u32': 32, 'bf16': 16, 'f16': 16, 's16': 16, 'u16': 16, 's8': 8, 'u8': 8, 'pred': 8,
        's64': 64, 'u64': 64, 'f64': 64, 's4': 4, 'u4': 4}
# They move nothing themselves: names for arrays, and the ends of what was counted at its start.
FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'partition-id', 'replica-id',
        'opt-barrier', 'while', 'call', 'conditional', 'add-dependency'}
FREE_CALLS = 'ConcatBitcast', 'AsyncCollectiveDone'
SLICES = {'slice', 'dynamic-slice', 'gather'}  # read as much of their first operand as they return


class Collective(NamedTuple):
  """Communication between devices: what it returns on each, how often it runs, and what runs between its start and its end
  [(computation, instruction)]; None where the device waits for it."""
  operation: str
  results: list['Array']
  times: int
  during: list[tuple[str, 'Instruction']] | None

  @property
  def bytes(self) -> int:
    """Of its results, once, without padding."""
    return sum(math.prod(each.shape) * BITS.get(each.kind, 0) // 8 for each in self.results)


class Array(NamedTuple):
  """An array in a program: dtype, shape, and its layout as written."""
  kind: str
  shape: tuple[int, ...]
  layout: str = ''

  @property
  def bytes(self) -> int:
    """Bytes that it occupies, with the padding of its tiles."""
    order, _, rest = self.layout.partition(':')
    major_to_minor = [int(axis) for axis in reversed(order.split(','))] if order else range(len(self.shape))
    dims = [self.shape[axis] for axis in major_to_minor]
    tile = re.match(r'T\(([\d,]+)\)', rest)
    for back, size in enumerate(reversed(tile[1].split(',')) if tile and dims else (), 1):
      if back <= len(dims):
        dims[-back] = -(-dims[-back] // int(size)) * int(size)
    return math.prod(dims) * BITS.get(self.kind, 0) // 8

  @property
  def in_main_memory(self) -> bool:
    return 'S(' not in self.layout


@dataclasses.dataclass
class Instruction:
  """results: its arrays, a tuple's elements one after the other; rest: attributes as written."""
  name: str
  operation: str
  results: list[Array]
  operands: list[str]  # names; of a parameter its number, of a constant its value
  rest: str
  root: bool

  def attribute(self, name: str) -> str:
    """The computation that an attribute like calls=%fused_computation.1 names, or ''."""
    found = re.search(rf'\b{name}=%?([\w.\-]+)', self.rest)
    return found[1] if found else ''

  @property
  def of(self) -> str:
    """What in the model it comes from, as JAX named it."""
    found = re.search(r'op_name="([^"]*)"', self.rest)
    return found[1] if found else ''


def arrays(text: str) -> list[Array]:
  """All arrays of a type as written, from left to right."""
  return [Array(kind, tuple(int(n) for n in dims.split(',') if n), layout or '')
          for kind, dims, layout in re.findall(r'(\w+)\[([\d,]*)\](?:\{([^{}]*)\})?', text)]


def _closing(text: str, start: int) -> int:
  """Index behind the bracket that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] in '([{') - (text[i] in ')]}')
    if not depth:
      return i + 1
  return len(text)


def _instruction(line: str) -> Instruction | None:
  found = re.match(r'\s+(ROOT )?%?([\w.\-]+) = ', line)
  if not found:
    return None
  start = found.end()
  end = _closing(line, start) if line[start] == '(' else line.index(' ', start)
  operation = re.match(r'\s*([\w\-]+)\(', line[end:])
  if not operation:
    return None
  opening = end + operation.end() - 1
  closing = _closing(line, opening)
  inside = line[opening + 1:closing - 1]
  operands = [inside] if operation[1] in ('parameter', 'constant') else re.findall(r'%([\w.\-]+)', inside)
  return Instruction(found[2], operation[1], arrays(line[start:end]), operands, line[closing:], bool(found[1]))


class Program:
  """A compiled program's text, read."""

  def __init__(self, text: str):
    self.computations: dict[str, dict[str, Instruction]] = {}
    self._ends: dict[tuple[int, str], Instruction] = {}  # of asynchronous operations, by computation and start
    current: dict[str, Instruction] = {}
    for line in text.splitlines():
      header = re.match(r'(ENTRY )?%?([\w.\-]+) .*\{$', line)
      if header and not line.startswith((' ', 'HloModule')):
        current = self.computations.setdefault(header[2], {})
        if header[1]:
          self.entry = header[2]
      elif instruction := _instruction(line):
        current[instruction.name] = instruction
        if instruction.operation.endswith('-done'):
          self._ends[id(current), instruction.operands[0]] = instruction

  def steps(self, computation: str | None = None, times: int = 1) -> Iterator[tuple[str, Instruction, int]]:
    """(computation, instruction, how often it runs) of the instructions that run one by one, those of loops included."""
    name = computation or self.entry
    for instruction in self.computations[name].values():
      yield name, instruction, times
      if instruction.operation == 'while':
        yield from self.steps(instruction.attribute('body'), times * self._trips(name, instruction))
      elif instruction.operation == 'call':
        yield from self.steps(instruction.attribute('to_apply'), times)

  def _trips(self, computation: str, loop: Instruction) -> int:
    """How often a loop runs: the number that its counter, which starts at 0, is compared with; 1 where that is not found."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
      return int(known[1])
    condition = self.computations[loop.attribute('condition')]
    compared = [condition[name] for name in self._root(loop.attribute('condition')).operands if name in condition]
    start = self.computations[computation][loop.operands[0]]
    for each in compared:
      if each.operation == 'get-tuple-element' and start.operation == 'tuple':  # handed to the loop from outside
        each = self.computations[computation][start.operands[int(re.search(r'index=(\d+)', each.rest)[1])]]
      if each.operation == 'constant' and each.operands[0].isdigit() and int(each.operands[0]):
        return int(each.operands[0])
    return 1

  def flops(self, computation: str, instruction: Instruction) -> float:
    """Of the matrix products in an instruction, once; a custom call states its own."""
    if instruction.operation in ('convolution', 'dot'):
      left, right = (self.computations[computation][name].results[0].shape for name in instruction.operands[:2])
      return convolution_flops(left, right, instruction.results[0].shape, instruction.rest)
    if instruction.operation == 'custom-call':
      stated = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', instruction.rest)
      return float(stated[1]) if stated else 0.0
    called = instruction.attribute('calls')
    return sum(self.flops(called, each) for each in self.computations.get(called, {}).values())

  def traffic(self, computation: str, instruction: Instruction) -> int:
    """Bytes that an instruction reads from the main memory and writes to it, once."""
    operation = instruction.operation
    if operation in FREE or operation.endswith(('-done', '-update')):
      return 0
    siblings = self.computations[computation]
    operands = [siblings[name].results for name in instruction.operands if name in siblings]
    results = instruction.results
    if operation.endswith('-start'):
      operation = operation.removesuffix('-start')
      # A start's own type repeats its operands; what it makes is the type of its end.
      results = self._ends.get((id(siblings), instruction.name), instruction).results
    written = sum(each.bytes for each in results if each.in_main_memory)
    if operation in SLICES and operands:
      kept = sum(each.bytes for each in results)
      return written + (kept if operands[0][0].in_main_memory else 0)
    if operation == 'dynamic-update-slice':
      update = operands[1][0]
      return sum(update.bytes for each in (update, results[0]) if each.in_main_memory)
    called = instruction.attribute('calls')
    if any(f'custom_call_target="{name}"' in each.rest for name in FREE_CALLS
           for each in (instruction, *([self._root(called)] if called in self.computations else []))):
      return 0
    if operation == 'fusion' and called in self.computations:
      read = sum(self._read_by(called, i, operand[0]) for i, operand in enumerate(operands)
                 if operand and operand[0].in_main_memory)
      return read + self._written_by(called, results)
    return written + sum(each.bytes for operand in operands for each in operand if each.in_main_memory)

  def _root(self, computation: str) -> Instruction:
    return next(each for each in self.computations[computation].values() if each.root)

  def _read_by(self, fused: str, index: int, whole: Array) -> int:
    """Bytes that a fusion reads of its operand: what it slices of it, or nothing where it updates a part in place."""
    inside = self.computations[fused]
    own = next(each.name for each in inside.values() if each.operation == 'parameter' and each.operands == [str(index)])
    sizes = [self._read_of(inside, user, own, whole) for user in inside.values() if own in user.operands]
    return min(sum(sizes), whole.bytes)

  def _read_of(self, inside, user: Instruction, name: str, whole: Array) -> int:
    if user.operation == 'bitcast':
      return sum(self._read_of(inside, each, user.name, whole) for each in inside.values()
                 if user.name in each.operands)
    if user.operation == 'tuple' or user.operation in COLLECTIVES:
      return 0  # handed on; a collective is counted where it starts, as what the start returns
    first = user.operands.index(name) == 0
    if user.operation in SLICES and first:
      return user.results[0].bytes
    if user.operation == 'dynamic-update-slice' and first:
      return 0
    if user.operation == 'fusion':
      return sum(self._read_by(user.attribute('calls'), i, whole) for i, each in enumerate(user.operands) if each == name)
    return whole.bytes

  def _written_by(self, fused: str, results: list[Array]) -> int:
    """Bytes of a fusion's results in the main memory; of those updated in place, the updates."""
    inside = self.computations[fused]
    root = self._root(fused)
    roots = [inside[name] for name in root.operands] if root.operation == 'tuple' else [root]
    total = 0
    for i, each in enumerate(results):
      made = roots[i] if i < len(roots) and len(roots) == len(results) else root
      while made.operation == 'bitcast' and made.operands[0] in inside:
        made = inside[made.operands[0]]
      if made.operation == 'parameter' or made.operation in COLLECTIVES:
        continue
      if made.operation == 'fusion' and len(made.results) == 1 and len(results) == 1:
        total += self._written_by(made.attribute('calls'), results)
      elif each.in_main_memory:
        total += inside[made.operands[1]].results[0].bytes if made.operation == 'dynamic-update-slice' else each.bytes
    return total

  def collectives(self) -> list[Collective]:
    """In the order in which they start."""
    found, open_ = [], {}
    for computation, instruction, times in self.steps():
      inner = self._collective_in(computation, instruction)
      if instruction.operation.endswith('-done') and instruction.operands[0] in open_:
        index = open_.pop(instruction.operands[0])
        found[index] = found[index]._replace(results=instruction.results)
        continue
      if inner and self._marks(instruction, 'AsyncCollectiveDone'):
        open_.pop(_channel(inner), None)
        continue
      carried = inner and _channel(inner) in open_
      starts = instruction.operation.endswith('-start') or self._marks(instruction, 'AsyncCollectiveStart')
      if not (inner and not carried):  # one of the things that run meanwhile
        for index in open_.values():
          found[index].during.append((computation, instruction))
        continue
      if starts:
        open_[instruction.name if instruction.operation.endswith('-start') else _channel(inner)] = len(found)
      found.append(Collective(inner.operation.removesuffix('-start'), inner.results, times, [] if starts else None))
    return found

  def _collective_in(self, computation: str, instruction: Instruction) -> Instruction | None:
    if instruction.operation.removesuffix('-start') in COLLECTIVES:
      return instruction
    inside = self.computations.get(instruction.attribute('calls'), {})
    return next((each for each in inside.values() if each.operation in COLLECTIVES), None)

  def _marks(self, instruction: Instruction, target: str) -> bool:
    called = instruction.attribute('calls')
    return called in self.computations and f'custom_call_target="{target}"' in self._root(called).rest


def _channel(instruction: Instruction) -> str:
  found = re.search(r'channel_id=(\d+)', instruction.rest)
  return f'channel {found[1]}' if found else instruction.name
