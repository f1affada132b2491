#!/usr/bin/env bash
# Throughput, MFU and peak memory on one GPU: GPT-2 124M and Llama 1B and 3B shapes, ZeRO 0/1/3, bf16, eager and compiled.
#
#   bash bench/gpu/run.sh [SHAPE ...]      all shapes, or some of: gpt2-124m llama-1b llama-3b
#   bash bench/gpu/run.sh --smallest       one tiny shape on the CPU, to see that it runs
#
# Needs no network and no Ray. Missing wheels may lie in ./wheels (pip download); they are installed into ./wheels/site.
# PYTHON names the interpreter (default: .venv's, else python3).
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
if compgen -G "wheels/*.whl" > /dev/null; then
  "$PYTHON" -m pip install --quiet --no-index --no-deps --upgrade --target wheels/site wheels/*.whl
  export PYTHONPATH="wheels/site:${PYTHONPATH:-}"
fi
export PYTHONPATH="src:.:${PYTHONPATH:-}" TOKENIZERS_PARALLELISM=false
exec "$PYTHON" -m bench.gpu.table "$@"
