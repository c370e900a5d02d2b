#!/usr/bin/env bash
# Runs a job on all GPUs of this machine, including set-up, and restarts it when it is preempted or stalls:
#   bash launch/gpu.sh [--dry-run] --config=configs/pretrain.py --workdir=runs/NAME [OPTION OF main.py ...]
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

run_here cuda "$@"
