"""Measure perplexity of methods x bits x groups into `scripts/results/perplexity-NAME.json`.

    python scripts/perplexity.py opt-tiny --groups 128 64
    python scripts/perplexity.py smollm2-135m --groups 64      # a directory, see scripts/smollm2.py

Protocol `gptq`, WikiText-2 test, fp32, all windows. Every figure goes through the whole path: `lutq.quantize_checkpoint` to
a directory, `lutq.load`, `lutq.evaluate.measure`. Rows that the file already holds from the same environment are kept, so an
interrupted run goes on. Then `python scripts/perplexity_report.py` renews the README's table and the plot.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from measured import measure_rows, prepare
from readme import RESULTS

from lutq.config import QuantConfig
from lutq.evaluate import measure
from lutq.hf import load
from lutq.quantize import quantize_checkpoint
from lutq.report import bits_per_weight, relative_error

VARIANTS: dict[str, dict[str, Any]] = {
    "rtn --no-clip": {"method": "rtn", "clip": False},
    "rtn": {"method": "rtn"},
    "rtn --symmetric": {"method": "rtn", "symmetric": True},
    "greedy": {"method": "greedy"},
    "alternating --start greedy": {"start": "greedy"},
    "alternating --start uniform": {"start": "uniform"},
    "alternating --start uniform --no-offsets": {"start": "uniform", "offsets": False},
    "alternating --start best": {"start": "best"},
    "alternating": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--groups", type=int, nargs="+", default=[128])
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    path, tokenizer, text, settings = prepare(arguments.model, "gptq", arguments.device)
    name = settings["model"]

    def measure_row(variant: str, bits: int, group: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            figures = {"bits_per_weight": 16.0, "relative_error": 0.0}
            directory = path
            if variant != "fp16":
                config = QuantConfig(bits=bits, group=group, **VARIANTS[variant])
                report = quantize_checkpoint(path, Path(folder) / "out", config, device=arguments.device)
                figures = {"bits_per_weight": bits_per_weight(report.layers), "relative_error": relative_error(report.layers)}
                directory = report.out
            model = load(directory, device=arguments.device, dtype="float32")
            ppl = measure(model, tokenizer, text, name, "gptq", progress=False).perplexity
        return {"variant": variant, "bits": bits, "group": group, **figures, "ppl": ppl}

    rows = [("fp16", 16, 0)]
    rows += [(variant, bits, group) for variant in VARIANTS for group in arguments.groups for bits in arguments.bits]
    measure_rows(RESULTS / f"perplexity-{name}.json", settings, rows, "variant", measure_row)


if __name__ == "__main__":
    main()
