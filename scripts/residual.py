"""Measure what the same bits buy as corrections, smaller groups or another plane, into `scripts/results/residual-NAME.json`.

    python scripts/residual.py opt-tiny

Method feedback, protocol `raw`, WikiText-2 test, fp32; otherwise as scripts/quality.py. Rows that the file already holds from the
same environment are kept. Then `python scripts/residual_report.py` renews the README's table.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from measured import measure_rows, prepare
from quality import FEEDBACK, figures_of, plain
from readme import RESULTS

from lutq.config import QuantConfig
from lutq.evaluate import measure
from lutq.hf import load
from lutq.quantize import quantize_checkpoint

ROWS: list[dict[str, Any]] = [
    {"bits": 2, "group": 128},
    {"bits": 2, "group": 128, "outliers": 0.5},
    {"bits": 2, "group": 64},
    {"bits": 2, "group": 128, "outliers": 1.2},
    {"bits": 2, "group": 128, "low_rank": 4},
    {"bits": 3, "group": 128},
    {"bits": 2, "group": 32},
    {"bits": 2, "group": 128, "outliers": 1.2, "low_rank": 8},
]


def flags(row: dict[str, Any]) -> str:
    """A row's settings as flags of `lutq quantize`."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in row.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    path, tokenizer, text, settings = prepare(arguments.model, "raw", arguments.device)
    name, by_flags = settings["model"], {flags(row): row for row in ROWS}

    def measure_row(row: str, bits: int, group: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            config = QuantConfig(**by_flags[row], **FEEDBACK)
            report = quantize_checkpoint(path, Path(folder) / "out", config, device=arguments.device)
            model = plain(load(report.out, device=arguments.device, dtype="float32"))
            ppl = measure(model, tokenizer, text, name, "raw", progress=False)
        figures = figures_of(report)
        return {"row": row, "bits": bits, "group": group, **figures, "ppl": ppl.perplexity, "windows": ppl.windows}

    rows = [(key, row["bits"], row["group"]) for key, row in by_flags.items()]
    measure_rows(RESULTS / f"residual-{name}.json", settings, rows, "row", measure_row)


if __name__ == "__main__":
    main()
