#!/usr/bin/env bash
# Install lutq into .venv and run the main job on the embedded model: quantize, compare perplexity with fp16, generate.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh
export PATH=$PWD/.venv/bin:$PATH
run() { echo "\$ $1"; eval "$1"; echo; }
[ -e lutq-out ] || run 'lutq quantize --bits 3 --group 128'
run 'lutq eval-ppl wikitext2 --baseline opt-tiny'
run 'lutq generate "The old man walked"'
