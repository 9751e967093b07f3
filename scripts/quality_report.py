"""Render `scripts/results/quality-*.json` into the README's tables and `scripts/results/quality.png`.

python scripts/quality_report.py              # needs matplotlib (extra `test`)
"""

from typing import Any

from perplexity_report import number, plot
from readme import RESULTS, Section, settings_of


def markdown(result: dict[str, Any]) -> str:
    """One model's table: a row per stage or recipe, perplexity (bits per weight) per bits."""
    records = result["records"]
    fp16 = next(record for record in records if record["row"] == "fp16")
    groups = {record["group"] for record in records if record["row"] != "fp16" and not record["row"].startswith("best")}
    windows = f"first {fp16['windows']} / all {fp16['windows_all']}" if "windows_all" in fp16 else fp16["windows"]
    plain = "".join(f", g = {group} but for recipes" for group in sorted(groups))
    bits = sorted({record["bits"] for record in records} - {16}, reverse=True)
    lines = [
        f"**{result['model']}**{plain}, fp16 {perplexities(fp16)} ({settings_of(result, windows)}):",
        "",
        "| recipe or flags | " + " | ".join(f"{b:g} bits" for b in bits) + " |",
        "|---|" + "---|" * len(bits),
    ]
    rows: dict[str, dict[float, dict[str, Any]]] = {}
    for record in records:
        if record["row"] != "fp16":
            rows.setdefault(flags_of(record["row"]), {})[record["bits"]] = record
    for name, cells in sorted(rows.items(), key=lambda entry: entry[0].startswith("`--recipe")):
        figures = " | ".join(f"{perplexities(cells[b])} ({cells[b]['bits_per_weight']:.2f})" if b in cells else "" for b in bits)
        lines.append(f"| {name} | {figures} |")
    return "\n".join(lines)


def perplexities(record: dict[str, Any]) -> str:
    """Of a record's first windows and, where that was measured, too, of all."""
    return " / ".join(number(record[name]) for name in ("ppl", "ppl_all") if name in record)


def flags_of(row: str) -> str:
    """The flags of `lutq quantize` that a row stands for, those of all recipes alike."""
    if not row.startswith("best"):
        return f"`--method {row}`"
    settings = [f" --{name.replace('_', '-')} {value}" for name, _, value in (part.partition("=") for part in row.split()[1:])]
    return f"`--recipe best-...{''.join(settings)}`"


def by_row(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Records of each stage, and of the recipes together."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault("best-..." if record["row"].startswith("best") else record["row"], []).append(record)
    return found


SECTION = Section("quality", "quality_report", markdown)


def main() -> None:
    SECTION.write()
    plot(RESULTS / "quality.png", SECTION.results(), "row", by_row, "best-...")


if __name__ == "__main__":
    main()
