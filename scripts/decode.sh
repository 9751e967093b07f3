#!/usr/bin/env bash
# Measure what README.md says of decoding: scripts/decode.sh [OUT], OUT being scripts/results/decode-h200.json if not given.
# Every run adds to OUT or replaces what it measured before; what an interrupted one has measured waits in OUT.part for the next.
# Needs a GPU, for OPT-175B at 3 bits one of 96 GB; with 2, 4 or 8 of them it measures those together, too.
# Afterwards: python scripts/decode_report.py
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-scripts/results/decode-h200.json}
python=${PYTHON:-python3}
keep() {
  [ ! -s "$out.part" ] || "$python" scripts/decode_report.py --join "$out" "$out.part"
  rm -f "$out.part"
}
gpus=1
run() {
  launch=(-m lutq)
  [ "$gpus" = 1 ] || launch=(-m torch.distributed.run --standalone --nproc-per-node "$gpus" -m lutq)
  "$python" "${launch[@]}" bench decode --synthetic --json "$out.part" "$@"
  keep
}
keep
run --shape llama-2-7b --bits 2 --bits 3 --bits 4 --bits 16
run --shape llama-2-7b --bits 3 --batch 8
run --shape llama-3-8b --bits 3
run --shape llama-1-30b --bits 3 --bits 4
run --shape llama-1-65b --bits 3 --bits 4
run --shape opt-175b --bits 3 --bits 2
here=$("$python" -c "import torch; print(torch.cuda.device_count())")
for gpus in 2 4 8; do
  [ "$gpus" -le "$here" ] || break
  for shape in llama-1-30b llama-1-65b opt-175b; do
    [ "$gpus $shape" = "8 llama-1-30b" ] || run --shape "$shape" --bits 3  # 52 heads
  done
done
