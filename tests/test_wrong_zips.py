"""Zips that are no released model's, damaged or hostile: one line each, and nothing of them is taken."""
import io
import stat
import zipfile

import numpy as np
import pytest

from m2d_clap_jax.errors import UserError
from m2d_clap_jax.weights import download, released
from tests.release_server import NAME, OTHER, left, noise, offer, offer_noise, serving, zipped


@pytest.fixture
def server(tmp_path, monkeypatch):
  with serving(tmp_path, monkeypatch) as running:
    yield running


def archive_with(member, **changes):
  """A good zip with one more member."""
  info = zipfile.ZipInfo(member)
  for key, value in changes.items():
    setattr(info, key, value)
  return zipped({f'{NAME}/checkpoint-300.pth': noise(1000), info: b'/etc/passwd'})


def bomb():
  with zipfile.ZipFile(buffer := io.BytesIO(), 'w', zipfile.ZIP_DEFLATED) as archive:
    with archive.open(f'{NAME}/checkpoint-300.pth', 'w') as member:
      for _ in range(320):
        member.write(bytes(1 << 20))
  return buffer.getvalue()


WRONG = {
    'a web page': (b'<!DOCTYPE html><html>Sign in</html>', 'not a readable zip'),
    'nothing': (b'', 'not a readable zip'),
    'no checkpoint': (zipped({f'{NAME}/README.txt': b'hello'}), f'contains no checkpoint (.pth) but {NAME}/README.txt'),
    'another model': (zipped({f'{OTHER}/checkpoint-300.pth': noise(1000)}), f'contains the model {OTHER} instead'),
    'of other patches': (zipped({'mine-80x608p80x2/a.pth': noise(1000)}), 'contains the model mine-80x608p80x2 instead'),
    'two': (zipped({f'{NAME}/a.pth': b'a', f'{NAME}/b.pth': b'b'}), 'contains 2 checkpoints'),
    'leads up': (archive_with('../../evil.pth'), "'../../evil.pth' is a link or leads out"),
    'from the root': (archive_with('/tmp/evil.pth'), "'/tmp/evil.pth' is a link or leads out"),
    'leads up, other slashes': (archive_with(f'{NAME}\\..\\..\\evil'), 'is a link or leads out'),
    'a link': (archive_with(f'{NAME}/link', external_attr=(stat.S_IFLNK | 0o777) << 16), 'is a link or leads out'),
    'a bomb': (bomb(), 'not unpacked: would take 0.3 GB'),
    'damaged inside': (zipped({f'{NAME}/checkpoint-300.pth': b'x' * 1000}).replace(b'x' * 9, b'y' * 9, 1), 'not a readable zip'),
}


@pytest.mark.parametrize('data, told', WRONG.values(), ids=WRONG)
def test_a_wrong_zip_is_told_in_one_line_and_never_taken(data, told, server, tmp_path):
  offer(NAME, data)
  with pytest.raises(UserError) as failure:
    released.fetch(NAME)
  assert told in str(failure.value) and '\n' not in str(failure.value)
  if 'checkpoints' not in told:
    assert left(tmp_path) == []
    offer_noise()
    assert released.fetch(NAME).read_bytes() == noise()
  assert not list(tmp_path.rglob('evil*'))


def test_of_300_damaged_zips_each_is_refused_in_one_line_or_whole(tmp_path):
  rng = np.random.default_rng(0)
  with zipfile.ZipFile(buffer := io.BytesIO(), 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr(f'{NAME}/checkpoint-300.pth', b'weights' * 99)
    archive.writestr(f'{NAME}/README.txt', b'hello' * 9)
  good, refused = buffer.getvalue(), 0
  for i in range(300):
    bad = bytearray(good)
    for place in rng.integers(len(good), size=1 + i % 4):
      bad[place] = rng.integers(256)
    archive, folder = tmp_path / f'{i}.zip', tmp_path / str(i)
    archive.write_bytes(bad[:rng.integers(len(bad))] if i % 10 == 0 else bad)
    try:
      download.unpack(archive, folder, lambda _: True)
      assert next(folder.glob('*.pth')).read_bytes() == b'weights' * 99
    except UserError as error:
      refused += 1
      assert '\n' not in str(error) and not folder.exists()
  assert 100 < refused < 300
