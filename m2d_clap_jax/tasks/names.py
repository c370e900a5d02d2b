"""Names of labels, and the captions that zero-shot classification compares sounds with."""
import re

from m2d_clap_jax.errors import UserError
from m2d_clap_jax.tables.reader import read_table
from m2d_clap_jax.tasks.table import Settings


def captions_of(classes, settings: Settings, template: str | None = None,
                names: dict[str, str] | None = None) -> tuple[str, ...]:
  """Zero-shot captions: a template of the caller's for the labels, else the table's for what is heard; in both '_'
  becomes a space."""
  names = names or {}

  def caption(label):
    name = names.get(label, label.replace('_', ' '))
    if template:
      return template.replace('{}', name)
    return settings.template.replace('{}', settings.heard.get(label, name))
  return tuple(caption(label) for label in classes)


def read_names(path: str) -> dict[str, str]:
  """AudioSet's class_labels_indices.csv -> {mid: display_name}."""
  table = read_table(path, 'mid', ['display_name'])
  for column in ('mid', 'display_name'):
    if column not in table.columns:
      raise UserError(f'config.data.names={path}: has no column {column!r}, which AudioSet\'s class_labels_indices.csv has')
  names: dict[str, str] = {}
  for row in table.rows:
    mid, name = (str(row.fields.get(column, '')).strip() for column in ('mid', 'display_name'))
    problem = row.reason or ('' if mid and name else 'mid or display_name is empty')
    if problem or names.setdefault(mid, name) != name:
      raise UserError(f'config.data.names={path} {row.where}: {problem or f"{mid} was {names[mid]} above"}: correct it')
  return names


def unnamed(captions) -> str:
  """The first caption that holds an identifier of AudioSet's ('/m/09x0r') in place of a name, else ''."""
  return next((caption for caption in captions if re.search(r'/[mtg]/\w+', caption)), '')
