#!/usr/bin/env bash
# The tests, with all the set-up they need: bash launch/test.sh [OPTION OF PYTEST ...]
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up test
exec .venv/bin/python -m pytest -q "$@"
