#!/usr/bin/env bash
# The one command of a folder that `make gpu-bundle` made: at most ten minutes, then the results are in OUT.
#
#     OUT=results bash run.sh [--minutes 8] [--rehearse]
#
# Needs torch, Triton, transformers and pytest (xdist, hypothesis and jaxtyping where there are); no network. LIMIT_S is
# the end, 590 seconds where nothing is said.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
OUT=${OUT:-$PWD/results}
peers=$(mktemp -d)
trap 'rm -rf "$peers"' EXIT
for wheel in wheels/*.whl; do
    [ -e "$wheel" ] && python -m zipfile -e "$wheel" "$peers"
done
export PYTHONPATH="$PWD/kernels:$peers${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONDONTWRITEBYTECODE=1
timeout --kill-after=10 "${LIMIT_S:-590}" python bench/gpu.py --out "$OUT" "$@"
