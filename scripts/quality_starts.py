"""Measure sets of starting grids for `alternating` and `feedback`, into `scripts/results/starts-NAME.json`.

    python scripts/quality_starts.py opt-tiny

Each row is a method and the starts it tries, of which the smallest error is kept: for `alternating` by group, on the weights
alone, as `--start best` does with all there are; for `feedback` by row of W in each group, in the metric of the calibration
text. Otherwise as scripts/quality.py; the table is printed at the end.
"""

import argparse
import functools
import json
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from measured import measure_rows, prepare
from perplexity_report import number
from quality import FEEDBACK, figures_of, plain
from readme import RESULTS

from lutq import bcq, solve
from lutq.config import QuantConfig
from lutq.evaluate import measure
from lutq.hf import load
from lutq.quantize import quantize_checkpoint

PLAIN, CALIBRATED, MORE = ("greedy", "uniform"), ("range", "uniform", "greedy"), ("fine", "quantiles")
ROWS = {f"alternating: {' '.join(names)}": names for names in (PLAIN, (*PLAIN, "fine"), PLAIN + MORE)}
ROWS |= {f"feedback: {' '.join(names)}": names for names in (CALIBRATED, CALIBRATED + MORE)}


def settings_of(row: str) -> dict[str, Any]:
    """Of `QuantConfig`, without bits and group."""
    return FEEDBACK if row.startswith("feedback") else {"start": "best"}


def table(records: list[dict[str, Any]]) -> str:
    """A line per row: perplexity and, in brackets, the relative error of the outputs, without calibration of the weights."""
    bits = sorted({record["bits"] for record in records}, reverse=True)
    cells = {(record["row"], record["bits"]): record for record in records}

    def cell(row: str, b: int) -> str:
        record = cells.get((row, b))
        if record is None:
            return ""
        error = record["output_error"][-1] if "output_error" in record else record["relative_error"]
        return f"{number(record['ppl'])} ({error:.4f})"

    rows = dict.fromkeys(record["row"] for record in records)
    return "\n".join(f"{row:48}" + "".join(f"{cell(row, b):>18}" for b in bits) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    path, tokenizer, text, settings = prepare(arguments.model, "raw", arguments.device)

    def measure_row(row: str, bits: int, group: int) -> dict[str, Any]:
        config = QuantConfig(bits=bits, group=group, **settings_of(row))
        fit = functools.partial(solve.solve, starts=ROWS[row])
        with tempfile.TemporaryDirectory() as folder:
            with mock.patch.object(bcq, "BEST", ROWS[row]), mock.patch.object(solve, "solve", fit):
                report = quantize_checkpoint(path, Path(folder) / "out", config, device=arguments.device)
            model = plain(load(report.out, device=arguments.device, dtype="float32"))
            ppl = measure(model, tokenizer, text, settings["model"], "raw", progress=False)
        return {"row": row, "bits": bits, "group": group, **figures_of(report), "ppl": ppl.perplexity, "windows": ppl.windows}

    file = RESULTS / f"starts-{settings['model']}.json"
    rows = [(row, bits, arguments.group) for row in arguments.rows for bits in arguments.bits]
    measure_rows(file, settings, rows, "row", measure_row)
    print(table(json.loads(file.read_text(encoding="utf-8"))["records"]))


if __name__ == "__main__":
    main()
