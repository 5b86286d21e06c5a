#!/usr/bin/env bash
# Training and rollout on nodes of their own: [NODES=1 training nodes] MODEL=... DATA=... recipes/separate_async/launch.sh
# The cluster, one node more than NODES, is started as in recipes/ray_cluster. DRY=1 prints the command and runs nothing.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"

export RAY_ADDRESS="${RAY_ADDRESS:-auto}"
exec "$here/../train.sh" \
    "$here/../qwen2.5_math_7b_openr1/config.yaml" "$here/../ray_cluster/config.yaml" "$here/config.yaml" -- \
    "trainer.nnodes=${NODES:-1}" "$@"
