"""Measure perplexity of methods x bits x group into `scripts/results/perplexity-NAME.json`.

    python scripts/perplexity.py opt-tiny --groups 128 64
    python scripts/perplexity.py smollm2-135m --groups 128 64      # a directory, see scripts/smollm2.py

Protocol `gptq`, WikiText-2 test, fp32, all windows. Every figure goes through the whole path: `lutq.quantize_checkpoint`
to a directory, `lutq.load`, `lutq.evaluate.measure`. Then `python scripts/perplexity_report.py` renews README and plot.
"""

import argparse
import datetime
import json
import tempfile
from pathlib import Path

import torch
import transformers

import lutq
from lutq.config import QuantConfig
from lutq.data import load_text
from lutq.evaluate import measure
from lutq.hf import load
from lutq.quantize import quantize_checkpoint
from lutq.report import bits_per_weight, relative_error
from lutq.runtime import device_name, resolve_device
from lutq.source import locate
from lutq.tokens import load_tokenizer

RESULTS = Path(__file__).parent / "results"
VARIANTS = {
    "rtn --no-clip": {"method": "rtn", "clip": False},
    "rtn": {"method": "rtn", "clip": True},
    "rtn --symmetric": {"method": "rtn", "symmetric": True},
    "greedy": {"method": "greedy"},
    "alternating --start greedy": {"method": "alternating", "start": "greedy"},
    "alternating --start best": {"method": "alternating", "start": "best"},
    "alternating --start uniform": {"method": "alternating", "start": "uniform"},
    "alternating --start uniform --no-clip": {"method": "alternating", "start": "uniform", "clip": False},
    "alternating --start uniform --no-offsets": {"method": "alternating", "start": "uniform", "offsets": False},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--groups", type=int, nargs="+", default=[128])
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    path, name = locate(arguments.model)
    tokenizer, text = load_tokenizer(path), load_text("wikitext2", "gptq")

    def perplexity(directory: Path) -> float:
        model = load(directory, device=arguments.device, dtype="float32")
        return measure(model, tokenizer, text, name, "gptq", progress=False).perplexity

    records = [
        {"variant": "fp16", "bits": 16, "group": 0, "bits_per_weight": 16.0, "relative_error": 0.0, "ppl": perplexity(path)}
    ]
    print(records[0])
    for variant, settings in VARIANTS.items():
        for group in arguments.groups:
            for bits in arguments.bits:
                with tempfile.TemporaryDirectory() as folder:
                    config = QuantConfig(bits=bits, group=group, **settings)
                    report = quantize_checkpoint(path, Path(folder) / "out", config, device=arguments.device)
                    figures = {"bits_per_weight": bits_per_weight(report.layers), "relative_error": relative_error(report.layers)}
                    record = {"variant": variant, "bits": bits, "group": group, **figures, "ppl": perplexity(report.out)}
                records.append(record)
                print(record, flush=True)
    result = {
        "model": name,
        "protocol": "gptq",
        "dataset": text.source,
        "dtype": "float32",
        "device": device_name(resolve_device(arguments.device)),
        "lutq": lutq.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
        "records": records,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"perplexity-{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
