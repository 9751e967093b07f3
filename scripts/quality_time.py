"""Time the command `lutq quantize --recipe calibrated` on the embedded model, into `scripts/results/quality-opt-tiny.json`.

    python scripts/quality_time.py --threads 2 --runs 2

scripts/quality.py has to measure the row `calibrated` first. Nothing else should run at the same time. Runs of a width with
others of as many threads in the file are added to these.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

from readme import RESULTS


def seconds_of(bits: int, threads: int) -> float:
    """Of one run on the CPU."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--recipe", "calibrated", "--bits", str(bits), "--out", f"{folder}/out"]
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "lutq", "quantize", *flags], env=environment, check=True, capture_output=True)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    arguments = parser.parse_args()
    file = RESULTS / "quality-opt-tiny.json"
    result = json.loads(file.read_text(encoding="utf-8"))
    for record in result["records"]:
        if record["row"] == "calibrated" and record["bits"] in arguments.bits:
            earlier = record.get("command_seconds", []) if record.get("threads") == arguments.threads else []
            seconds = [seconds_of(record["bits"], arguments.threads) for _ in range(arguments.runs)]
            record |= {"command_seconds": earlier + seconds, "threads": arguments.threads}
            print(f"{record['bits']} bits: {', '.join(f'{s:.1f}' for s in seconds)} s", flush=True)
            file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
