#!/usr/bin/env bash
# What a GPU computes and how fast, in at most nine minutes; nothing is installed or fetched (benchmarks/gpu.py).
#   bash scripts/gpu.sh [--out gpu.json] [--only sft grpo]
#   bash scripts/gpu.sh --dry-run                             every part at tiny shapes, on a CPU
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}"
exec "$python" -m benchmarks.gpu "$@"
