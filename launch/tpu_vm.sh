#!/usr/bin/env bash
# Runs a job on the Cloud TPU of this machine, including set-up, and restarts it when it is preempted or stalls.
# Every machine of a pod slice runs the same command, which launch/tpu.sh arranges:
#   bash launch/tpu_vm.sh [--dry-run] --config=configs/pretrain.py --workdir=gs://BUCKET/runs/NAME [OPTION OF main.py ...]
set -euo pipefail
# The machines' default Python may be older than JAX requires.
if [ -z "${PYTHON:-}" ] && [ "${1:-}" != --dry-run ] && ! [ -x .venv/bin/python ]; then
  command -v python3.11 >/dev/null || { sudo apt-get -q update && sudo apt-get -qy install python3.11 python3.11-venv; }
  export PYTHON=python3.11
fi
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# Overlaps the all-reduce of gradients with the backward pass (the first two, from one of MaxText's sets of flags for data
# parallelism), and the gathering of divided parameters with computation (the others).
export LIBTPU_INIT_ARGS="--xla_tpu_enable_data_parallel_all_reduce_opt=true \
--xla_tpu_data_parallel_opt_different_sized_ops=true --xla_tpu_enable_async_collective_fusion=true \
--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true ${LIBTPU_INIT_ARGS:-}"

run_here tpu "$@" --distributed
