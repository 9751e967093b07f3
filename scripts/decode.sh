#!/usr/bin/env bash
# Measure what README.md says of decoding: scripts/decode.sh [OUT], OUT being scripts/results/decode-h200.json if not given.
# Every run adds to OUT or replaces what it measured before; what an interrupted one has measured waits in OUT.part for the next.
# Needs a GPU, for OPT-175B at 3 bits one of 96 GB. Afterwards: python scripts/decode_report.py
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-scripts/results/decode-h200.json}
python=${PYTHON:-python3}
keep() {
  [ ! -s "$out.part" ] || "$python" scripts/decode_report.py --join "$out" "$out.part"
  rm -f "$out.part"
}
run() {
  "$python" -m lutq bench decode --synthetic --json "$out.part" "$@"
  keep
}
keep
run --shape llama-2-7b --bits 2 --bits 3 --bits 4 --bits 16
run --shape llama-2-7b --bits 3 --batch 8
run --shape llama-3-8b --bits 3
run --shape llama-1-65b --bits 3
run --shape opt-175b --bits 3 --bits 2
