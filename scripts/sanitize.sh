#!/usr/bin/env bash
# Run the CUDA kernels over a small matrix of cases under each tool of compute-sanitizer (needs a GPU and the CUDA toolkit).
# Its reports end in scripts/results/sanitizer.txt, or in the file given as the first argument.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-scripts/results/sanitizer.txt}
python=${PYTHON:-python3}
{
  date -u +%Y-%m-%d
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
  compute-sanitizer --version | tail -n 1
} >"$out"
reports=$(mktemp -d)
trap 'rm -rf "$reports"' EXIT
for tool in memcheck racecheck initcheck synccheck; do
  compute-sanitizer --tool "$tool" --kernel-regex kns=lut_gemm --kernel-regex kns=fused_gemm --kernel-regex kns=dequantize "$python" scripts/sanitize.py \
    >"$reports/$tool" 2>&1 || echo "exit code $?" >>"$reports/$tool" &
done
wait
for tool in memcheck racecheck initcheck synccheck; do
  echo "== $tool" >>"$out"
  grep -E "cases|exit code|=========|Error" "$reports/$tool" | grep -vE "COMPUTE-SANITIZER$" | head -n 40 >>"$out" || true
done
cat "$out"
