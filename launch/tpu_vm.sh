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

run_here tpu "$@" --distributed
