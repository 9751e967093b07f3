r"""Measure what each calibrated stage adds and what the shipped recipes reach, into `scripts/results/quality-NAME.json`.

    python scripts/quality.py opt-tiny --groups 128
    python scripts/quality.py smollm2-135m --bits 4 3 2 --groups 64 --max-windows 10 --rows recipes \
        --recipe-settings group=64 scale_bits=16 rate=1e-3

The second model is a directory that scripts/smollm2.py makes.

Protocol `raw`, WikiText-2 test, fp32. Every figure goes through the whole path: `lutq.quantize_checkpoint` to a directory,
`lutq.load`, `lutq.evaluate.measure`. Rows that the file already holds from the same environment are kept, so an interrupted
run goes on. Then `python scripts/quality_report.py` renews the README's tables and the plot.

With `--work DIR` checkpoints are put there and stay: one that is there is only measured, and an unfinished one goes on.
"""

import argparse
import contextlib
import dataclasses
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from measured import measure_rows, prepare
from readme import RESULTS

from lutq.config import QuantConfig, make_config, read_recipe
from lutq.evaluate import measure
from lutq.hf import load
from lutq.linear import LutLinear
from lutq.quantize import quantize_checkpoint
from lutq.report import Report, bits_per_weight, relative_error

FEEDBACK = {"method": "feedback", "calib_windows": 64}
STAGES: dict[str, dict[str, Any]] = {
    "rtn --no-clip": {"method": "rtn", "clip": False},
    "rtn": {"method": "rtn"},
    "greedy": {"method": "greedy"},
    "alternating": {},
    "feedback --rounds 0 --sweeps 0": FEEDBACK | {"rounds": 0, "sweeps": 0},
    "feedback --sweeps 0": FEEDBACK | {"sweeps": 0},
    "feedback": FEEDBACK,
    "feedback --calib own": FEEDBACK | {"calib": "own"},
    "feedback --end-loss": FEEDBACK | {"end_loss": True},
    "feedback --scaling": FEEDBACK | {"scaling": True},
    "feedback --scale-bits 8 --group 64": FEEDBACK | {"scale_bits": 8, "group": 64},
    "feedback --refine 2": FEEDBACK | {"refine": 2},
    "feedback --distill 2": FEEDBACK | {"distill": 2},
    "feedback --distill 2 --flips": FEEDBACK | {"distill": 2, "flips": True},
    "feedback --distill 2 --flips --rate 3e-3": FEEDBACK | {"distill": 2, "flips": True, "rate": 3e-3},
    "calibrated": read_recipe("calibrated"),
}
RECIPES = {4: "best-4bit", 3: "best-3bit", 2: "best-2bit", 2.5: "best-mixed"}


def figures_of(report: Report) -> dict[str, Any]:
    """What a run reports about itself."""
    figures = {
        "bits_per_weight": bits_per_weight(report.layers),
        "whole_model": 8 * report.bytes_after / report.parameters,
        "relative_error": relative_error(report.layers),
        "seconds": report.seconds,
    }
    if report.calibration:
        figures |= {"output_error": [report.calibration.before, report.calibration.after], "text": report.calibration.text}
        figures |= {"divergence": report.calibration.distilled.get(report.config.bits)}
    return figures


def quantize(path: Path, folder: Path, config: QuantConfig, device: str) -> dict[str, Any]:
    """Put the quantized model into `folder`, unless one of the same settings is there; returns what the run reported, which is in
    a file beside it.
    """
    file, settings = folder.with_suffix(".json"), json.loads(json.dumps(dataclasses.asdict(config)))
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if kept.get("settings") != settings or kept.get("source") != str(path):
        file.unlink(missing_ok=True)
        report = quantize_checkpoint(path, folder, config, device=device, overwrite=folder.exists())
        kept = {"source": str(path), "settings": settings, "figures": figures_of(report)}
        file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return kept["figures"]


def plain(model: Any) -> Any:
    """The same model with ordinary Linear layers of the dequantized weights, which a CPU runs faster."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LutLinear):
            linear = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            linear.weight = torch.nn.Parameter(module.dequantize(), requires_grad=False)
            linear.bias = module.bias
            model.set_submodule(name, linear)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--bits", type=float, nargs="+", default=[4, 3, 2, 2.5], help="2.5 is the mixed recipe")
    parser.add_argument("--groups", type=int, nargs="+", default=[128])
    parser.add_argument("--rows", nargs="+", default=["recipes", *STAGES], help="recipes (those of RECIPES), or names of STAGES")
    parser.add_argument("--recipe-settings", nargs="+", default=[], metavar="NAME=VALUE", help="instead of those of the recipes")
    parser.add_argument("--max-windows", type=int, help="perplexity of so many windows, with that of all beside it")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, help="keep checkpoints there")
    arguments = parser.parse_args()
    overrides = {name: json.loads(value) for name, _, value in (setting.partition("=") for setting in arguments.recipe_settings)}
    path, tokenizer, text, settings = prepare(arguments.model, "raw", arguments.device)
    name = settings["model"]
    settings["max_windows"] = arguments.max_windows
    if arguments.work:
        arguments.work.mkdir(parents=True, exist_ok=True)
    suffix = f"-first{arguments.max_windows}" if arguments.max_windows else ""

    def measure_row(row: str, bits: float, group: int) -> dict[str, Any]:
        with contextlib.nullcontext(arguments.work) if arguments.work else tempfile.TemporaryDirectory() as folder:
            figures, directory = {"bits_per_weight": 16.0, "whole_model": 16.0}, path
            if row != "fp16":
                recipe = row.split()[0] if row.startswith("best") else None
                stage = STAGES.get(row, {}) | {"bits": bits, "group": group}
                config = make_config(recipe, **overrides) if recipe else QuantConfig(**stage)
                directory = Path(folder) / re.sub(r"[^\w=-]+", "_", f"{row} {config.bits} {config.group}")
                figures = quantize(path, directory, config, arguments.device)
            model = plain(load(directory, device=arguments.device, dtype="float32"))
            ppl = measure(model, tokenizer, text, name, "raw", arguments.max_windows, progress=False)
            figures |= {"ppl": ppl.perplexity, "windows": ppl.windows}
            if arguments.max_windows:
                ppl = measure(model, tokenizer, text, name, "raw", progress=False)
                figures |= {"ppl_all": ppl.perplexity, "windows_all": ppl.windows}
        return {"row": row, "bits": bits, "group": group, **figures}

    rows = [("fp16", 16, 0)]
    for group in arguments.groups:
        for bits in arguments.bits:
            stages = [row for row in arguments.rows if row != "recipes" and bits == int(bits)]
            rows += [(row, int(bits), STAGES[row].get("group", group)) for row in stages]
    if "recipes" in arguments.rows:  # they have groups of their own
        named = [(RECIPES[bits], bits, make_config(RECIPES[bits], **overrides).group) for bits in arguments.bits]
        rows += [(" ".join((recipe, *arguments.recipe_settings)), bits, group) for recipe, bits, group in named]
    measure_rows(RESULTS / f"quality-{name}{suffix}.json", settings, rows, "row", measure_row)


if __name__ == "__main__":
    main()
