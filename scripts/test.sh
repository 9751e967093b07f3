#!/usr/bin/env bash
# Install lutq with its test tools into .venv, then check style and type hints (ruff) and run every test.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh test
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# Two processes of one thread each: threads of several processes on few cores get in each other's way.
CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
if [ $# = 0 ] && nvidia-smi >/dev/null 2>&1; then
  .venv/bin/python -m pytest tests/gpu
fi
