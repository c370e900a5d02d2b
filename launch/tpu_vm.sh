#!/usr/bin/env bash
# A job on the Cloud TPU of this machine, with all the set-up it needs, started again when it is told to stop or stalls.
# Of a slice of a pod every machine runs the same command, which launch/tpu.sh sees to:
#   bash launch/tpu_vm.sh [--dry-run] --config=configs/pretrain.py --workdir=gs://BUCKET/runs/NAME [OPTION OF main.py ...]
set -euo pipefail
# The machines' own Python may be older than what JAX needs.
if [ -z "${PYTHON:-}" ] && [ "${1:-}" != --dry-run ] && ! [ -x .venv/bin/python ]; then
  command -v python3.11 >/dev/null || { sudo apt-get -q update && sudo apt-get -qy install python3.11 python3.11-venv; }
  export PYTHON=python3.11
fi
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# The sums of gradients over devices begin while the backward pass still computes (the first two: as one of MaxText's
# sets of flags for data parallelism has it), as do the gatherings of parameters that are divided (the others).
export LIBTPU_INIT_ARGS="--xla_tpu_enable_data_parallel_all_reduce_opt=true \
--xla_tpu_data_parallel_opt_different_sized_ops=true --xla_tpu_enable_async_collective_fusion=true \
--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true ${LIBTPU_INIT_ARGS:-}"

run_here tpu "$@" --distributed
