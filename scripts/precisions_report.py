"""Render `scripts/results/precisions-*.json` into the README's table.

python scripts/precisions_report.py
"""

from typing import Any

from precisions import ROWS, SEPARATE
from readme import Section, settings_of


def markdown(result: dict[str, Any]) -> str:
    """One model's table: perplexity at each precision, and the bits per weight that are stored for all of them."""
    records = result["records"]
    bits = sorted({record["bits"] for record in records}, reverse=True)
    lines = [
        f"**{result['model']}**, `--method feedback`, g = {records[0]['group']} ({settings_of(result, records[0]['windows'])}):",
        "",
        "| stored as | " + " | ".join(f"{b} bits" for b in bits) + " | bits per weight on disk |",
        "|---|" + "---|" * (len(bits) + 1),
    ]
    for row in dict.fromkeys(record["row"] for record in records):
        found = {record["bits"]: record for record in records if record["row"] == row}
        stored = sum(record["stored"] for record in found.values()) if ROWS[row][0] == SEPARATE else found[bits[0]]["stored"]
        lines.append(f"| {row} | " + " | ".join(f"{found[b]['ppl']:.2f}" for b in bits) + f" | {stored:.2f} |")
    return "\n".join(lines)


SECTION = Section("precisions", "precisions_report", markdown)


if __name__ == "__main__":
    SECTION.write()
