"""Render `scripts/results/kernels-*.json`, written by `lutq bench kernel --json`, into the README's tables.

python scripts/kernel_report.py
"""

import statistics
from typing import Any

from readme import Section

FEW, MANY = (1, 2, 4, 8), (16, 32, 64, 256, 1024, 2048)


def number(us: float) -> str:
    """Microseconds with three digits."""
    return f"{us:.1f}" if us < 100 else f"{us:.0f}"


def markdown(result: dict[str, Any]) -> str:
    """Two tables: few rows at 2 / 3 / 4 bits in us, many rows against cuBLAS."""
    by_case = {(r["n"], r["k"], r["m"], r["bits"]): r for r in result["records"]}
    shapes = list(dict.fromkeys((r["n"], r["k"]) for r in result["records"]))
    bits = sorted({r["bits"] for r in result["records"]})
    titles = " / ".join(map(str, bits))

    def times(N: int, K: int, M: int) -> str:
        return " / ".join(number(by_case[N, K, M, b]["us"]) for b in bits)

    spreads = [(r["us_max"] - r["us_min"]) / r["us"] for r in result["records"]]
    lines = [
        f"One {result['gpu'].removeprefix('NVIDIA ')}, torch {result['torch']}, {result['date']}; it reads "
        f"{result['read_ceiling_gbps'] / 1000:.2f} TB/s at most. us at {titles} bits; in brackets percent of that at M = 1. "
        f"Medians; the slowest repeat took {statistics.median(spreads):.1%} longer than the fastest, {max(spreads):.0%} at most.",
        "",
        "| outputs x inputs | " + " | ".join(f"M = {M}" for M in FEW) + " | cuBLAS fp16, M = 1 |",
        "|---|" + "---|" * (len(FEW) + 1),
    ]
    for N, K in shapes:
        share = " / ".join(f"{by_case[N, K, 1, b]['percent_of_ceiling']:.0f}" for b in bits)
        cells = [f"{times(N, K, 1)} ({share})", *(times(N, K, M) for M in FEW[1:])]
        lines.append(f"| {N}x{K} | " + " | ".join(cells) + f" | {number(by_case[N, K, 1, bits[0]]['cublas_us'])} |")
    lines += [
        "",
        f"Time over that of cuBLAS in fp16 at the same M, {titles} bits:",
        "",
        "| outputs x inputs | " + " | ".join(f"M = {M}" for M in MANY) + " |",
        "|---|" + "---|" * len(MANY),
    ]
    for N, K in shapes:
        ratios = [" / ".join(f"{by_case[N, K, M, b]['us'] / by_case[N, K, M, b]['cublas_us']:.2f}" for b in bits) for M in MANY]
        lines.append(f"| {N}x{K} | " + " | ".join(ratios) + " |")
    return "\n".join(lines)


SECTION = Section("kernels", "kernel_report", markdown)


if __name__ == "__main__":
    SECTION.write()
