"""`lutq bench kernel --tune`: up to how many rows of x the kernels on packed W beat dequantizing it for an ordinary product.

The limits go to gpus.json in the folder of compiled kernels (lutq/build.py), `{GPU name: {bits: rows}}`, which
`lutq.cuda.rows_limit` prefers to the table that comes with lutq.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lutq.bench import layer_of
from lutq.build import MOVE_CACHE, writing
from lutq.config import LayerConfig
from lutq.cuda import Prepacked, multiply_dense, multiply_packed, prepack, read_limits, rows_limit, user_table
from lutq.errors import LutqError
from lutq.report import table
from lutq.timing import expected_us, launches, require_gpu, time_graph
from lutq.trial import cold_copies, random_packed, traffic

N, K, GROUP = 8192, 8192, 128
ROWS = (*range(8, 64, 8), *range(64, 257, 16))
BITS = (1, 2, 3, 4)


def threshold(times: dict[int, tuple[float, float]]) -> int:
    """The limit that is best over all measured rows M -> (us on packed W, us of dequantizing), by the mean logarithm.

    Where the curves cross once it is the last M at which packed W is faster; a single noisy time does not move it far. At
    least the fewest rows measured.
    """

    def cost(limit: int) -> float:
        return sum(math.log(dense if limit < M else lut) for M, (lut, dense) in times.items())

    return min(times, key=cost)


def merge(file: Path, name: str, limits: dict[str, int]) -> None:
    """Put the limits of a GPU into the table, beside those of others. Raises LutqError for a file that is no such table."""
    tables = read_limits(file)
    with writing(file.parent, MOVE_CACHE):
        fresh = file.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(tables | {name: limits}, indent=1) + "\n", encoding="utf-8")
        fresh.replace(file)


def measure(ready: list[Prepacked], layer: LayerConfig, M: int, repeats: int) -> tuple[float, float]:
    """Us of one product with M rows in fp16 (on packed W, dequantizing). The layer is given as its copies."""
    device, n = ready[0].codes.device, len(ready)
    x = torch.randn(M, K, dtype=torch.float16, device=device)
    y = torch.empty(M, N, dtype=torch.float16, device=device)
    count = launches(M, expected_us(traffic(N, K, M, layer), M, N, K), n)
    lut = time_graph(lambda i: multiply_packed(x, ready[i % n], None, y, layer), count, repeats)
    dense = time_graph(lambda i: multiply_dense(x, ready[i % n], None, y, layer), count, repeats)
    return lut.us, dense.us


def rows_table(times: dict[int, dict[int, tuple[float, float]]]) -> str:
    """Times by bits and M as a table: a line per M, two columns per bits."""
    header = ("M", *(f"{kind}, {bits} bits" for bits in times for kind in ("packed", "dense")))
    body = [
        (f"{M}", *(f"{us:.1f}" for by_rows in times.values() for us in by_rows[M]))
        for M in dict.fromkeys(M for t in times.values() for M in t)
    ]
    return table(header, body)


def tune(repeats: int = 20, device: str = "auto", echo: Callable[[str], Any] = print) -> dict[str, int]:
    """Measure bits 1 to 4 at 8192x8192 in groups of 128, print the times, and write the limits: bits -> rows.

    Raises LutqError.
    """
    if repeats < 1:
        raise LutqError(f"--repeats must be 1 or more, not {repeats}")
    gpu = require_gpu(device)
    read_limits(user_table())  # a damaged one is said before minutes are spent
    times: dict[int, dict[int, tuple[float, float]]] = {}
    name = torch.cuda.get_device_name(gpu)
    echo(f"{name}, {N}x{K} in groups of {GROUP}, us per product:")
    with torch.cuda.device(gpu):
        for bits in BITS:
            layer = layer_of(bits, "auto", GROUP)
            ready = cold_copies(prepack(random_packed(N, K, layer, gpu), layer))
            times[bits] = {M: measure(ready, layer, M, repeats) for M in ROWS}
    limits = {str(bits): threshold(by_rows) for bits, by_rows in times.items()}
    merge(user_table(), name, limits)
    rows_limit.cache_clear()
    echo(rows_table(times))
    words = ", ".join(f"{limit} at {bits} bits" for bits, limit in limits.items())
    echo(f"packed up to these rows: {words}; written to {user_table()}")
    return limits
