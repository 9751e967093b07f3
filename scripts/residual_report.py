"""Render `scripts/results/residual-*.json` into the README's table.

python scripts/residual_report.py
"""

from typing import Any

from readme import Section, settings_of


def markdown(result: dict[str, Any]) -> str:
    """One model's table, by bits per weight."""
    records = sorted(result["records"], key=lambda record: record["bits_per_weight"])
    lines = [
        f"**{result['model']}**, `--method feedback` ({settings_of(result, records[0]['windows'])}):",
        "",
        "| flags | bits per weight | output error | perplexity |",
        "|---|---|---|---|",
    ]
    for record in records:
        figures = f"{record['bits_per_weight']:.2f} | {record['output_error'][1]:.3f} | {record['ppl']:.1f}"
        lines.append(f"| `{record['row']}` | {figures} |")
    return "\n".join(lines)


SECTION = Section("residual", "residual_report", markdown)


if __name__ == "__main__":
    SECTION.write()
