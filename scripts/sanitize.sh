#!/usr/bin/env bash
# Run the CUDA kernels over a small matrix of cases under tools of compute-sanitizer (needs a GPU and the CUDA toolkit):
# scripts/sanitize.sh [OUT [TOOL...]]. Without tools all four run, side by side. OUT is scripts/results/sanitizer.txt if not given;
# each tool's report is added to it when the tool ends. Parts of the matrix run side by side, too; what had been said of one that was
# killed is in OUT.TOOL.PART.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-scripts/results/sanitizer.txt}
python=${PYTHON:-python3}
tools=("${@:2}")
[ ${#tools[@]} -gt 0 ] || tools=(memcheck racecheck initcheck synccheck)
regexes=()
for name in lut_gemm lut_gemv bit_gemv fused_gemm dequantize decode columns fit_; do regexes+=(--kernel-regex "kns=$name"); done
{
  date -u +%Y-%m-%d
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
  compute-sanitizer --version | tail -n 1
} >>"$out"
parts=(columns fits small_kernels sums_over_ranks attention)
for bits in 1 2 3 4; do parts+=("products-$bits" "one_row-$bits"); done
report() {
  for part in "${parts[@]}"; do
    { compute-sanitizer --tool "$1" "${regexes[@]}" "$python" scripts/sanitize.py "$part" >"$out.$1.$part" 2>&1 ||
      echo "exit code $?" >>"$out.$1.$part"; } &
  done
  wait
  echo "== $1" >"$out.$1"
  for part in "${parts[@]}"; do
    grep -E "cases|exit code|=========|Error" "$out.$1.$part" | grep -vE "COMPUTE-SANITIZER$" | head -n 20 >>"$out.$1" || true
    rm "$out.$1.$part"
  done
  cat "$out.$1" >>"$out"
  rm "$out.$1"
}
for tool in "${tools[@]}"; do report "$tool" & done
wait
cat "$out"
