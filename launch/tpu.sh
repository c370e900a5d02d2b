#!/usr/bin/env bash
# Runs a job on a Cloud TPU, one machine or a slice of a pod, created for it and deleted at its end; after a preemption
# another TPU is requested, and the run continues:
#   bash launch/tpu.sh [--dry-run] [--spot] NAME ZONE TYPE --config=configs/pretrain.py --workdir=gs://BUCKET/runs/NAME \
#     --config.data.folder=gs://BUCKET/data [OPTION OF main.py ...]
# TYPE is for example v5litepod-8, v5litepod-256, v5p-128 or v6e-64. Needs gcloud, logged in, with a project set. Runs as
# long as the job does: start it in tmux or on a machine that stays up. Only committed files are copied and run.
# JAX_COMPILATION_CACHE_DIR=gs://BUCKET/cache keeps compiled programs for the next TPU; --dry-run prints the commands.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

dry='' spot=()
while [[ "${1:-}" == --dry-run || "${1:-}" == --spot ]]; do
  if [ "$1" = --spot ]; then spot=(--spot); else dry=yes; fi
  shift
done
if [ $# -lt 4 ] || [[ "$1$2$3" == *-config* ]]; then
  echo "error: give a name, a zone and a type, as in: bash $0 --spot run1 us-west4-a v5litepod-16 --config=..." >&2
  exit 2
fi
name=$1 zone=$2 type=$3
shift 3
case $type in
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  *) echo "error: $type: unknown type; known: v5litepod-N, v5p-N, v6e-N" >&2; exit 2 ;;
esac

run() {
  if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}
queued() {
  local verb=$1
  shift
  run gcloud compute tpus queued-resources "$verb" "$name" --zone="$zone" "$@"
}
state() {
  if [ -n "$dry" ]; then queued describe '--format=value(state.state)' >&2; echo "${1:-}"; return; fi
  queued describe '--format=value(state.state)' 2>/dev/null || echo NONE
}
everywhere() {
  run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

archive=$(mktemp -d)/m2d_clap.tar.gz
trap 'rm -rf "$(dirname "$archive")"' EXIT
run git archive --format=tar.gz --output="$archive" HEAD
cache=${JAX_COMPILATION_CACHE_DIR:+JAX_COMPILATION_CACHE_DIR=$(printf %q "$JAX_COMPILATION_CACHE_DIR") }
# Quoting keeps options with spaces and brackets intact through two shells.
command="mkdir -p m2d_clap && tar xzf m2d_clap.tar.gz -C m2d_clap && ${cache}bash m2d_clap/launch/tpu_vm.sh$(printf ' %q' "$@")"

while true; do
  if [ "$(state NONE)" = NONE ]; then
    queued create --node-id="$name" --accelerator-type="$type" --runtime-version="$runtime" ${spot[@]+"${spot[@]}"}
  fi
  until now=$(state ACTIVE) && [[ "$now" == ACTIVE || "$now" == SUSPENDED ]]; do
    if [ "$now" = FAILED ]; then
      echo "error: the request failed; to see why, and to delete it:" >&2
      echo "  gcloud compute tpus queued-resources describe|delete $name --zone=$zone" >&2
      exit 1
    fi
    sleep 30
  done
  code=0
  { run gcloud compute tpus tpu-vm scp "$archive" "$name:m2d_clap.tar.gz" --zone="$zone" --worker=all &&
    everywhere "$command"; } || code=$?
  if [ "$code" != 0 ] && [ "$(state)" = ACTIVE ]; then
    echo "error: the job ended with $code; the TPU is kept, and billed: inspect it, or delete it with" >&2
    echo "  gcloud compute tpus queued-resources delete $name --zone=$zone --force" >&2
    exit "$code"
  fi
  queued delete --force --quiet
  if [ "$code" = 0 ]; then
    exit
  fi
  echo "$name was preempted; requesting another" >&2
done
