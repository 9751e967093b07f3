"""Render `scripts/results/quality-*.json` into the README's tables and `scripts/results/quality.png`.

python scripts/quality_report.py              # needs matplotlib (extra `test`)
"""

from pathlib import Path
from typing import Any

from perplexity_report import number
from readme import RESULTS, read, write

BEGIN, END = "<!-- quality: written by scripts/quality_report.py -->", "<!-- end of quality -->"


def read_results() -> list[dict[str, Any]]:
    """Results in order of file name."""
    return read("quality-*.json")


def markdown(result: dict[str, Any]) -> str:
    """One model's table: a row per stage or recipe, perplexity (bits per weight) per bits."""
    records = result["records"]
    fp16 = next(record for record in records if record["row"] == "fp16")
    group = next(record["group"] for record in records if record["group"])
    bits = sorted({record["bits"] for record in records} - {16}, reverse=True)
    lines = [
        f"**{result['model']}**, g = {group}, fp16 {fp16['ppl']:.2f} ({result['dataset']}, protocol `{result['protocol']}`, "
        f"{fp16['windows']} windows, {result['dtype']} on {result['device'].removeprefix('NVIDIA ')}, torch {result['torch']}, "
        f"{result['date']}):",
        "",
        "| recipe or flags | " + " | ".join(f"{b:g} bits" for b in bits) + " |",
        "|---|" + "---|" * len(bits),
    ]
    rows: dict[str, dict[float, dict[str, Any]]] = {}
    for record in records:
        if record["row"] != "fp16":
            name = "`--recipe best-...`" if record["row"].startswith("best") else f"`--method {record['row']}`"
            rows.setdefault(name, {})[record["bits"]] = record
    for name, cells in sorted(rows.items(), key=lambda entry: entry[0].startswith("`--recipe")):
        figures = " | ".join(f"{number(cells[b]['ppl'])} ({cells[b]['bits_per_weight']:.2f})" if b in cells else "" for b in bits)
        lines.append(f"| {name} | {figures} |")
    return "\n".join(lines)


def tables() -> str:
    """All tables, as they stand between the README's marks."""
    return "\n\n".join(markdown(result) for result in read_results())


def plot(file: Path) -> None:
    """Perplexity against bits per weight, a panel per model, a line per method."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    results = read_results()
    figure, panels = pyplot.subplots(1, len(results), figsize=(6.4 * len(results), 4.6), squeeze=False)
    for panel, result in zip(panels[0], results, strict=True):
        records = [record for record in result["records"] if record["row"] != "fp16"]
        fp16 = next(record["ppl"] for record in result["records"] if record["row"] == "fp16")
        names = dict.fromkeys("best-..." if record["row"].startswith("best") else record["row"] for record in records)
        for name in names:
            chosen = [r for r in records if r["row"] == name or (name == "best-..." and r["row"].startswith("best"))]
            points = sorted((r["bits_per_weight"], r["ppl"]) for r in chosen if r["ppl"] < 40 * fp16)
            width = 2.5 if name == "best-..." else 1
            panel.plot([x for x, _ in points], [y for _, y in points], "o-", ms=4, lw=width, label=name)
        panel.axhline(fp16, color="gray", linestyle=":", label="fp16")
        panel.set(yscale="log", xlabel="bits per weight, scales and offsets included", ylabel="perplexity, WikiText-2 test")
        panel.yaxis.set_major_formatter("{x:.0f}")
        panel.yaxis.set_minor_formatter("{x:.0f}")
        panel.set_title(result["model"])
        panel.grid(visible=True, which="both", alpha=0.25)
        panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    write(BEGIN, tables(), END)
    plot(RESULTS / "quality.png")


if __name__ == "__main__":
    main()
