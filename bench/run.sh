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
unpacked=$(mktemp -d)
trap 'rm -rf "$unpacked"' EXIT
# QuACK takes code in a folder of another name for the caller's own, looks into all of it, and fails in CUTLASS.
peers=$unpacked/site-packages
mkdir "$peers"
# Large wheels come in parts, in folders beside this one.
for piece in "$PWD"_part*/*.whl.*; do
    [ -e "$piece" ] && cat "$piece" >>"$unpacked/$(basename "${piece%.*}")"
done
for wheel in wheels/*.whl "$unpacked"/*.whl; do
    [ -e "$wheel" ] || continue
    python -m zipfile -e "$wheel" "$peers" 2>/dev/null || echo "$(basename "$wheel"): left out, it cannot be unpacked; is a part missing?"
done
export PYTHONPATH="$PWD/kernels:$peers:$peers/nvidia_cutlass_dsl/dsl_packages${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONDONTWRITEBYTECODE=1
timeout --kill-after=10 $((${LIMIT_S:-590} - SECONDS)) python bench/gpu.py --out "$OUT" "$@"
