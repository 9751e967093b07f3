"""Estimate what calibration takes for a model whose weights are not at hand, from a few of its blocks with random weights.

    python scripts/estimate.py llama-2-7b --bits 3
    python scripts/estimate.py llama-2-7b --recipe calibrated

The shape is a name in configs/models or a JSON file. Models of 2 and of 3 blocks go through all of `lutq quantize --method
feedback`, or with a recipe, with the embedded model's tokenizer and calibration text; what the third takes, in seconds and
in bytes of the device, times the blocks still missing is added to what the larger one takes. Neither depends on the values of
weights.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from measured import machine
from transformers import AutoModelForCausalLM

from lutq.config import make_config
from lutq.decode.synthetic import read_config
from lutq.quantize import quantize_checkpoint
from lutq.runtime import device_name, resolve_device
from lutq.source import locate
from lutq.tokens import load_tokenizer

BLOCKS = (2, 3)  # the first is unlike the others: nothing lies behind it yet


def make_model(shape: Any, blocks: int, folder: Path, device: torch.device) -> None:
    """A checkpoint of `blocks` blocks of a transformers config, with random fp16 weights and the embedded tokenizer."""
    shape.num_hidden_layers = blocks
    with device:
        AutoModelForCausalLM.from_config(shape, dtype=torch.float16).save_pretrained(folder)
    load_tokenizer(locate(None)[0]).save_pretrained(folder)


def measure(shape: Any, blocks: int, settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Seconds and, on a GPU, bytes that a run takes for some blocks of a shape."""
    with tempfile.TemporaryDirectory() as folder:
        make_model(shape, blocks, Path(folder) / "model", device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        config = make_config(**{"method": "feedback"} | settings if settings["recipe"] is None else settings)
        report = quantize_checkpoint(Path(folder) / "model", Path(folder) / "out", config, device=str(device))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"blocks": blocks, "seconds": report.seconds, "device_bytes": peak}


def extrapolate(figures: list[float], total: int) -> tuple[float, float]:
    """What `total` blocks take by what those of BLOCKS take, and what one does."""
    few, more = figures
    block = (more - few) / (BLOCKS[1] - BLOCKS[0])
    return more + (total - BLOCKS[1]) * block, block


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape")
    parser.add_argument("--recipe")
    parser.add_argument("--bits", type=int)
    parser.add_argument("--group", type=int)
    parser.add_argument("--calib-windows", type=int)
    parser.add_argument("--refine", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = vars(parser.parse_args())
    name, file = arguments.pop("shape"), arguments.pop("json")
    device = resolve_device(arguments.pop("device"))
    total = read_config(name).num_hidden_layers
    records = [measure(read_config(name), blocks, arguments, device) for blocks in BLOCKS]
    seconds, block = extrapolate([record["seconds"] for record in records], total)
    settings = {key: value for key, value in arguments.items() if value is not None}
    result = (
        {"shape": Path(name).stem}
        | machine(device_name(device))
        | {
            "settings": settings,
            "records": records,
            "blocks": total,
            "seconds_per_block": block,
            "seconds": seconds,
        }
    )
    memory = ""
    if device.type == "cuda":
        result["device_bytes"], _ = extrapolate([record["device_bytes"] for record in records], total)
        memory = f", {result['device_bytes'] / 1e9:.1f} GB of GPU memory"
    print(f"{name} {settings}: {block:.1f} s a block, about {seconds / 60:.1f} min for all {total}{memory}")
    if file:
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
