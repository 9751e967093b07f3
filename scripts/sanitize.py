"""Products of every kind, and a step's other kernels, on small layers: what scripts/sanitize.sh runs under compute-sanitizer.

python scripts/sanitize.py [PART...]        # PART is a name of `parts`; all if there is none
"""

import functools
import itertools
import sys
from collections.abc import Callable

import torch

from lutq.bcq import alternating
from lutq.columns import levels_of, round_on_gpu
from lutq.config import LayerConfig
from lutq.cuda import aligned, arguments, kernels, multiply, multiply_sums, prepack, properties, run_bits, run_gemv
from lutq.decode.fusion import Fusion, Norm
from lutq.decode.products import Packed, Sums, padded
from lutq.decode.shape import Shape
from lutq.decode.steps import FUNCTIONS, Kernels, Plan
from lutq.launch import GemvPlan, bit_blocks, slabs, takes_gemv
from lutq.parallel.inboxes import Inboxes, inbox_bytes
from lutq.trial import random_packed
from lutq.tunable import Tunable
from lutq.uniform import rtn

# Every mode of every kernel.
MATRIX = (
    (1, torch.float16),
    (3, torch.float32),
    (7, torch.bfloat16),
    (12, torch.float16),
    (20, torch.bfloat16),
    (40, torch.float16),
    (200, torch.float16),
)
HIDDEN = (72, 4104, 8200, 16384)  # of norms: one to four vectors of 8 numbers a thread
RANKS_HIDDEN = (72, 4104, 16384)  # of those that sum over ranks: by a block, by a cluster, by a block that has no room for more
SLABS = (1, 5, 13)  # of sums; kernels add 12 at a time at most
# M, heads, heads of keys and values, their size, capacity, how attention is launched
ATTENTION = (
    (1, 4, 4, 128, 300, Plan(1, 1, 1)),
    (2, 4, 2, 80, 130, Plan(2, 4, 1)),
    (2, 6, 2, 64, 70, Plan(3, 1, 5)),
    (3, 8, 2, 96, 300, Plan(4, 8, 2)),
    (1, 8, 1, 16, 40, Plan(4, 2, 3)),
)


def products(device: torch.device, bits: int) -> int:
    """Run them; how many."""
    cases = 0
    for (grid, offsets), (N, K, group) in itertools.product(
        (("bcq", True), ("uniform", True)),
        ((80, 1280, 128), (33, 1100, 32)),
    ):
        layer = LayerConfig(bits, group, grid, offsets)
        ready = prepack(random_packed(N, K, layer, device), layer)
        for M, dtype in MATRIX:
            x = torch.randn(M, K, device=device).to(dtype)
            multiply(x, ready, None, N, layer)
            cases += 1
    return cases


def one_row(device: torch.device, bits: int) -> int:
    """Run bit_gemv and lut_gemv where the GPU has them, lut_gemv for y and for sums; how many times."""
    cases, gpu = 0, properties(device)
    for (grid, offsets), (N, K, group, dtype) in itertools.product(
        (("bcq", True), ("bcq", False), ("uniform", True)),
        (
            (96, 1280, 128, torch.float16),
            (33, 2100, 64, torch.bfloat16),
            (20, 72, 0, torch.float32),
            (40, 16600, 256, torch.half),
        ),
    ):
        layer = LayerConfig(bits, group, grid, offsets)
        ready = prepack(random_packed(N, K, layer, device), layer)
        x, bias, y = (torch.randn(1, n, device=device).to(dtype) for n in (K, N, N))
        x = aligned(x)
        for blocks in (1, 2) if bit_blocks(N, K, layer, gpu) else ():
            run_bits(kernels(device), arguments(x, ready, bias, y, layer), blocks)
            cases += 1
        cases += with_more(Packed(*ready, bias, N, K, layer), dtype)
        if not takes_gemv(layer, gpu):
            continue
        for blocks, split in ((1, 1), (3, 1), (2, 2), (6, 2)):
            if split <= slabs(K):
                run_gemv(kernels(device), arguments(x, ready, bias, y, layer), GemvPlan(blocks, split))
                cases += 1
        multiply_sums(x, ready, torch.empty(slabs(K), padded(N), device=device), N, layer)
        cases += 1
    return cases


def with_more(product: Packed, dtype: torch.dtype) -> int:
    """Run bit_gemv with what it can do besides, as a layer allows; how many times."""
    N, K, cases = product.N, product.K, 0
    weight, shift = (torch.randn(K, device=product.ready.codes.device).to(dtype) for _ in range(2))
    rms, centered = Norm(weight, None, 1e-5, False), Norm(weight, shift, 1e-5, True)
    for fusion in (Fusion(rms, "silu", True), Fusion(centered, "relu"), Fusion(add=True)):
        if product.fuses(1, dtype, fusion):
            x = torch.randn(1, K, device=weight.device).to(torch.float32 if fusion.norm else dtype)
            product.fused_into(x, torch.zeros(1, N // 2 if fusion.gated else N, device=weight.device), fusion)
            cases += 1
    return cases


def draw(do: Kernels, dtype: torch.dtype, *sizes: int) -> torch.Tensor:
    """Random numbers."""
    return torch.randn(*sizes, device=do.device).to(dtype)


def draw_sums(do: Kernels, dtype: torch.dtype, count: int, N: int) -> Sums:
    """An unfinished result of so many slabs, with a bias unless it is one. What is between slabs is not initialized."""
    memory = torch.empty(count, padded(N), device=do.device)
    memory[:, :N] = 1
    return Sums(memory[:, :N], draw(do, dtype, N) if count > 1 else None)


def small_kernels(do: Kernels, dtype: torch.dtype) -> int:
    """Run embedding, norm, activation and choice; how many times. Sums need clusters, as lut_gemv does."""
    cases, sums = 0, SLABS if do.gpu.clusters else ()

    def new(*sizes: int) -> torch.Tensor:
        return draw(do, dtype, *sizes)

    for K, M in zip(HIDDEN, (1, 3, 2, 1), strict=True):
        token, position = (torch.arange(M, device=do.device) for _ in range(2))
        h, x = torch.empty(M, K, device=do.device), torch.empty(M, K, dtype=dtype, device=do.device)
        for learned, y, bias in ((None, None, None), (new(8, K), new(M, K), new(K))):
            do.embed(token, position, new(8, K), learned, h)
            do.norm(h, y, Norm(new(K), bias, 1e-5, bias is not None), x)
            cases += 2
        for count in sums:
            bias = new(K) if count > 1 else None
            do.norm(h[:1], draw_sums(do, dtype, count, K), Norm(new(K), bias, 1e-5, bias is not None), x[:1])
            cases += 1
    for function, M in itertools.product(FUNCTIONS, (1, 3)):
        y = torch.empty(M, 344, dtype=dtype, device=do.device)
        joints = [new(M, 2 * 344), *(draw_sums(do, dtype, count, 2 * 344) for count in (sums if M == 1 else ()))]
        for gate, up in (joint.split([344, 344], 1) for joint in joints):
            do.activation(function, gate, up, y)
            do.activation(function, gate, None, y)
            cases += 2
    for vocabulary in (7, 4096, 32001):
        token, position = (torch.zeros(3, dtype=torch.int64, device=do.device) for _ in range(2))
        do.choose(new(3, vocabulary), token, position, 9)
        cases += 1
    return cases


def sums_over_ranks(do: Kernels, dtype: torch.dtype) -> int:
    """Run norms that sum over two ranks, as one of them, the other's numbers being there already; how many times."""
    cases = 0
    for K, M in zip(RANKS_HIDDEN, (3, 1, 16), strict=True):
        flag, size = 1 << 10 | 1, inbox_bytes(2, M * K) // 4  # of turn 1 of the first step
        other = torch.empty(size, dtype=torch.int32, device=do.device)
        own = torch.full_like(other, flag)  # for numbers, too
        inboxes = Inboxes([other.data_ptr(), own.data_ptr()], 1, M * K, do.device)
        token, position = (torch.arange(M, device=do.device) for _ in range(2))
        h, x = torch.empty(M, K, device=do.device), torch.empty(M, K, dtype=dtype, device=do.device)
        do.embed(token, position, draw(do, dtype, 16, K), None, h, inboxes.step)
        by = Norm(draw(do, dtype, K), None, 1e-5, False)
        sums = [draw_sums(do, dtype, count, K) for count in (SLABS if M == 1 and do.gpu.clusters else ())]
        for y in (draw(do, dtype, M, K), *sums):
            do.norm(h, y, by, x, inboxes.at(1))
            cases += 1
        torch.cuda.synchronize(do.device)
        cases += 1
    return cases


def attention(do: Kernels, dtype: torch.dtype) -> int:
    """Run attention; how many times. What it must not read of the caches is not initialized."""
    cases = 0
    for (M, heads, kv_heads, D, capacity, plan), rotated, count in itertools.product(ATTENTION, (False, True), (0, *SLABS)):
        if count and (M > 1 or not do.gpu.clusters):
            continue
        plan = plan if do.gpu.clusters else plan._replace(cluster=1)
        shape = Shape("llama", heads * D, heads, kv_heads, D, 8, 1, 8, capacity, "silu", True)
        work = do.workspace(shape, M, capacity, plan)
        cache = tuple(torch.empty(M, kv_heads, capacity, D, dtype=dtype, device=do.device) for _ in range(2))
        position = torch.tensor([(0, capacity - 1, capacity // 2)[(M + i) % 3] for i in range(M)], device=do.device)
        for part, (m, end) in itertools.product(cache, enumerate(position.tolist())):
            part[m, :, :end] = 1
        N = (heads + 2 * kv_heads) * D
        joint = draw_sums(do, dtype, count, N) if count else draw(do, dtype, M, N)
        q, k, v = (part.unflatten(1, (-1, D)) for part in joint.split([heads * D, kv_heads * D, kv_heads * D], 1))
        rotation = tuple(torch.ones(capacity, D // 2, device=do.device) for _ in range(2)) if rotated else None
        y = torch.empty(M, heads * D, dtype=dtype, device=do.device)
        for ahead in (False, True):  # twice, for the counters that one launch leaves to the next
            torch.cuda.synchronize(do.device)
            do.ahead = ahead
            do.attention(q, k, v, cache, position, rotation, D**-0.5, y, work)
            cases += 1
        do.ahead = False
    return cases


def decode(run: Callable[[Kernels, torch.dtype], int], device: torch.device) -> int:
    """Run kernels of a step in both dtypes; how many times."""
    do = Kernels(device)
    return sum(run(do, dtype) for dtype in (torch.float16, torch.bfloat16))


def columns(device: torch.device) -> int:
    """Run the sequential part of the calibrated fit; how many times."""
    cases = 0
    for bits, (g, N), moves in itertools.product((1, 2, 3, 4), ((8, 5), (64, 64), (72, 65)), (False, True)):
        wanted, factors = torch.randn(g, N, device=device), torch.rand(g, g, device=device) / g + torch.eye(g, device=device)
        levels = levels_of(torch.rand(bits, N, device=device), None)
        round_on_gpu(wanted, factors, levels, torch.zeros_like(wanted) if moves else None)
        cases += 1
    return cases


def fits(device: torch.device) -> int:
    """Run the fits without data, the small systems of the calibrated one, and layers that are tuned; how many times."""
    cases = 0
    for bits, (N, K, group) in itertools.product((1, 2, 3, 4), ((1, 1, 0), (33, 1100, 128), (5, 70, 0))):
        layer = LayerConfig(bits, group, "bcq", True)
        with torch.inference_mode(mode=False):
            packed = random_packed(N, K, layer, device)
            tunable = Tunable(packed, K, layer, None, torch.randn(N, K, device=device)).to(device)
            tunable(torch.randn(2, K, device=device)).sum().backward()
        cases += 1
    for bits, (R, g), weighed in itertools.product((1, 2, 3, 4), ((1, 1), (9, 40), (300, 128)), (False, True)):
        w, whiten = torch.randn(R, g, device=device), torch.rand(g, device=device) if weighed else None
        for has_offsets in (False, True):
            alternating(w, bits, has_offsets, "best", 2, whiten=whiten)
            cases += 1
        rtn(w, bits, True, whiten=whiten)
        cases += 1
    return cases


def parts() -> dict[str, Callable[[torch.device], int]]:
    """Name of a part -> what runs its cases and says how many there are."""
    found: dict[str, Callable[[torch.device], int]] = {"columns": columns, "fits": fits}
    for bits in (1, 2, 3, 4):
        found[f"products-{bits}"] = functools.partial(products, bits=bits)
        found[f"one_row-{bits}"] = functools.partial(one_row, bits=bits)
    return found | {run.__name__: functools.partial(decode, run) for run in (small_kernels, sums_over_ranks, attention)}


def main() -> None:
    found, device = parts(), torch.device("cuda", torch.cuda.current_device())
    for name in sys.argv[1:] or found:
        if name not in found:
            sys.exit(f"there is no part {name}: take some of {', '.join(found)}")
        with torch.inference_mode():
            cases = found[name](device)
        torch.cuda.synchronize()
        print(f"{name}: {cases} cases", flush=True)


if __name__ == "__main__":
    main()
