#!/usr/bin/env bash
# Several machines with 8 GPUs each, Ray started by hand:
#
#   on the first machine     recipes/ray_cluster/launch.sh head
#   on each other machine    recipes/ray_cluster/launch.sh worker <address of the first>
#   on the first machine     NODES=2 MODEL=... DATA=... recipes/ray_cluster/launch.sh train [OVERRIDE ...]
#
# What follows head and worker goes to `ray start`. RAY_PORT: default 6379. DRY=1 prints each command and runs nothing.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
port="${RAY_PORT:-6379}"
. "$here/../ray_token.sh"

run() {
    if [[ -n ${DRY:-} ]]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

case "${1:-}" in
head)
    shift
    run ray start --head --port="$port" --disable-usage-stats "$@"
    ;;
worker)
    address="${2:?Give the address of the first machine.}"
    shift 2
    run ray start --address="$address:$port" --disable-usage-stats "$@"
    ;;
train)
    shift
    : "${NODES:?Set NODES to the number of machines.}"
    export RAY_ADDRESS="${RAY_ADDRESS:-auto}"
    run "${PYTHON:-python3}" "$here/wait_for_nodes.py" "$NODES"
    exec "$here/../train.sh" "$here/../qwen2.5_math_7b_openr1/config.yaml" "$here/config.yaml" -- \
        "trainer.nnodes=$NODES" "$@"
    ;;
*)
    echo "usage: recipes/ray_cluster/launch.sh head | worker ADDRESS | train [OVERRIDE ...]" >&2
    exit 2
    ;;
esac
