#!/usr/bin/env bash
# A job on a slice of TPUs in a Kubernetes cluster (GKE, with the JobSet controller, version 0.6 or later):
#   bash launch/gke.sh [--dry-run] NAME IMAGE ACCELERATOR TOPOLOGY --config=configs/pretrain.py \
#     --workdir=gs://BUCKET/runs/NAME --config.data.folder=gs://BUCKET/data [OPTION OF main.py ...]
# IMAGE is built from launch/Dockerfile; ACCELERATOR and TOPOLOGY are the node pool's labels, such as
# tpu-v5-lite-podslice 16x16, or tpu-v5p-slice 4x4x4. CHIPS is the number of chips per machine (4).
# JAX_COMPILATION_CACHE_DIR=gs://BUCKET/cache keeps compiled programs for the next start; --dry-run prints the manifest
# instead of applying it.
set -euo pipefail

apply=(kubectl apply -f -)
if [ "${1:-}" = --dry-run ]; then
  apply=(cat)
  shift
fi
chips=${CHIPS:-4}
if [ $# -lt 5 ] || ! [[ "$4" =~ ^[0-9]+(x[0-9]+){1,2}$ ]] || ((${4//x/*} % chips)); then
  echo "error: give a name, an image, an accelerator and a topology of a multiple of $chips chips, as in:" \
    "bash $0 run1 REGISTRY/m2d_clap tpu-v5-lite-podslice 4x4 --config=configs/pretrain.py" >&2
  exit 2
fi
name=$1 image=$2 accelerator=$3 topology=$4
shift 4
hosts=$((${topology//x/*} / chips))

# Every JSON string is a valid YAML string.
quoted() {
  local text=${1//\\/\\\\}
  printf '"%s"' "${text//\"/\\\"}"
}
options=''
for option in "$@"; do
  options+=", $(quoted "$option")"
done

"${apply[@]}" <<EOF2
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
spec:
  # Preempted (75), stalled (76), another process lost (134), or the machine was taken away: restart all pods without
  # limit; the run continues from its checkpoint. Anything else is an error: three more tries.
  failurePolicy:
    maxRestarts: 3
    rules:
    - action: RestartJobSetAndIgnoreMaxRestarts
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: hosts
    replicas: 1
    template:
      spec:
        completions: $hosts
        parallelism: $hosts
        backoffLimit: 0  # the loss of one host ends the whole job
        podFailurePolicy:
          rules:
          - action: FailJob
            onPodConditions:
            - type: DisruptionTarget
          - action: FailJob
            onExitCodes:
              containerName: main
              operator: In
              values: [75, 76, 134]
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 120
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $accelerator
              cloud.google.com/gke-tpu-topology: $topology
            containers:
            - name: main
              image: $image
              args: ["--distributed"$options]
              ports:
              - containerPort: 8482  # of jax.distributed
              env:
              # As in launch/tpu_vm.sh.
              - name: LIBTPU_INIT_ARGS
                value: >-
                  --xla_jf_crs_combiner_threshold_in_bytes=1000000
                  --xla_enable_async_all_reduce=true
                  --xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true
              - name: JAX_COMPILATION_CACHE_DIR
                value: $(quoted "${JAX_COMPILATION_CACHE_DIR:-}")
              resources:
                requests: {google.com/tpu: $chips}
                limits: {google.com/tpu: $chips}
EOF2
