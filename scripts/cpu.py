"""Time products of the CPU kernel beside the reference and an ordinary product in fp32, into `scripts/results/cpu-NAME.json`.

    python scripts/cpu.py xeon

NAME is what the file is called. Random weights on the BCQ grid in groups of 128, one thread, the median of some runs; W is larger
than the caches of a core. Then `python scripts/cpu_report.py` renews the README's table.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measured import machine
from readme import RESULTS

from lutq.config import LayerConfig
from lutq.ops import cpu, reference
from lutq.pack import dequantize
from lutq.trial import random_packed

SHAPES = ((4096, 4096), (11008, 4096))
BITS, GROUP, ROWS, RUNS = (2, 3, 4), 128, (1, 4, 16, 64), 9


def processor() -> str:
    """Its name."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))


def median_ms(run: Callable[[], object], runs: int = RUNS) -> float:
    """Milliseconds, after one run to warm up."""
    run()
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    torch.set_num_threads(1)
    records = []
    for N, K in SHAPES:
        for bits in BITS:
            packed = random_packed(N, K, LayerConfig(bits, GROUP), torch.device("cpu"))
            W = dequantize(*packed, GROUP, "bcq", K)
            for M in ROWS:
                x = torch.randn(M, K)
                ways = {
                    "kernel": lambda x=x, packed=packed: cpu(x, packed, None, GROUP, "bcq"),
                    "reference": lambda x=x, packed=packed: reference(x, packed, None, GROUP, "bcq"),
                    "fp32": lambda x=x, W=W: x @ W.T,
                }
                record = {"n": N, "k": K, "m": M, "bits": bits} | {way: median_ms(run) for way, run in ways.items()}
                records.append(record)
                print(record, flush=True)
    result = machine(f"{processor()}, one core") | {"records": records}
    (RESULTS / f"cpu-{sys.argv[1]}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
