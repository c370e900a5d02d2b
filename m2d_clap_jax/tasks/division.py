"""A test part for tables that have none."""
import hashlib


def drawn_tests(labels: dict[str, tuple[str, ...]]) -> set[str]:
  """{file: its labels} -> the files of a fifth of each class (of the first label), at least one of two or more.

  They depend on the names alone, not on the order of the rows.
  """
  classes: dict[tuple[str, ...], list[str]] = {}
  for file in sorted(labels, key=lambda file: hashlib.sha256(file.encode(errors='surrogateescape')).digest()):
    classes.setdefault(labels[file][:1], []).append(file)
  return {file for files in classes.values() for file in files[:max(len(files) // 5, int(len(files) > 1))]}
