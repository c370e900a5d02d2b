#!/usr/bin/env bash
# Runs the main job on the embedded demo corpus, including set-up:
#   bash launch/local.sh [--dry-run] [--config.KEY=VALUE ...]
# Relative paths in the options start at the repository's root.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
run=(exec)
if [ "${1:-}" = --dry-run ]; then
  run=(echo)
  shift
else
  set_up
fi

# Spares a second run the compilation. Inside .venv, because another version of JAX cannot use the cache.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.venv/cache/jax}

"${run[@]}" .venv/bin/python main.py --config=configs/pretrain.py:demo --workdir=runs/demo "$@"
