"""Render `scripts/results/decode-*.json`, written by `lutq bench decode --json`, into the README's tables and a plot of each.

bash scripts/decode.sh              # measure: needs a GPU, for OPT-175B one of 96 GB
python scripts/decode_report.py     # needs matplotlib (extra `test`)

`--join OUT PART...` puts results of several runs on one machine into one file: of a case measured again the last counts. Their
rates are compared with the highest read ceiling of all.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from readme import RESULTS, Section

CASE = ("model", "bits", "group", "grid", "engine", "gpus", "batch", "context", "dtype")  # what tells records apart
MACHINE = ("gpu", "torch", "lutq")  # of results that may be joined
HALF = 16  # bits of a model that is not quantized
CONTEXT = 512  # of the figures beside the paper's
PAPER = "LUT-GEMM paper (arXiv 2206.09557, Tables 3 and 4)"
PAPER_GPU = "A100-80GB"


class Row(NamedTuple):
    """Figures of the paper. ms: milliseconds per token by number of GPUs; method: another than LUT-GEMM."""

    bits: int
    ms: dict[int, float]
    method: str = ""


# shape in configs/models: (name, how the paper quantized it, its figures)
PUBLISHED = {
    "opt-175b": (
        "OPT-175B",
        "one scale per row",
        [
            Row(16, {8: 42.4}),
            Row(3, {1: 106.5}, "OPTQ"),
            Row(4, {2: 41.2, 4: 30.1, 8: 25.8}),
            Row(3, {1: 51.6, 2: 35.8, 4: 27.2, 8: 24.2}),
            Row(2, {1: 40.1, 2: 30.1, 4: 23.8, 8: 22.4}),
            Row(1, {1: 30.4, 2: 25.2, 4: 20.3, 8: 20.1}),
        ],
    ),
    "llama-1-65b": (
        "LLaMA-65B",
        "AWQ weights",
        [
            Row(16, {2: 46.9, 4: 29.1}),
            Row(4, {1: 35.7, 2: 25.4, 4: 19.9}),
            Row(3, {1: 31.3, 2: 23.0, 4: 18.3}),
        ],
    ),
    "llama-1-30b": (
        "LLaMA-30B",
        "AWQ weights",
        [
            Row(16, {1: 43.6, 2: 25.1, 4: 16.9}),
            Row(4, {1: 20.7, 2: 15.5, 4: 12.2}),
            Row(3, {1: 18.1, 2: 13.7, 4: 11.2}),
        ],
    ),
}


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def table(titles: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in (titles, ["---"] * len(titles), *rows)]


def figure(records: list[dict[str, Any]], model: str, bits: int, gpus: int) -> float | None:
    """Milliseconds per token of the fast engine with one sequence; None where that was not measured."""
    wanted = {"model": model, "bits": bits, "gpus": gpus, "batch": 1, "context": CONTEXT, "engine": "fast"}
    return next((r["ms"] for r in records if all(r[name] == value for name, value in wanted.items())), None)


def comparison(result: dict[str, Any]) -> list[str]:
    """The paper's tables; ours has a column for every number of GPUs that was measured, at least for one."""
    records = result["records"]
    measured = {record["gpus"] for record in records} | {1}
    theirs = {gpus for _, _, rows in PUBLISHED.values() for row in rows for gpus in row.ms}
    columns = [(gpus, whose) for gpus in sorted(measured | theirs) for whose in ("paper", "lutq")]
    columns = [(gpus, whose) for gpus, whose in columns if gpus in (theirs if whose == "paper" else measured)]
    body = []
    for model, (name, how, rows) in PUBLISHED.items():
        for row in rows:
            weights = f"{row.bits} bit{'s' if row.bits > 1 else ''}, {row.method or how}"
            cells = [name, "fp16" if row.bits == HALF else weights]
            for gpus, whose in columns:
                if whose == "paper":
                    cells.append(f"{row.ms[gpus]:.1f}" if gpus in row.ms else "")
                else:
                    ms = None if row.method else figure(records, model, row.bits, gpus)
                    cells.append(f"**{number(ms)}**" if ms else "")
            body.append(cells)
    titles = [f"{gpus} GPU{'s' if gpus > 1 else ''}, {whose}" for gpus, whose in columns]
    return [
        f"Milliseconds per token of one sequence: the {PAPER} on {PAPER_GPU} GPUs and, in bold, lutq on {short(result)}, "
        f"whose memory is faster, at a context of {CONTEXT} in groups of 128, whose scales are more bytes than one per row.",
        "",
        *table(["model", "weights in the paper", *titles], body),
    ]


def short(result: dict[str, Any]) -> str:
    """The GPU's name."""
    return result["gpu"].removeprefix("NVIDIA ")


def description(record: dict[str, Any]) -> list[str]:
    """The model, and what is not as usual: its engine, its GPUs."""
    engine = [f"engine {record['engine']}"] if record["engine"] != "fast" else []
    return [record["model"], *engine, *([f"{record['gpus']} GPUs"] if record["gpus"] > 1 else [])]


def shares(record: dict[str, Any]) -> str:
    """Percent of a step that each kind of work takes alone; nothing where that was not measured."""
    return " / ".join(f"{100 * ms / record['ms']:.0f}" for ms in record["kinds_ms"].values())


def everything(result: dict[str, Any]) -> list[str]:
    """A row for every case measured."""
    records = result["records"]
    prompts = " or ".join(str(tokens) for tokens in dict.fromkeys(record["prompt_tokens"] for record in records))
    titles = ["model", "bits", "batch", "context", "ms", "p99", "tokens/s", "GB per token", "% of reading"]
    kinds = max((list(record["kinds_ms"]) for record in records), key=len)
    titles += [", ".join(kinds) + " %", "GB in use", "first token, ms", "measured"]
    rows = [
        [
            ", ".join(description(record)),
            *(str(record[name]) for name in ("bits", "batch", "context")),
            *(number(record[name]) for name in ("ms", "ms_p99")),
            f"{record['tokens_per_second']:.0f}",
            number(record["bytes"] / record["batch"] / 1e9),
            f"{record['percent_of_ceiling']:.0f}",
            shares(record),
            number(record["memory_bytes"] / 1e9),
            number(record["first_token_ms"]),
            record["date"],
        ]
        for record in records
    ]
    return [
        f"All that was measured, with torch {result['torch']} on {short(result)}. A step is everything from "
        "one token to the next: embedding, blocks, head in fp16, cache and choice. ms is the median of its time, p99 the 99th "
        "percentile. It reads weights, head and cache; their rate is compared with the highest at which torch's reductions read, "
        f"{result['read_ceiling_gbps'] / 1000:.2f} TB/s. Shares are of graphs with one kind of work alone, which overlap a "
        f"little. The first token comes after a prompt of {prompts} tokens.",
        "",
        *table(titles, rows),
    ]


def markdown(result: dict[str, Any]) -> str:
    """A result's tables and its plot."""
    image = f"![Time of a step](scripts/results/{result['file']}.png)"
    return "\n".join([*comparison(result), "", *everything(result), "", image])


SECTION = Section("decode", "decode_report", markdown)


def join(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One result of several; the date is the last. Exits with a word where they are of different machines."""
    first = results[0]
    for result in results[1:]:
        for name in MACHINE:
            if result[name] != first[name]:
                sys.exit(f"results of {name} {first[name]} and {result[name]} are not joined: measure all on one machine")
    ceiling = max(result["read_ceiling_gbps"] for result in results)
    records = {tuple(record[name] for name in CASE): record for result in results for record in result["records"]}
    for record in records.values():
        record["percent_of_ceiling"] = 100 * record["gbps"] / ceiling
    date = max(result["date"] for result in results)
    return first | {"date": date, "read_ceiling_gbps": ceiling, "records": list(records.values())}


def main() -> None:
    if sys.argv[1:2] == ["--join"]:
        out, *parts = map(Path, sys.argv[2:])
        joint = join([json.loads(path.read_text(encoding="utf-8")) for path in ([out] if out.is_file() else []) + parts])
        out.write_text(json.dumps(joint, indent=1) + "\n", encoding="utf-8")
        return
    if not SECTION.results():
        sys.exit("there is no decode-*.json in scripts/results: run bash scripts/decode.sh where there is a GPU")
    from lutq.decode.chart import draw

    for result in SECTION.results():
        draw(result, RESULTS / f"{result['file']}.png")
    SECTION.write()


if __name__ == "__main__":
    main()
