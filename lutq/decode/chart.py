"""The plot of `lutq bench decode`: milliseconds per step by model and bits, beside what the bytes take at the read ceiling."""

from pathlib import Path
from typing import Any

from lutq.errors import LutqError
from lutq.roofline import COLORS


def bars(records: list[dict[str, Any]], ceiling: float) -> list[tuple[str, int, float, float]]:
    """A bar per record: label, bits, ms, and ms of its bytes at `ceiling` GB/s."""
    batches = {record["batch"] for record in records}
    found = []
    for record in records:
        label = f"{record['model']}\n{record['bits']} bits" + (f", batch {record['batch']}" if len(batches) > 1 else "")
        found.append((label, record["bits"], record["ms"], record["bytes"] / ceiling / 1e6))
    return found


def draw(result: dict[str, Any], file: Path) -> None:
    """Draw what the JSON file of `lutq bench decode` holds. Raises LutqError where it holds no record."""
    from matplotlib.figure import Figure

    records = result["records"]
    if not records:
        raise LutqError("there is nothing to draw: the results hold no record")
    shown = bars(records, result["read_ceiling_gbps"])
    figure = Figure(figsize=(2.5 + 0.9 * len(shown), 4.8), layout="constrained")
    panel = figure.subplots()
    places = range(len(shown))
    panel.bar(places, [ms for _, _, ms, _ in shown], color=[COLORS.get(bits, "tab:red") for _, bits, _, _ in shown])
    panel.bar(places, [bound for *_, bound in shown], color="black", alpha=0.35, label="reading its bytes")
    for place, (_, _, ms, _) in zip(places, shown, strict=True):
        panel.annotate(f"{ms:.2f}", (place, ms), ha="center", va="bottom", fontsize=8)
    panel.set_xticks(places, [label for label, *_ in shown], fontsize=8)
    panel.set_yscale("log")
    panel.set_ylabel("ms per step")
    panel.legend(fontsize=8, loc="upper left")
    panel.grid(visible=True, axis="y", alpha=0.25)
    contexts = ", ".join(str(context) for context in dict.fromkeys(record["context"] for record in records))
    figure.suptitle(f"{result['gpu']}, context {contexts}, {result['date']}")
    figure.savefig(file, dpi=110)
