#!/usr/bin/env bash
# verl's trainer with the settings of one or more recipes; every recipe's launch.sh ends here.
#
#   recipes/train.sh CONFIG [CONFIG ...] -- [OVERRIDE ...]
#
#   MODEL    folder of the model that is trained
#   DATA     folder with train.parquet and benchmarks.parquet
#   PRESET   of hapo_verl/presets/hapo; default: paper
#   PYTHON   default: python3
#   DRY=1    print the command and run nothing
#
# Where two CONFIGs name a key the later one holds, and an OVERRIDE before both.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

: "${MODEL:?Set MODEL to the folder of the model.}"
: "${DATA:?Set DATA to the folder with train.parquet and benchmarks.parquet.}"

settings=()
while (($#)) && [[ $1 != -- ]]; do
    if wrong="$(grep -nvE '^(#.*|[^#: ]+: [^ ].*)?$' "$1")"; then
        echo "train.sh: $1, line $wrong: not 'key: value' on one line, nor a comment." >&2
        exit 2
    fi
    mapfile -t -O "${#settings[@]}" settings < <(sed -nE 's/^([^#: ]+): (.*)$/\1=\2/p' "$1")
    shift
done
if ! ((${#settings[@]})) || ! (($#)); then
    echo "usage: recipes/train.sh CONFIG [CONFIG ...] -- [OVERRIDE ...]" >&2
    exit 2
fi
shift

command=(
    "${PYTHON:-python3}" -m verl.trainer.main_ppo
    "+hapo=${PRESET:-paper}"
    "${settings[@]}"
    "actor_rollout_ref.model.path=$MODEL"
    "data.train_files=$DATA/train.parquet"
    "data.val_files=$DATA/benchmarks.parquet"
    "reward.custom_reward_function.path=$here/qwen2.5_math_7b_openr1/reward.py"
    "trainer.experiment_name=${PRESET:-paper}"
    "$@"
)
if [[ -n ${DRY:-} ]]; then
    printf '%q ' "${command[@]}"
    echo
else
    if [[ -n ${RAY_ADDRESS:-} ]]; then . "$here/ray_token.sh"; fi
    exec "${command[@]}"
fi
