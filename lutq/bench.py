"""`lutq bench kernel`: the time of y = x W^T with packed W, its traffic, and how far it is from memory and from cuBLAS.

Per W [N, K], bits and rows M of x: random weights are packed, the product is checked against float64, then timed beside cuBLAS
in fp16 (lutq/trial.py). The napkin is the bytes that any such kernel must move: packed W, x and y once. Their rate is compared
with the read ceiling, which the same run measures; torch's reductions may read slower than a better kernel would, so more than
100% is possible. GB and MB are powers of ten.
"""

import datetime
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import lutq
from lutq.config import LayerConfig, check_bits, check_group
from lutq.cuda import kernels, prepack
from lutq.errors import LutqError
from lutq.paths import check_folders
from lutq.runtime import out_of_memory
from lutq.timing import Timing, read_ceiling, require_gpu
from lutq.trial import check_product, cold_copies, random_packed, time_cublas, time_layer, traffic

SHAPES = ("4096x4096", "14336x4096", "4096x14336", "8192x8192", "28672x8192", "49152x12288")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
BITS = (2, 3, 4)
GRIDS = ("auto", "bcq", "uniform")
COLUMNS = {
    "shape": 11,
    "bits": 4,
    "M": 4,
    "us": 8,
    "min": 8,
    "max": 8,
    "MB": 8,
    "GB/s": 6,
    "of read": 7,
    "cuBLAS us": 9,
    "speedup": 7,
    "error": 7,
}


def parse_shape(text: str) -> tuple[int, int]:
    """`NxK` -> (N, K). Raises LutqError."""
    match = re.fullmatch(r"([1-9]\d*)[xX]([1-9]\d*)", text.strip())
    if not match:
        raise LutqError(f"--shape is outputs x inputs, such as 4096x14336, not {text!r}")
    return int(match[1]), int(match[2])


def check_settings(rows: Iterable[int], grid: str, repeats: int, *files: Path | None) -> None:
    """Raise LutqError for values out of range and for files whose directory does not exist."""
    for M in rows:
        if M < 1:
            raise LutqError(f"--rows must be 1 or more, not {M}")
    if grid not in GRIDS:
        raise LutqError(f"--grid must be one of {', '.join(GRIDS)}, not {grid!r}")
    if repeats < 1:
        raise LutqError(f"--repeats must be 1 or more, not {repeats}")
    check_folders(*files)


def layer_of(bits: int, grid: str, group: int) -> LayerConfig:
    """What is measured: BCQ without offsets, or a uniform grid with zero points (`auto`: at 4 bits). Raises LutqError."""
    check_bits(bits)
    check_group(group)
    uniform = grid == "uniform" or (grid == "auto" and bits == 4)
    return LayerConfig(bits, group, "uniform" if uniform else "bcq", uniform)


def make_record(
    N: int, K: int, M: int, layer: LayerConfig, timing: Timing, cublas_us: float, ceiling: float, error: float
) -> dict[str, Any]:
    """One case: times in us, traffic in bytes, rates in GB/s."""
    moved = traffic(N, K, M, layer)
    gbps = moved / timing.us / 1000
    names = {"n": N, "k": K, "m": M, "bits": layer.bits, "group": layer.group, "grid": layer.grid}
    rates = {"bytes": moved, "gbps": gbps, "percent_of_ceiling": 100 * gbps / ceiling}
    return {**names, **timing._asdict(), **rates, "cublas_us": cublas_us, "relative_error": error}


def columns(cells: Iterable[str]) -> str:
    """One line of the table, of fixed width: it is printed while the rest is still measured."""
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, COLUMNS.values(), strict=True)).rstrip()


def line(record: dict[str, Any]) -> str:
    """A record as a line of the table."""
    times = [f"{record[name]:.2f}" for name in ("us", "us_min", "us_max")]
    rates = [f"{record['bytes'] / 1e6:.2f}", f"{record['gbps']:.0f}", f"{record['percent_of_ceiling']:.1f}%"]
    cublas = [f"{record['cublas_us']:.2f}", f"{record['cublas_us'] / record['us']:.2f}x"]
    names = [f"{record['n']}x{record['k']}", f"{record['bits']}", f"{record['m']}"]
    return columns([*names, *times, *rates, *cublas, f"{record['relative_error']:.1e}"])


def driver_version(file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Of the NVIDIA driver, such as 580.95.05; None where the system does not say."""
    try:
        match = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", file.read_text(encoding="utf-8"))
    except OSError:
        return None
    return match and match[0]


def environment(device: torch.device, ceiling: float) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": driver_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "lutq": lutq.__version__,
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "read_ceiling_gbps": ceiling,
    }


def bench(
    shape: list[str] | None = None,
    rows: list[int] | None = None,
    bits: list[int] | None = None,
    grid: str = "auto",
    group: int = 128,
    json_file: Path | None = None,
    plot: Path | None = None,
    repeats: int = 20,
    device: str = "auto",
    echo: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Measure, print and write what the flags of `lutq bench kernel` say; the JSON file is renewed after every case.

    Raises LutqError.
    """
    from lutq.roofline import draw, require_matplotlib

    shapes, rows = [parse_shape(text) for text in shape or SHAPES], rows or list(ROWS)
    layers = [layer_of(b, grid, group) for b in bits or BITS]
    check_settings(rows, grid, repeats, json_file, plot)
    if plot is not None:
        require_matplotlib(plot)
    gpu = require_gpu(device)
    with torch.cuda.device(gpu):
        kernels(gpu)
        result = environment(gpu, read_ceiling(gpu, repeats)) | {"records": []}
        echo(f"{result['gpu']}: reads {result['read_ceiling_gbps']:.0f} GB/s at most (torch reductions, measured now)")
        echo(columns(COLUMNS))
        for N, K in shapes:
            with out_of_memory(lambda N=N, K=K: f"{N}x{K} is too large for this GPU: leave this --shape or large --rows out"):
                for record in measure_shape(N, K, rows, layers, repeats, gpu, result["read_ceiling_gbps"]):
                    result["records"].append(record)
                    echo(line(record))
                    if json_file is not None:
                        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        draw(result, plot)
    return result


def measure_shape(
    N: int, K: int, rows: list[int], layers: list[LayerConfig], repeats: int, gpu: torch.device, ceiling: float
) -> Iterable[dict[str, Any]]:
    """The records of one shape, each as soon as it is measured."""
    cublas = time_cublas(N, K, rows, repeats, gpu)
    for layer in layers:
        packed = random_packed(N, K, layer, gpu)
        first = prepack(packed, layer)
        ready = cold_copies(first)
        for M in rows:
            error = check_product(packed, first, torch.randn(M, K, dtype=torch.float16, device=gpu), layer)
            timing = time_layer(ready, N, K, M, layer, repeats)
            yield make_record(N, K, M, layer, timing, cublas[M], ceiling, error)
        del packed, first, ready
