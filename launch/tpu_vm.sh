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

# Sums the gradients beside the backward pass, as far as each is an array of its own (docs/pods.md has what each flag does).
export LIBTPU_INIT_ARGS="--xla_jf_crs_combiner_threshold_in_bytes=1000000 --xla_enable_async_all_reduce=true \
--xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true ${LIBTPU_INIT_ARGS:-}"

run_here tpu "$@" --distributed
