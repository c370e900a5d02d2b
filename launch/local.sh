#!/usr/bin/env bash
# The main job on the embedded demo corpus, with all the set-up it needs:
#   bash launch/local.sh [--dry-run] [--config.KEY=VALUE ...]
# Relative paths in the options are taken from the repository's root.
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

if [ "$(uname -s)" = Linux ]; then
  # XLA's CPU client gives its work memory back to the system after every step and gets it again page by page, zeroed.
  # Keeping it in the process saves a small model about a tenth of its processor time.
  tunables=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184
  export GLIBC_TUNABLES=${GLIBC_TUNABLES:-$tunables:glibc.malloc.arena_max=1}
fi
# A second run need not compile again. Inside .venv, because the cache is of no use to another version of JAX.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.venv/cache/jax}

"${run[@]}" .venv/bin/python main.py --config=configs/pretrain.py:demo --workdir=runs/demo "$@"
