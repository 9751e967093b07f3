"""Render `scripts/results/corrections-*.json` into the README's table.

python scripts/corrections_report.py
"""

from typing import Any

from readme import Section


def title(record: dict[str, Any]) -> str:
    """The corrections of a record as flags."""
    flags = [f"--{name.replace('_', '-')} {record[name]:g}" for name in ("outliers", "low_rank") if record[name]]
    return f"`{' '.join(flags)}`" if flags else "none"


def words(us: float) -> str:
    """Three digits."""
    return f"{us:.3g}" if us < 1000 else f"{us:.0f}"


def markdown(result: dict[str, Any]) -> str:
    """One machine's table: microseconds of one row of x."""
    records = result["records"]
    shapes = list(dict.fromkeys((record["n"], record["k"]) for record in records))
    lines = [
        f"{result['device'].removeprefix('NVIDIA ')}, torch {result['torch']}, {result['date']}; us of a product at 3 bits:",
        "",
        f"| corrections | {' | '.join(f'{N}x{K}' for N, K in shapes)} |",
        f"|---|{'---|' * len(shapes)}",
    ]
    for name in dict.fromkeys(map(title, records)):
        times = {(record["n"], record["k"]): record["us"] for record in records if title(record) == name}
        lines.append(f"| {name} | {' | '.join(words(times[shape]) for shape in shapes)} |")
    return "\n".join(lines)


SECTION = Section("corrections", "corrections_report", markdown)


if __name__ == "__main__":
    SECTION.write()
