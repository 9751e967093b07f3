"""Render `scripts/results/quality-*.json` into the README's tables and `scripts/results/quality.png`.

python scripts/quality_report.py              # needs matplotlib (extra `test`)

Figures of methods that are not lutq's are quoted, here and nowhere else: `QUOTED`.
"""

import itertools
import math
from typing import Any

from perplexity_report import number, plot
from readme import RESULTS, Section, settings_of

from lutq.config import METHODS

Points = list[tuple[float, float]]  # (bits per weight, perplexity)


def quoted(figures: dict[int, float], group: int, zero_bits: int | None = None) -> Points:
    """Perplexity by bits of a uniform grid with an fp16 scale and a zero point of `zero_bits` (None: `bits`) for each group."""
    return [(bits + (16 + (zero_bits or bits)) / group, ppl) for bits, ppl in figures.items()]


# Measured on the same windows by the same protocol, with programs that are not in this repository: GPTQ's published algorithm
# written anew (asymmetric, damping 0.01, calibrated on 64 windows of books; for SmolLM2 on 16), HQQ's library by its defaults,
# whose zero points are fp16. model -> method -> points
QUOTED: dict[str, dict[str, Points]] = {
    "opt-tiny": {
        "GPTQ (quoted)": quoted({4: 60.0, 3: 106.7, 2: 1472}, 128),
        "GPTQ, group-aware order (quoted)": quoted({4: 60.5, 3: 100.2, 2: 1097}, 128),
    },
    "smollm2-135m": {
        "RTN (quoted)": quoted({4: 26.3, 3: 70.1, 2: 1e6}, 64),
        "GPTQ (quoted)": quoted({4: 28.3, 3: 72.0}, 64),
        "HQQ (quoted)": quoted({4: 24.7, 3: 167, 2: 7e5}, 64, zero_bits=16),
    },
}
COMPARED = ("rtn", "feedback", "calibrated", "best-...")  # rows that stand beside them
MORE = ("feedback --end-loss", "feedback --scale-bits 8 --group 64", "feedback --distill 2")
PLOTTED = (*COMPARED, "greedy", "alternating", *MORE)


def markdown(result: dict[str, Any]) -> str:
    """One model's tables: of all rows, and at equal bits per weight beside other methods."""
    parts = [stages(result), timing(result["records"]), comparison(result)]
    return "\n\n".join(part for part in parts if part)


def stages(result: dict[str, Any]) -> str:
    """A row per stage or recipe, perplexity (bits per weight of the quantized layers / of the whole model) per bits."""
    records = result["records"]
    fp16 = next(record for record in records if record["row"] == "fp16")
    usual = [r for r in records if "--group" not in r["row"] and r["row"].split("-")[0] not in ("fp16", "calibrated", "best")]
    groups = {record["group"] for record in usual}
    windows = f"first {fp16['windows']} / all {fp16['windows_all']}" if "windows_all" in fp16 else fp16["windows"]
    plain = "".join(f", g = {group} where nothing else is said" for group in sorted(groups))
    bits = sorted({record["bits"] for record in records} - {16}, reverse=True)
    lines = [
        f"**{result['model']}**{plain}, fp16 {perplexities(fp16)} ({settings_of(result, windows)}):",
        "",
        "| recipe or flags | " + " | ".join(f"{b:g} bits" for b in bits) + " |",
        "|---|" + "---|" * len(bits),
    ]
    rows: dict[str, dict[float, dict[str, Any]]] = {}
    for record in sorted(records, key=place):
        if record["row"] != "fp16":
            rows.setdefault(flags_of(record["row"]), {})[record["bits"]] = record
    for name, cells in rows.items():
        figures = " | ".join(f"{perplexities(cells[b])} ({sizes(cells[b])})" if b in cells else "" for b in bits)
        lines.append(f"| {name} | {figures} |")
    return "\n".join(lines)


def timing(records: list[dict[str, Any]]) -> str:
    """What scripts/quality_time.py measured, in a sentence."""
    timed = [record for record in records if "command_seconds" in record]
    if not timed:
        return ""
    seconds = " / ".join(f"{min(record['command_seconds']):.0f}" for record in timed)
    bits = " / ".join(f"{record['bits']:g}" for record in timed)
    runs, threads = min(len(record["command_seconds"]) for record in timed), timed[0]["threads"]
    return (
        f"`lutq quantize --recipe calibrated --bits B` of this model takes {seconds} s at {bits} bits: the whole command on "
        f"{threads} threads of a shared machine, the best of {runs} runs."
    )


def comparison(result: dict[str, Any]) -> str:
    """Perplexity at equal bits per weight beside the `QUOTED` figures, at the widths of either that lie among those of both."""
    others = QUOTED.get(result["model"], {})
    found = {row: points_of(records) for row, records in by_row(result["records"]).items()}
    methods = {flags_of(row): found[row] for row in COMPARED if row in found} | others
    recipes = found.get("best-...", [])
    widths = {round(bits, 2) for points in (recipes, *others.values()) for bits, _ in points}
    shared = [
        width for width in sorted(widths, reverse=True) if at(recipes, width) and any(at(p, width) for p in others.values())
    ]
    if not shared:
        return ""
    lines = [
        f"**{result['model']}** at equal bits per weight of the quantized layers, scales and zero points counted (≈: between two "
        "widths of a method, the logarithm of perplexity taken as linear):",
        "",
        "| | " + " | ".join(f"{width:.2f}" for width in shared) + " |",
        "|---|" + "---|" * len(shared),
    ]
    lines += [f"| {name} | " + " | ".join(at(points, width) for width in shared) + " |" for name, points in methods.items()]
    return "\n".join(lines)


def points_of(records: list[dict[str, Any]]) -> Points:
    """Of a row's records, on the first windows."""
    return [(record["bits_per_weight"], record["ppl"]) for record in records]


def at(points: Points, width: float) -> str:
    """Perplexity at so many bits per weight: measured (within 0.01 bits), interpolated, or an empty string outside the points."""
    points = sorted(points)
    for bits, ppl in points:
        if abs(bits - width) < 0.01:
            return number(ppl)
    for (few, high), (many, low) in itertools.pairwise(points):
        if few < width < many:
            part = (width - few) / (many - few)
            return "≈" + number(math.exp((1 - part) * math.log(high) + part * math.log(low)))
    return ""


def sizes(record: dict[str, Any]) -> str:
    """Bits per weight of the quantized layers / of the whole model."""
    return f"{record['bits_per_weight']:.2f} / {record['whole_model']:.2f}"


def place(record: dict[str, Any]) -> int:
    """Of a record among the rows: stages by method, then recipes, the best last, then what is quoted."""
    first = record["row"].split()[0].split("-")[0]
    kinds = (*METHODS, "calibrated", "best")
    return kinds.index(first) if first in kinds else len(kinds)


def perplexities(record: dict[str, Any]) -> str:
    """Of a record's first windows and, where that was measured, too, of all."""
    return " / ".join(number(record[name]) for name in ("ppl", "ppl_all") if name in record)


def flags_of(row: str) -> str:
    """The flags of `lutq quantize` that a row stands for, those of all recipes alike."""
    if row == "calibrated":
        return "`--recipe calibrated`"
    if not row.startswith("best"):
        return f"`--method {row}`"
    settings = [f" --{name.replace('_', '-')} {value}" for name, _, value in (part.partition("=") for part in row.split()[1:])]
    return f"`--recipe best-...{''.join(settings)}`"


def by_row(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Records of each stage, and of the recipes together."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in sorted(records, key=place):
        found.setdefault("best-..." if record["row"].startswith("best") else record["row"], []).append(record)
    return found


def with_quoted(result: dict[str, Any]) -> dict[str, Any]:
    """A result with the `QUOTED` figures among its records, for the plot."""
    quoted_records = [
        {"row": name, "bits_per_weight": bits, "ppl": ppl}
        for name, points in QUOTED.get(result["model"], {}).items()
        for bits, ppl in points
    ]
    return result | {"records": result["records"] + quoted_records}


def plotted(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """`by_row` of what the plot shows: rows that lie on each other are left out."""
    return {row: found for row, found in by_row(records).items() if row in PLOTTED or row.endswith("(quoted)")}


SECTION = Section("quality", "quality_report", markdown)


def main() -> None:
    import matplotlib as mpl

    SECTION.write()
    mpl.rcParams["axes.prop_cycle"] = mpl.cycler(color=mpl.colormaps["tab20"].colors)  # more lines than the usual ten colors
    plot(RESULTS / "quality.png", [with_quoted(result) for result in SECTION.results()], "row", plotted, "best-...")


if __name__ == "__main__":
    main()
