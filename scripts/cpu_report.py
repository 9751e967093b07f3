"""Render `scripts/results/cpu-*.json` into the README's table.

python scripts/cpu_report.py
"""

from typing import Any

from readme import Section


def markdown(result: dict[str, Any]) -> str:
    """One machine's table: ms by shape, bits and rows of x."""
    records = result["records"]
    rows = sorted({record["m"] for record in records})
    lines = [
        f"{result['device']}, torch {result['torch']}, {result['date']}; ms by the kernel / by the reference / in fp32:",
        "",
        "| outputs x inputs, bits | " + " | ".join(f"M = {M}" for M in rows) + " |",
        "|---|" + "---|" * len(rows),
    ]
    found = {(record["n"], record["k"], record["bits"], record["m"]): record for record in records}
    for N, K, bits in dict.fromkeys(key[:3] for key in found):
        cells = [found[N, K, bits, M] for M in rows]
        figures = (" / ".join(f"{cell[way]:.3g}" for way in ("kernel", "reference", "fp32")) for cell in cells)
        lines.append(f"| {N}x{K}, {bits} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


SECTION = Section("cpu", "cpu_report", markdown)


if __name__ == "__main__":
    SECTION.write()
