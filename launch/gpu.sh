#!/usr/bin/env bash
# A job on all GPUs of this machine, with all the set-up it needs, started again when it is preempted or stalls:
#   bash launch/gpu.sh [--dry-run] --config=configs/pretrain.py --workdir=runs/NAME [OPTION OF main.py ...]
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

run=()
if [ "${1:-}" = --dry-run ]; then
  run=(echo)
  shift
else
  set_up cuda
fi
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.venv/cache/jax}

until_done "${run[@]}" .venv/bin/python main.py "$@"
