"""Time what corrections beside the planes add to a product with one row of x, into `scripts/results/corrections-NAME.json`.

    python scripts/corrections.py xeon
    python scripts/corrections.py h200 --device cuda

NAME is what the file is called. Random weights at 3 bits in groups of 128. On a CPU one thread, x in fp32, the median of single
products; on a GPU x in fp16, CUDA graphs, weights not in the L2 cache. Then `python scripts/corrections_report.py` renews the
README's table.
"""

import argparse
import json

import torch
from cpu import median_ms, processor
from measured import machine
from readme import RESULTS

from lutq.config import LayerConfig
from lutq.linear import LutLinear
from lutq.pack import Corrected
from lutq.residual import Residual, residual_shapes
from lutq.runtime import resolve_device
from lutq.timing import copies, l2_bytes, time_graph
from lutq.trial import random_packed

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
CORRECTIONS = ((0.0, 0), (0.5, 0), (0.0, 8), (0.5, 8))  # percent of the weights as outliers, rank
RUNS, LAUNCHES, REPEATS = 50, 60, 10


def make(N: int, K: int, outliers: float, rank: int, device: torch.device) -> LutLinear:
    """A layer of random numbers."""
    bare = LayerConfig(3, 128)
    layer = bare._replace(outliers_per_row=round(K * outliers / 100), low_rank=rank)
    tensors = {}
    for name, (shape, dtype) in residual_shapes(N, K, layer).items():
        numbers = torch.randn(shape, device=device) if dtype.is_floating_point else torch.randint(K, shape, device=device)
        tensors[name] = numbers.to(dtype)
    module = LutLinear.from_packed(Corrected(random_packed(N, K, bare, device), Residual(**tensors)), K, layer)
    module.prepack()  # which is not possible inside a graph
    return module


@torch.inference_mode()
def time_us(N: int, K: int, outliers: float, rank: int, device: torch.device) -> float:
    """Microseconds of a product."""
    if device.type == "cuda":
        first = make(N, K, outliers, rank, device)
        nbytes = sum(tensor.nbytes for tensor in first.buffers())
        layers = [first, *(make(N, K, outliers, rank, device) for _ in range(copies(nbytes, l2_bytes(device)) - 1))]
        x = torch.randn(1, K, device=device, dtype=torch.float16)
        return time_graph(lambda i: layers[i % len(layers)](x), LAUNCHES, REPEATS).us
    module, x = make(N, K, outliers, rank, device), torch.randn(1, K)
    return 1000 * median_ms(lambda: module(x), RUNS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    torch.set_num_threads(1)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{processor()}, one core"
    records = []
    for N, K in SHAPES:
        for outliers, rank in CORRECTIONS:
            us = time_us(N, K, outliers, rank, device)
            records.append({"n": N, "k": K, "outliers": outliers, "low_rank": rank, "us": us})
            print(records[-1], flush=True)
    result = machine(where) | {"records": records}
    (RESULTS / f"corrections-{arguments.name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
