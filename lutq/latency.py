"""How long the products of a model take with one row of x, by their sizes and how they are stored, measured on a device.

On a GPU these are lutq's kernels as `lutq bench kernel` times them (lutq/timing.py): random weights, CUDA graphs, no weight in
the L2 cache. Elsewhere they are products of a quantized layer by the backend that `auto` is there, one after the other, always
of the same weights, which stay in the processor's caches where these are large enough. Times of a run are kept in its journal,
because a second measurement gives other figures and then other choices.
"""

import statistics
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from lutq.config import LayerConfig
from lutq.journal import Journal, StaleRunError
from lutq.linear import LutLinear
from lutq.ops import working_backend
from lutq.runtime import device_name, out_of_memory, progress_interval

REPEATS = 20  # of a graph
PLAIN_SECONDS, FEWEST = 0.1, 5  # of plain products: time to aim at, and how many at least
UNIT = "times of products"  # in the journal


class Product(NamedTuple):
    """y = x W^T with x of one row and W [N, K] stored as `layer` says."""

    N: int
    K: int
    layer: LayerConfig


class Times(NamedTuple):
    """Nanoseconds of products with one row of x, measured with `backend` on `device`, which is its name in words."""

    device: str
    backend: str
    ns: dict[Product, int]


def to_json(times: Times) -> dict[str, Any]:
    """As the journal and a checkpoint keep them."""
    products = [{"n": N, "k": K, **layer._asdict(), "ns": ns} for (N, K, layer), ns in times.ns.items()]
    return {"device": times.device, "backend": times.backend, "products": products}


def from_json(kept: dict[str, Any]) -> Times:
    """The inverse of `to_json`."""
    ns = {}
    for product in kept["products"]:
        fields = dict(product)
        N, K, value = (fields.pop(name) for name in ("n", "k", "ns"))
        ns[Product(N, K, LayerConfig(**fields))] = value
    return Times(kept["device"], kept["backend"], ns)


def record(times: Times, target_ms: float, ns: int) -> dict[str, Any]:
    """What a checkpoint says whose quantized layers take `ns` nanoseconds of products per token."""
    return {"target_ms": target_ms, "predicted_ms": ns / 1e6, **to_json(times)}


def words(record: dict[str, Any]) -> str:
    """The same in words, without the single products."""
    return (
        f"predicted {record['predicted_ms']:.4g} ms per token in the quantized layers, of {record['target_ms']:g} allowed "
        f"(products of one row, measured on {record['device']}, backend {record['backend']})"
    )


def measure(products: Iterable[Product], device: torch.device, journal: Journal) -> Times:
    """The times of products, each measured once, or those that the journal has from an earlier run. Raises LutqError,
    StaleRunError where that ran elsewhere.
    """
    products = list(dict.fromkeys(products))
    name, backend, ns = device_name(device), working_backend("auto", device), {}
    for kept in journal.records:
        if kept["unit"] == UNIT:
            if (kept["device"].split(",")[0], kept["backend"]) != (name.split(",")[0], backend):  # but for threads
                raise StaleRunError(
                    f"the unfinished run was timed on {kept['device']} (backend {kept['backend']}) and this is {name} "
                    f"(backend {backend}): {journal.remedy}"
                )
            return from_json(kept)
    with tqdm(products, unit="product", mininterval=progress_interval()) as bar:
        for product in bar:
            N, K, layer = product
            bar.set_description(f"{N}x{K}, {layer.bits} bits, groups of {layer.group or K}", refresh=False)
            with out_of_memory(lambda N=N, K=K: f"timing {N}x{K} needs its weights several times: use a device with more memory"):
                us = time_kernel(product, device) if backend == "cuda" else time_plain(product, device, backend)
            ns[product] = round(1000 * us)
    times = Times(name, backend, ns)
    journal.add({"unit": UNIT, **to_json(times)})
    return times


def time_kernel(product: Product, device: torch.device) -> float:
    """Microseconds of a product by the CUDA kernels."""
    from lutq.cuda import prepack
    from lutq.trial import cold_copies, random_packed, time_layer

    N, K, layer = product
    with torch.cuda.device(device):
        copies = cold_copies(prepack(random_packed(N, K, layer, device), layer))
        return time_layer(copies, N, K, 1, layer, REPEATS).us


@torch.inference_mode()
def time_plain(product: Product, device: torch.device, backend: str) -> float:
    """Microseconds of a product by `backend`, in the dtype that x has there: the median of single ones."""
    from lutq.trial import random_packed

    N, K, layer = product
    module = LutLinear.from_packed(random_packed(N, K, layer, device), K, layer)
    module.backend = backend
    x = torch.randn(1, K, device=device, dtype=torch.float32 if device.type == "cpu" else torch.float16)
    times: list[float] = []
    while len(times) <= FEWEST or sum(times) < PLAIN_SECONDS:
        begin = time.perf_counter()
        module(x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return 1e6 * statistics.median(times[1:])  # the first one allocates
