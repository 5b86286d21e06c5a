#!/usr/bin/env bash
# Accuracy on benchmarks.parquet, of the model or of a checkpoint of verl's:
#   MODEL=... DATA=... recipes/qwen2.5_math_7b_openr1/evaluate.sh [.../global_step_500] [OVERRIDE ...]
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"

resume=(trainer.resume_mode=disable)
if [[ ${1:-} == *global_step_* && ${1:-} != *=* ]]; then
    resume=(trainer.resume_mode=resume_path "trainer.resume_from_path=$1")
    shift
fi
exec "$here/../train.sh" "$here/config.yaml" -- trainer.val_only=true "${resume[@]}" "$@"
