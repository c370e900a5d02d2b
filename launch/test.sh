#!/usr/bin/env bash
# Runs all checks, including set-up: bash launch/test.sh
# Runs only tests, with pytest's options: bash launch/test.sh [OPTION OF PYTEST ...]
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up test
if [ $# -gt 0 ]; then
  exec .venv/bin/python -m pytest -q "$@"
fi

failed=()
# check NAME COMMAND ...: runs the command, and shows its output only if it fails.
check() {
  local name=$1 said
  shift
  if said=$("$@" 2>&1); then
    echo "$name: no findings"
  else
    printf '%s\n%s\n' "$name found:" "$said"
    failed+=("$name")
  fi
}

documentation() {
  NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict -d "$PWD/.venv/cache/site" &&
    grep -q encode_audio .venv/cache/site/api/index.html
}

checks() {
  check ruff .venv/bin/python -m ruff check .
  check shellcheck .venv/bin/shellcheck -x launch/*.sh .ci/run
  check mypy .venv/bin/python -m mypy --cache-dir .venv/cache/mypy
  check documentation documentation
  [ ${#failed[@]} -eq 0 ]
}

# The checks run beside the tests, which often wait, and report after them. Two workers run whole files of tests, in the
# order of tests/conftest.py.
mkdir -p .venv/cache
checks > .venv/cache/checks 2>&1 &
.venv/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=20 || failed+=(tests)
wait $! || failed+=(checks)
cat .venv/cache/checks
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
