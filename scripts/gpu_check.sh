#!/bin/sh
# Checks and measures the GPU back end on this machine: python3 with torch, Triton and one GPU is all it needs.
# scripts/gpu_check.sh --help
set -eu
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" scripts/gpu_check.py "$@"
