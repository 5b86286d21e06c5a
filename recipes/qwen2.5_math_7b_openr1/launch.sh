#!/usr/bin/env bash
# One node with 8 GPUs: MODEL=... DATA=... [PRESET=plus] [DRY=1] recipes/qwen2.5_math_7b_openr1/launch.sh [OVERRIDE ...]
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"

exec "$here/../train.sh" "$here/config.yaml" -- "$@"
