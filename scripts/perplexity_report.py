"""Render `scripts/results/perplexity-*.json` into the README's tables and `scripts/results/perplexity.png`.

python scripts/perplexity_report.py           # needs matplotlib (extra `test`)
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from readme import RESULTS, Section


def number(value: float) -> str:
    """Perplexity with as many digits as mean something."""
    return f"{value:.2f}" if value < 100 else f"{value:.0f}" if value < 10_000 else f"{value:.0e}".replace("e+0", "e")


def markdown(result: dict[str, Any]) -> str:
    """One model's table: a row per variant and group, perplexity (bits per weight) per bits."""
    records = result["records"]
    bits = sorted({record["bits"] for record in records} - {16}, reverse=True)
    fp16 = next(record["ppl"] for record in records if record["variant"] == "fp16")
    lines = [
        f"**{result['model']}**, fp16 {fp16:.2f} ({result['dataset']}, protocol `{result['protocol']}`, {result['dtype']} on an "
        f"{result['device'].removeprefix('NVIDIA ')}, torch {result['torch']}, {result['date']}):",
        "",
        "| `--method` | `--group` | " + " | ".join(f"{b} bits" for b in bits) + " |",
        "|---|---|" + "---|" * len(bits),
    ]
    rows: dict[tuple, dict[int, dict[str, Any]]] = {}
    for record in records:
        if record["variant"] != "fp16":
            rows.setdefault((record["variant"], record["group"]), {})[record["bits"]] = record
    for (variant, group), cells in rows.items():
        figures = " | ".join(f"{number(cells[b]['ppl'])} ({cells[b]['bits_per_weight']:.2f})" if b in cells else "" for b in bits)
        lines.append(f"| `{variant}` | {group} | {figures} |")
    return "\n".join(lines)


Lines = Callable[[list[dict[str, Any]]], dict[str, list[dict[str, Any]]]]  # label -> its records, of a model's


def plot(file: Path, results: list[dict[str, Any]], key: str, lines: Lines, bold: str) -> None:
    """Perplexity against bits per weight, a panel per model, a line per label; `key` of a record says `fp16` of the original."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    shown = [lines([record for record in result["records"] if record[key] != "fp16"]) for result in results]
    colors = {label: f"C{i}" for i, label in enumerate(dict.fromkeys(label for found in shown for label in found))}
    figure, panels = pyplot.subplots(1, len(results), figsize=(6.4 * len(results), 4.6), squeeze=False)
    for panel, result, found in zip(panels[0], results, shown, strict=True):
        fp16 = next(record["ppl"] for record in result["records"] if record[key] == "fp16")
        for label, records in found.items():
            points = sorted((r["bits_per_weight"], r["ppl"]) for r in records if r["ppl"] < 40 * fp16)
            width = 2.5 if label == bold else 1
            panel.plot([x for x, _ in points], [y for _, y in points], "o-", ms=4, lw=width, label=label, color=colors[label])
        panel.axhline(fp16, color="gray", linestyle=":", label="fp16")
        panel.set(yscale="log", xlabel="bits per weight, scales and offsets included", ylabel="perplexity, WikiText-2 test")
        panel.yaxis.set_major_formatter("{x:.0f}")
        panel.yaxis.set_minor_formatter("{x:.0f}")
        panel.set_title(result["model"])
        panel.grid(visible=True, which="both", alpha=0.25)
        panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def by_variant(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Records of each variant."""
    return {name: [r for r in records if r["variant"] == name] for name in dict.fromkeys(r["variant"] for r in records)}


SECTION = Section("perplexity", "perplexity_report", markdown)


def main() -> None:
    SECTION.write()
    plot(RESULTS / "perplexity.png", SECTION.results(), "variant", by_variant, "alternating")


if __name__ == "__main__":
    main()
