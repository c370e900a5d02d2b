#!/usr/bin/env bash
# Submits a job on NODES Slurm nodes with GPUS GPUs each, which requeues itself at its time limit or after a preemption:
#   bash launch/slurm.sh [--dry-run] NODES GPUS --config=configs/pretrain.py --workdir=/shared/runs/NAME [OPTION ...]
# The checkout, the data and the workdir must be on storage that all nodes share; the submitting machine creates .venv
# here. SBATCH_PARTITION, SBATCH_ACCOUNT and SBATCH_TIMELIMIT are Slurm's own variables.
# --dry-run prints the batch script instead of submitting it.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

submit=(sbatch)
if [ "${1:-}" = --dry-run ]; then
  submit=(cat)
  shift
fi
if ! [[ "${1:-}" =~ ^[1-9][0-9]*$ && "${2:-}" =~ ^[1-9][0-9]*$ ]]; then
  echo "error: give the numbers of nodes and of GPUs on each, as in: bash $0 4 8 --config=configs/pretrain.py" >&2
  exit 2
fi
nodes=$1 gpus=$2
shift 2
[ "${submit[0]}" = cat ] || set_up cuda
options=$(printf ' %q' "$@")

"${submit[@]}" <<EOF
#!/usr/bin/env bash
#SBATCH --job-name=m2d_clap
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$gpus
#SBATCH --gpus-per-node=$gpus
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Two minutes before the time limit every process gets SIGTERM, saves, and exits with 75.
#SBATCH --signal=TERM@120
cd $(printf %q "$PWD")
export JAX_COMPILATION_CACHE_DIR=\${JAX_COMPILATION_CACHE_DIR:-\$PWD/.venv/cache/jax}
# Sends gradients while the backward pass still computes, as JAX's notes on GPU performance advise.
export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true \${XLA_FLAGS:-}"
code=0
srun --kill-on-bad-exit=1 .venv/bin/python main.py --distributed$options || code=\$?
if [[ "\$code" =~ ^(75|76|134)\$ ]]; then
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit "\$code"
EOF
