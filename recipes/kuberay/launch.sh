#!/usr/bin/env bash
# Kubernetes with the KubeRay operator: one RayJob, a head without GPUs and NODES pods with 8 GPUs each.
#
#   IMAGE=... CLAIM=... MODEL=... DATA=... [NODES=2] recipes/kuberay/launch.sh [OVERRIDE ...]
#
#   IMAGE    with verl, vLLM and hapo-verl installed and this repository in REPO (default: /opt/hapo-verl)
#   CLAIM    a PersistentVolumeClaim of many readers and writers, mounted at /mnt/hapo; MODEL and DATA lie there
#   RAY      the image's version of Ray (default: 2.60.0)
#   DRY=1    print the manifest and create nothing
set -euo pipefail

: "${IMAGE:?Set IMAGE to an image with verl, vLLM and hapo-verl.}"
: "${CLAIM:?Set CLAIM to the PersistentVolumeClaim with model and data.}"
: "${MODEL:?Set MODEL to the folder of the model, under /mnt/hapo.}"
: "${DATA:?Set DATA to the folder with train.parquet and benchmarks.parquet, under /mnt/hapo.}"
nodes="${NODES:-2}"
recipes="${REPO:-/opt/hapo-verl}/recipes"

entrypoint="$(printf '%q ' env "MODEL=$MODEL" "DATA=$DATA" "PRESET=${PRESET:-paper}" \
    "$recipes/train.sh" \
    "$recipes/qwen2.5_math_7b_openr1/config.yaml" \
    "$recipes/ray_cluster/config.yaml" \
    "$recipes/kuberay/config.yaml" -- \
    "trainer.nnodes=$nodes" "$@")"

create() {
    if [[ -n ${DRY:-} ]]; then cat; else kubectl create --filename=-; fi
}

create <<YAML
apiVersion: ray.io/v1
kind: RayJob
metadata:
  generateName: hapo-
spec:
  entrypoint: |-
    $entrypoint
  shutdownAfterJobFinishes: true
  rayClusterSpec:
    rayVersion: "${RAY:-2.60.0}"
    headGroupSpec:
      rayStartParams: {dashboard-host: "0.0.0.0"}
      template:
        spec:
          containers:
            - name: ray-head
              image: $IMAGE
              resources:
                requests: {cpu: "16", memory: 128Gi}
                limits: {cpu: "16", memory: 128Gi}
              volumeMounts:
                - {name: hapo, mountPath: /mnt/hapo}
                - {name: shm, mountPath: /dev/shm}
          volumes:
            - {name: hapo, persistentVolumeClaim: {claimName: $CLAIM}}
            - {name: shm, emptyDir: {medium: Memory, sizeLimit: 32Gi}}
    workerGroupSpecs:
      - groupName: gpu
        replicas: $nodes
        minReplicas: $nodes
        maxReplicas: $nodes
        rayStartParams: {}
        template:
          spec:
            containers:
              - name: ray-worker
                image: $IMAGE
                resources:
                  requests: {cpu: "64", memory: 512Gi, nvidia.com/gpu: 8}
                  limits: {cpu: "64", memory: 512Gi, nvidia.com/gpu: 8}
                volumeMounts:
                  - {name: hapo, mountPath: /mnt/hapo}
                  - {name: shm, mountPath: /dev/shm}
            volumes:
              - {name: hapo, persistentVolumeClaim: {claimName: $CLAIM}}
              # Ray's object store, and the weights on their way from the actor to vLLM.
              - {name: shm, emptyDir: {medium: Memory, sizeLimit: 256Gi}}
YAML
