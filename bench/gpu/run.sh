#!/usr/bin/env bash
# What one GPU does: checks of what must hold there, the ways to the loss, and throughput, MFU, peak memory against the
# plan and a profile for GPT-2 124M and Llama 1B and 3B shapes in bf16.
#
#   bash bench/gpu/run.sh                              everything: checks, losses, the table, smallest shape first
#   bash bench/gpu/run.sh --checks [waits saves …]     what must hold; those on Ray are left out where it is not installed
#   bash bench/gpu/run.sh --losses                     the ways to the loss, side by side
#   bash bench/gpu/run.sh --minutes 9 gpt2-124m        one shape, cases begun within 9 minutes; what was left out is said
#   bash bench/gpu/run.sh llama-1b --stages 0,3 --modes compiled --json rows.jsonl
#   bash bench/gpu/run.sh llama-1b --profile           the costliest kernels of a step, for the first stage and mode
#   bash bench/gpu/run.sh --smallest                   one tiny shape on the CPU, to see that it runs
#
# Shapes: gpt2-124m llama-1b llama-3b. Stages: 0,1,2,3. Modes: eager,compiled. Needs no network. Missing wheels may lie in
# ./wheels (pip download); they are installed into ./wheels/site. PYTHON names the interpreter (default: .venv's, else
# python3).
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
if compgen -G "wheels/*.whl" > /dev/null; then
  "$PYTHON" -m pip install --quiet --no-index --no-deps --upgrade --target wheels/site wheels/*.whl
  export PYTHONPATH="wheels/site:${PYTHONPATH:-}"
fi
export PYTHONPATH="src:.:${PYTHONPATH:-}" TOKENIZERS_PARALLELISM=false
# Tasks are found by dray's entry points: where it is not installed, what setuptools writes beside the sources will do.
"$PYTHON" -c 'import importlib.metadata as found; found.distribution("dray")' 2> /dev/null ||
  "$PYTHON" -c 'from setuptools import setup; setup()' --quiet egg_info --egg-base src
case "${1:-}" in
  --checks) shift; exec "$PYTHON" -m bench.gpu.checks "$@" ;;
  --losses) exec "$PYTHON" -m bench.gpu.loss_arms ;;
  "") "$PYTHON" -m bench.gpu.checks; "$PYTHON" -m bench.gpu.loss_arms ;;
esac
exec "$PYTHON" -m bench.gpu.table "$@"
