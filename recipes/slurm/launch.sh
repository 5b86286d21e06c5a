#!/usr/bin/env bash
# Several nodes with 8 GPUs each on Slurm, submitted from the repository's root:
#
#   MODEL=... DATA=... sbatch --nodes=4 recipes/slurm/launch.sh [OVERRIDE ...]
#
# DRY=1 prints the commands of the job and runs nothing; it needs no Slurm.
#SBATCH --job-name=hapo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=hapo-%j.log
set -euo pipefail

# Slurm runs a copy of this file, so its own folder says nothing.
root="${SLURM_SUBMIT_DIR:-$PWD}"
if [[ ! -x $root/recipes/train.sh ]]; then
    echo "slurm/launch.sh: $root is not the repository's root. Submit from there." >&2
    exit 2
fi

if [[ -n ${DRY:-} ]]; then
    nodes=(node0 node1)
    run() { printf '%q ' "$@" && echo; }
    address=node0
else
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    run() { "$@"; }
    # A host may have several addresses; Ray wants one that the other nodes reach.
    address="$(srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" hostname --ip-address | awk '{print $1}')"
fi

. "$root/recipes/ray_token.sh"

# One Ray process a node, in the foreground of its srun: when the job ends, so do they.
on() {
    local node="$1"
    shift
    run srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" "$root/recipes/ray_cluster/launch.sh" "$@" --block
}
wait_for() { run "${PYTHON:-python3}" "$root/recipes/ray_cluster/wait_for_nodes.py" "$1"; }

export RAY_ADDRESS="$address:${RAY_PORT:-6379}"
on "${nodes[0]}" head &
[[ -z ${DRY:-} ]] || wait
wait_for 1
for node in "${nodes[@]:1}"; do
    on "$node" worker "$address" &
    [[ -z ${DRY:-} ]] || wait
done
wait_for "${#nodes[@]}"
"$root/recipes/train.sh" \
    "$root/recipes/qwen2.5_math_7b_openr1/config.yaml" \
    "$root/recipes/ray_cluster/config.yaml" \
    "$root/recipes/slurm/config.yaml" -- \
    "trainer.nnodes=${#nodes[@]}" "$@"
