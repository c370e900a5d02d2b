"""Writes a run's scalars to Weights & Biases. Needs the extra `wandb`."""
import os
import tempfile
from collections.abc import Mapping

import wandb

from m2d_clap_jax import paths
from m2d_clap_jax.errors import UserError

RUN = 'wandb.txt'  # in the workdir: the identifier under which a run that continues is found again


def offline() -> bool:
  """Whether the environment keeps runs on this machine."""
  return os.environ.get('WANDB_MODE') == 'offline'


class WandbWriter:
  """Logs to a run of a project. wandb's own variables apply, such as WANDB_MODE=offline and WANDB_ENTITY.

  Rows are handed over at once, to a process of wandb's own that sends them; `close` waits for it.

  Args:
    project: its name.
    workdir: of the run, after whose last part wandb's is named; local files go to WORKDIR/wandb.
    new: whether the run begins; otherwise it goes on where an earlier one was logged.
    settings: of the run, shown there.

  Raises:
    UserError: wandb does not start, as without a network or an account.
  """

  def __init__(self, project: str, workdir, new: bool, settings: dict):
    place = paths.as_path(workdir) / RUN
    name = place.read_text().strip() if not new and place.exists() else wandb.util.generate_id()
    try:
      self._run = wandb.init(
          project=project, name=os.path.basename(os.fspath(workdir).rstrip('/')), id=name, resume=None if offline() else 'allow',
          dir=tempfile.gettempdir() if paths.is_remote(workdir) else os.fspath(workdir),
          settings=wandb.Settings(console='off', silent=True, init_timeout=30))
    except wandb.errors.Error as error:
      raise UserError(f'config.wandb={project}: {" ".join(str(error).split())}: run `wandb login`, or set '
                      'WANDB_MODE=offline') from error
    paths.write_text(place, name + '\n')
    self._run.config.update(settings, allow_val_change=True)
    self.place = self._run.dir if self._run.offline else self._run.url  # where the curves are to be seen

  def write_scalars(self, step: int, scalars: Mapping):
    self._run.log({name: float(value) for name, value in scalars.items()}, step=step)

  def close(self):
    self._run.finish()
