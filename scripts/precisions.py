"""Measure any-precision checkpoints at every precision beside separate ones, into `scripts/results/precisions-NAME.json`.

    python scripts/precisions.py opt-tiny

Method feedback, with and without distilling, protocol `raw`, WikiText-2 test, fp32; otherwise as scripts/quality.py. Rows that
the file already holds from the same environment are kept. Then `python scripts/precisions_report.py` renews the README's table.
"""

import argparse
import functools
import tempfile
from pathlib import Path
from typing import Any

from measured import measure_rows, prepare
from quality import FEEDBACK, plain
from readme import RESULTS

from lutq.config import QuantConfig
from lutq.evaluate import measure
from lutq.hf import load
from lutq.quantize import quantize_checkpoint
from lutq.report import bits_per_weight

BITS = (4, 3, 2)
SEPARATE, TOGETHER = "one checkpoint each", "one checkpoint for all"
DISTILL = 2
ROWS = {row + (f", `--distill {n}`" if n else ""): (row, n) for row in (SEPARATE, TOGETHER) for n in (0, DISTILL)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    path, tokenizer, text, settings = prepare(arguments.model, "raw", arguments.device)
    name = settings["model"]

    with tempfile.TemporaryDirectory() as folder:

        @functools.cache
        def quantized(bits: int, lowest_bits: int, group: int, distill: int) -> tuple[Path, float]:
            """Directory of a checkpoint, and its stored bits per weight."""
            config = QuantConfig(bits=bits, lowest_bits=lowest_bits, group=group, distill=distill, **FEEDBACK)
            out = Path(folder) / f"{bits}-{lowest_bits}-{distill}"
            report = quantize_checkpoint(path, out, config, device=arguments.device)
            return report.out, bits_per_weight(report.layers)

        def measure_row(row: str, bits: int, group: int) -> dict[str, Any]:
            stored_as, distill = ROWS[row]
            precisions = (bits, 0) if stored_as == SEPARATE else (max(BITS), min(BITS))
            directory, stored = quantized(*precisions, group, distill)
            model = plain(load(directory, device=arguments.device, dtype="float32", bits=bits))
            ppl = measure(model, tokenizer, text, name, "raw", progress=False)
            return {"row": row, "bits": bits, "group": group, "stored": stored, "ppl": ppl.perplexity, "windows": ppl.windows}

        rows = [(row, bits, arguments.group) for row in ROWS for bits in BITS]
        measure_rows(RESULTS / f"precisions-{name}.json", settings, rows, "row", measure_row)


if __name__ == "__main__":
    main()
