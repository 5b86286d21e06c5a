#!/usr/bin/env bash
# 32B on the Ray cluster that this machine belongs to: [NODES=4] MODEL=... DATA=... recipes/qwen2.5_32b_fsdp2/launch.sh
# The cluster is started as in recipes/ray_cluster. DRY=1 prints the command and runs nothing.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"

export RAY_ADDRESS="${RAY_ADDRESS:-auto}"
exec "$here/../train.sh" \
    "$here/../qwen2.5_math_7b_openr1/config.yaml" "$here/../ray_cluster/config.yaml" "$here/config.yaml" -- \
    "trainer.nnodes=${NODES:-4}" "$@"
