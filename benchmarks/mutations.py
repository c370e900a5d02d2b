"""Damage of files, drawn at random: of their bytes, and of the values in a JSON file."""
import json

# What a number, text or list of a JSON file may turn into.
HOSTILE = [None, True, False, 0, -1, 1, 2 ** 31, 2 ** 63, 10 ** 300, 1e308, 1e-308, float('nan'), float('inf'), '',
           '../..', 'x' * 300, '\x00', [], {}, [[]], {'a': {}}, [0] * 300]


def mutated(data: bytes, draw, spots=(0,)) -> bytes:
  """One to three changes: flipped bits, bytes put in or taken out, the end cut off, eight bytes of a number swapped.

  Args:
    draw: numpy's random generator.
    spots: offsets near which changes matter most, such as headers; half of the changes are there.
  """
  data = bytearray(data)
  for _ in range(draw.integers(1, 4)):
    near = int(draw.choice(spots)) + int(draw.integers(0, 200))
    at = max(0, min(near if draw.random() < 0.5 else int(draw.integers(max(len(data), 1))), len(data) - 1))
    kind = draw.integers(5)
    if kind == 0:
      data[at:at + 1] = bytes(byte ^ 1 << int(draw.integers(8)) for byte in data[at:at + 1])
    elif kind == 1:
      data[at:at] = draw.bytes(int(draw.integers(1, 20)))
    elif kind == 2:
      del data[at:at + int(draw.integers(1, 20))]
    elif kind == 3:
      del data[max(at, 1):]
    else:
      data[at:at + 8] = data[at:at + 8][::-1] or b'\xff'
  return bytes(data)


def mutated_json(data: bytes, draw, keep_seal: bool) -> bytes:
  """One or two values of a JSON file replaced by hostile ones, keys renamed or left out, or brackets without end.

  keep_seal: leaves the checksum as it was; else it is taken out, as in a file of somebody who wants no check.
  """
  if draw.random() < 0.02:
    return b'[' * 100_000
  content = json.loads(data)
  if not keep_seal:
    content.pop('checksum', None)
  for _ in range(draw.integers(1, 3)):
    node = content
    while True:
      keys = [key for key in node if key != 'checksum'] if isinstance(node, dict) else list(range(len(node)))
      if not keys:
        break
      key = keys[int(draw.integers(len(keys)))]
      if isinstance(node[key], dict | list) and node[key] and draw.random() < 0.7:
        node = node[key]
        continue
      kind = draw.integers(4)
      if kind == 0 and isinstance(node, dict):
        del node[key]
      elif kind == 1 and isinstance(node[key], int | float):
        node[key] = [-node[key], node[key] * 2, node[key] + 1, float(node[key])][int(draw.integers(4))]
      else:
        node[key] = HOSTILE[int(draw.integers(len(HOSTILE)))]
      break
  return json.dumps(content).encode()
