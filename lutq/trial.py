"""One layer of `lutq bench`: random, checked against float64, and timed beside cuBLAS in fp16 (lutq/timing.py)."""

import math
import random
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F

import lutq.ops  # noqa: F401, registers the operator
from lutq.config import LayerConfig
from lutq.cuda import Prepacked, multiply_packed, properties, rows_limit
from lutq.errors import LutqError
from lutq.launch import FEW
from lutq.pack import Packed, dequantize, packed_shapes
from lutq.prepack import TILE
from lutq.timing import CHAINED_ROWS, REPLAYS, Chain, Timing, copies, expected_us, l2_bytes, launches, time_graph

CHECKED_ROWS = 256  # of W at most, in whole tiles


def traffic(N: int, K: int, M: int, layer: LayerConfig) -> int:
    """The napkin, in bytes: W as packed in a checkpoint, x and y in fp16."""
    shapes = packed_shapes(N, K, layer).values()
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes) + 2 * M * (N + K)


def checked_rows(N: int) -> list[int]:
    """Rows of W to check: the first tile of 16, the last, and some of the others, always the same."""
    tiles = math.ceil(N / TILE)
    inner = range(1, tiles - 1)
    chosen = {0, tiles - 1, *random.Random(N).sample(inner, min(len(inner), CHECKED_ROWS // TILE - 2))}
    return [row for tile in sorted(chosen) for row in range(tile * TILE, min(N, (tile + 1) * TILE))]


def random_packed(N: int, K: int, layer: LayerConfig, device: torch.device) -> Packed:
    """Random canonical tensors. Scales are spread by three; on average |W x| / sqrt(N) is |x| / sqrt(K)."""
    shapes = packed_shapes(N, K, layer)
    codes = torch.randint(-(2**31), 2**31, shapes["codes"][0], device=device, dtype=torch.int32)
    if K % 32:
        codes[..., -1] &= (1 << K % 32) - 1  # bits past K are 0
    scales = torch.rand(shapes["scales"][0], device=device) + 0.5
    zero_points, square = None, float(layer.bits)
    if layer.grid == "uniform":
        levels = 2**layer.bits
        zero_points = torch.randint(0, levels, shapes["zero_points"][0], device=device, dtype=torch.uint8)
        square = (levels**2 - 1) / 6  # the mean of (u - zero point)^2
    scales /= math.sqrt(K * square * (1 + 1 / 12))
    offsets = torch.randn(shapes["offsets"][0], device=device).div_(K).half() if "offsets" in shapes else None
    return Packed(codes, scales.half(), offsets, zero_points)


def select(packed: Packed, rows: list[int]) -> Packed:
    """Some rows of packed tensors."""
    extras = (None if tensor is None else tensor[rows] for tensor in (packed.offsets, packed.zero_points))
    return Packed(packed.codes[:, rows], packed.scales[:, rows], *extras)


def product(x: torch.Tensor, ready: Prepacked, N: int, layer: LayerConfig, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The result y [M, N], as LutLinear computes it."""
    return torch.ops.lutq.linear_prepacked(x, ready.codes, ready.records, None, N, *layer[:4], ready.wide, dtype)


def check_product(packed: Packed, ready: Prepacked, x: torch.Tensor, layer: LayerConfig) -> float:
    """The largest relative error of a row of y = x W^T against float64, over `checked_rows` of W.

    Raises LutqError where it is not below 2e-6 (M <= 4) or 5e-4, y in fp32.
    """
    (M, K), N = x.shape, packed.codes.shape[1]
    rows = checked_rows(N)
    exact = M <= FEW
    y = product(x, ready, N, layer, torch.float32)[:, rows].double()  # before the last rounding
    wanted = x.double() @ dequantize(*select(packed, rows), layer.group, layer.grid, K, torch.float64).T
    error = ((y - wanted).norm(dim=1) / wanted.norm(dim=1)).max().item()
    if not error < (2e-6 if exact else 5e-4):
        case = f"{N}x{K}, M = {M}, {layer.bits} bits, {layer.grid} grid, group {layer.group}"
        raise LutqError(f"the CUDA kernels are wrong for {case}: off by {error:.1e}; use --backend reference and report a bug")
    return error


def rotating(ready: Prepacked, count: int) -> list[Prepacked]:
    """`count` copies of a layer in kernel order, the first of them itself."""
    return [ready, *(Prepacked(ready.codes.clone(), ready.records.clone(), ready.wide) for _ in range(count - 1))]


def cold_copies(first: Prepacked) -> list[Prepacked]:
    """So many copies of a layer that going through them in turn finds none in the L2 cache."""
    return rotating(first, copies(first.codes.nbytes + first.records.nbytes, l2_bytes(first.codes.device)))


def chained(M: int, limit: int) -> bool:
    """Whether launches are chained: few rows, surely multiplied as packed (up to `limit` rows, half as many where K is small)."""
    return M <= FEW or min(CHAINED_ROWS, limit // 2) >= M


def time_layer(ready: list[Prepacked], N: int, K: int, M: int, layer: LayerConfig, repeats: int) -> Timing:
    """Time per product. The layer is given as its copies."""
    device, n = ready[0].codes.device, len(ready)
    count = launches(M, expected_us(traffic(N, K, M, layer), M, N, K), n)
    gpu = properties(device)
    if not chained(M, rows_limit(gpu.name, layer.bits, gpu.fused)):
        x = torch.randn(M, K, dtype=torch.float16, device=device)
        return time_graph(lambda i: product(x, ready[i % n], N, layer), count, repeats)
    chain = Chain(M, N, K, device)

    def launch(i: int) -> None:
        multiply_packed(chain.x(i), ready[i % n], None, chain.y(i), layer)

    timing = time_graph(launch, count, repeats, chain.reset)
    chain.check()
    check_order(chain, launch, count)
    return timing


def check_order(chain: Chain, launch: Callable[[int], None], count: int) -> None:
    """Raise LutqError unless the two replays of a graph gave the same bits as its launches one at a time.

    Kernels begin before the previous one has ended (programmatic dependent launch); they must not read its y too early.
    """
    found = [buffer.clone() for buffer in chain.buffers]
    chain.reset()
    for i in range(REPLAYS * count):
        launch(i % count)
        torch.cuda.synchronize()
    if not all(torch.equal(*pair) for pair in zip(found, chain.buffers, strict=True)):
        case = f"{chain.N}x{chain.K}, M = {chain.M}"
        raise LutqError(f"the CUDA kernels of {case} give other results back to back than one by one: report this as a bug")


def time_cublas(N: int, K: int, rows: Iterable[int], repeats: int, device: torch.device) -> dict[int, float]:
    """M -> us of the same product with W [N, K] in fp16 by torch, which asks cuBLAS."""
    first = torch.randn(N, K, dtype=torch.float16, device=device).div_(math.sqrt(K))
    weights = [first, *(first.clone() for _ in range(copies(first.nbytes, l2_bytes(device)) - 1))]

    def measure(M: int) -> float:
        count = launches(M, expected_us(first.nbytes, M, N, K), len(weights))
        if M > CHAINED_ROWS:
            x = torch.randn(M, K, dtype=torch.float16, device=device)
            return time_graph(lambda i: F.linear(x, weights[i % len(weights)]), count, repeats).us
        chain = Chain(M, N, K, device)
        timing = time_graph(
            lambda i: torch.mm(chain.x(i), weights[i % len(weights)].T, out=chain.y(i)), count, repeats, chain.reset
        )
        chain.check()
        return timing.us

    return {M: measure(M) for M in rows}
