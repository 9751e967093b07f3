#!/usr/bin/env bash
# Make .venv with lutq (editable) and the given extras, at the versions in constraints.txt: scripts/install.sh [test]
# Without an NVIDIA GPU, torch comes from PyTorch's CPU index when that can be reached, else from the package index.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { echo "lutq needs Python 3.11 or newer; name one with PYTHON=/path/to/python" >&2; exit 2; }
[ -x .venv/bin/python ] || "$python" -m venv .venv ||
  { echo "python -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
cpu_index=https://download.pytorch.org/whl/cpu
if ! nvidia-smi >/dev/null 2>&1 && ! .venv/bin/python -c 'import torch' 2>/dev/null &&
  .venv/bin/python -c "import urllib.request as u; u.urlopen('$cpu_index/torch/', timeout=5)" 2>/dev/null; then
  .venv/bin/python -m pip install --quiet --index-url "$cpu_index" "$(grep '^torch==' constraints.txt)"
fi
.venv/bin/python -m pip install --quiet -c constraints.txt -e ".${1:+[$1]}"
