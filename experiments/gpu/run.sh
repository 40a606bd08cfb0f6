#!/usr/bin/env bash
# Measures a split on the GPU of this machine: ./experiments/gpu/run.sh [OUT]
# Installs nothing: python3 needs torch, transformers, peft and safetensors. Ends within eight minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."
out="${1:-experiments/gpu/result.json}"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONPATH="$PWD"
export CUBLAS_WORKSPACE_CONFIG=:4096:8   # products whose sums have one order, so that equal means equal
timeout 470 "${PYTHON:-python3}" -m experiments.gpu.measure --out "$out" "${@:2}"
