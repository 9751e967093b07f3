"""The plot of `lutq bench kernel`: how near one row is to the read ceiling, and how many rows cuBLAS needs to catch up."""

import importlib.util
from pathlib import Path
from typing import Any

from lutq.errors import LutqError

LARGEST = 2  # shapes shown over M
COLORS = {1: "tab:gray", 2: "tab:blue", 3: "tab:orange", 4: "tab:green"}  # by bits


def require_matplotlib(file: Path) -> None:
    """Raise LutqError unless a plot can be drawn into `file`, as far as known without drawing it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise LutqError("--plot needs matplotlib: pip install matplotlib")
    if file.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise LutqError(f"--plot writes .png, .pdf or .svg, not {file.name!r}")


def shapes_of(records: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """(N, K) of all records, in order of appearance."""
    return list(dict.fromkeys((record["n"], record["k"]) for record in records))


def bars(records: list[dict[str, Any]]) -> dict[int, list[float | None]]:
    """Per bits the percent of the ceiling at the fewest rows measured, one per shape, None where there is no record."""
    fewest = min(record["m"] for record in records)
    found = {(r["bits"], r["n"], r["k"]): r["percent_of_ceiling"] for r in records if r["m"] == fewest}
    bits = sorted({record["bits"] for record in records})
    return {b: [found.get((b, *shape)) for shape in shapes_of(records)] for b in bits}


def curves(records: list[dict[str, Any]], shape: tuple[int, int]) -> dict[int, list[tuple[int, float]]]:
    """Per bits [(M, time of cuBLAS over that of lutq)] of one shape, by M."""
    lines: dict[int, list[tuple[int, float]]] = {}
    for record in sorted(records, key=lambda record: (record["bits"], record["m"])):
        if (record["n"], record["k"]) == shape:
            lines.setdefault(record["bits"], []).append((record["m"], record["cublas_us"] / record["us"]))
    return lines


def draw(result: dict[str, Any], file: Path) -> None:
    """Draw what the JSON file of `lutq bench kernel` holds. Raises LutqError where it holds no record."""
    from matplotlib.figure import Figure

    records = result["records"]
    if not records:
        raise LutqError("there is nothing to draw: the results hold no record")
    shapes = shapes_of(records)
    largest = sorted(shapes, key=lambda shape: shape[0] * shape[1])[-LARGEST:]
    figure = Figure(figsize=(6 + 4.4 * len(largest), 4.8), layout="constrained")
    panels = figure.subplots(1, 1 + len(largest), width_ratios=[1.3, *(1 for _ in largest)])
    draw_bars(panels[0], records)
    panels[0].set_ylabel(f"% of the read ceiling, {result['read_ceiling_gbps']:.0f} GB/s")
    for panel, shape in zip(panels[1:], largest, strict=True):
        for bits, points in curves(records, shape).items():
            panel.plot(*zip(*points, strict=True), "o-", ms=4, color=COLORS[bits], label=f"{bits} bits")
        panel.axhline(1, color="gray", linestyle=":", label="cuBLAS, fp16")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set(xlabel="M, rows of x", ylabel="times as fast as cuBLAS in fp16", title=f"{shape[0]}x{shape[1]}")
        panel.grid(visible=True, alpha=0.25)
        panel.legend(fontsize=8)
    groups = ", ".join(str(group or "row") for group in dict.fromkeys(record["group"] for record in records))
    figure.suptitle(f"{result['gpu']}, groups of {groups}, {result['date']}")
    figure.savefig(file, dpi=110)


def draw_bars(panel: Any, records: list[dict[str, Any]]) -> None:
    """Percent of the ceiling by shape, a bar per bits."""
    heights = bars(records)
    width = 0.8 / len(heights)
    for i, (bits, values) in enumerate(heights.items()):
        places = [j + (i - (len(heights) - 1) / 2) * width for j in range(len(values))]
        panel.bar(places, [value or 0 for value in values], width, color=COLORS[bits], label=f"{bits} bits")
    shapes = shapes_of(records)
    panel.set_xticks(range(len(shapes)), [f"{N}\nx{K}" for N, K in shapes], fontsize=8)
    panel.axhline(100, color="gray", linestyle=":")
    panel.set(title=f"M = {min(record['m'] for record in records)}", xlabel="outputs x inputs")
    panel.grid(visible=True, axis="y", alpha=0.25)
    panel.legend(fontsize=8, loc="upper left")
