"""How the kernels of the `cuda` backend are launched, by shape, bits and GPU: by how many blocks, what each of them does, and
whether that fits into shared memory.

The bytes are those that kernels/*.cuh ask for, and times are estimates by figures that were measured on an H200. Nothing here
depends on M within a mode, nor touches a GPU.
"""

import ctypes
import functools
import math
from math import ceil
from typing import NamedTuple

from lutq.config import LayerConfig
from lutq.errors import LutqError
from lutq.prepack import PANEL, SLAB, TILE, UNIT, panels, units

ONE, FEW, EIGHT = 1, 4, 8  # modes of lut_gemm: rows that it takes; EIGHT rounds
FUSED = (16, 32, 64)  # those of fused_gemm


class Gpu(NamedTuple):
    """What a plan depends on. shared: bytes of shared memory a block may have; fused: whether fused_gemm runs there."""

    name: str
    processors: int
    shared: int
    clusters: bool
    fused: bool


def too_little(gpu: Gpu, bits: int, group: int) -> LutqError:
    """The error where no launch fits."""
    return LutqError(f"{gpu.name} has too little shared memory for {bits} bits in groups of {group}: use --backend reference")


class Plan(NamedTuple):
    """How lut_gemm is launched: blocks, of which `split` share the inputs of the same rows; warps over K and over N."""

    blocks: int
    split: int
    k_warps: int
    n_warps: int


MAX_WARPS, STAGES, SCRATCH = 8, 4, 2048  # of kernels/lut_gemm.cuh and stream.cuh


@functools.lru_cache(4096)
def plan(N: int, K: int, mode: int, bits: int, group: int, gpu: Gpu) -> Plan:
    """The launch with the least estimated time, whatever M: it decides in which order a row is summed. group never 0.

    Raises LutqError when no launch fits into the GPU's shared memory.
    """
    pieces = 2 if group % 128 == 0 else 8
    ring = STAGES * 2 * (bits * 512 + pieces * (bits + 1) * 32) + (0 if mode == EIGHT else SCRATCH)
    kept = 4 * {ONE: 16, FEW: 64, EIGHT: 128}[mode]
    spans, pairs = ceil(units(K) / (2 if group % 128 == 0 else 1)), ceil(N / (2 * TILE))  # blocks take pairs of tiles
    best: tuple[float, Plan] | None = None
    for split in (1, 2) if gpu.clusters and spans > 1 else (1,):
        for waves in (1, 2, 3, 4, 6, 8, 12, 16, 32, 64):
            clusters = min(pairs, gpu.processors // split * waves)
            most = 2 * ceil(pairs / clusters)
            for k_warps in range(1, min(MAX_WARPS, ceil(spans / split)) + 1):
                for n_warps in range(1, MAX_WARPS // k_warps + 1):
                    used = k_warps * n_warps * ring + most * (k_warps * kept + (64 * mode if split > 1 else 0))
                    if used > gpu.shared:
                        continue
                    passes = ceil(ceil(spans / split) / k_warps)
                    items = ceil(most // 2 / n_warps)
                    # the unit is an item; preparing the inputs of a pass, and a wave, cost about as much. Measured on an H200
                    cost = waves * (passes * (items + 1.0) + 1.0) + 0.01 * (MAX_WARPS - k_warps * n_warps)
                    cost = cost if split == 1 else 1.05 * cost + 0.3
                    if best is None or cost < best[0]:
                        best = cost, Plan(clusters * split, split, k_warps, n_warps)
            if clusters == pairs:
                break
    if best is None:
        raise too_little(gpu, bits, group)
    return best[1]


def record_bytes(layer: LayerConfig) -> int:
    """Of a tile and group in kernel order: `Shape.record` of kernels/layout.cuh."""
    return 32 * (layer.bits + layer.offsets) if layer.grid == "bcq" else 32 + 16 * layer.offsets


# Of kernels/bit_gemv.cuh; bytes are of the bits of 128 inputs, which a warp makes for 4 units at once, of a warp's sums of a
# tile, and of what it finds for a norm
BIT_WARPS, BIT_STAGES, PASS_UNITS, BLOCK_BYTES, KEPT_BYTES, FOUND_BYTES = 16, 4, 64, 528, 64, 16
BIT_MOST = {2: 1 << 27}  # weights of a layer, by bits, below which bit_gemv is the fastest; measured on an H200


@functools.lru_cache(4096)
def bit_blocks(N: int, K: int, layer: LayerConfig, gpu: Gpu, together: int = 1) -> int:
    """Blocks of a launch of bit_gemv; 0 where it does not take the layer or another kernel is faster. together: tiles that must
    be of one block, 2 where outputs are gated.

    It runs on Hopper alone: later GPUs have no binary tensor cores.
    """
    deals, passes = ceil(ceil(N / TILE) / together), ceil(units(K) / PASS_UNITS)
    blocks = min(deals, gpu.processors)
    used = BIT_WARPS * (BIT_STAGES * (layer.bits * UNIT * TILE // 8 + 2 * record_bytes(layer)) + FOUND_BYTES)
    used += 8 * ceil(ceil(units(K) / passes) / 4) * BLOCK_BYTES + together * ceil(deals / blocks) * BIT_WARPS * KEPT_BYTES
    fits = layer.group % 128 == 0 and used <= gpu.shared and BIT_MOST.get(layer.bits, math.inf) > N * K
    return blocks if gpu.fused and fits else 0


class GemvPlan(NamedTuple):
    """How lut_gemv is launched: blocks, of which `split` share the inputs of the same rows."""

    blocks: int
    split: int


GEMV_SHARED = 227 * 1024  # bytes of shared memory that there must be
GEMV_WARPS, TABLE_BYTES = 16, 1 << 17  # of kernels/lut_gemv.cuh
# Measured on an H200. Bits from which on, and weights of a layer above and, by bits, below which lut_gemv beats lut_gemm
GEMV_BITS, GEMV_LEAST, GEMV_MOST = 3, 1 << 24, {4: 1 << 27}
CLUSTERED = {1: 1.0, 2: 1.0, 4: 0.91, 8: 0.85}  # blocks of a cluster -> part of the processors that run such clusters at once
TABLES_US, ROUND_US = 1.3, {1: 0.6, 2: 0.9, 3: 1.2, 4: 1.44}  # of a slab; of half a tile of every warp, by bits


def takes_gemv(layer: LayerConfig, gpu: Gpu) -> bool:
    """Whether lut_gemv runs on a GPU and takes a layer."""
    return gpu.clusters and gpu.shared >= GEMV_SHARED and layer.group % 64 == 0


def slabs(K: int) -> int:
    """Slabs of 1024 inputs."""
    return ceil(units(K) / SLAB)


@functools.lru_cache(4096)
def gemv_plan(N: int, K: int, layer: LayerConfig, gpu: Gpu) -> GemvPlan | None:
    """The launch of lut_gemv with the least estimated time; None where lut_gemm is faster or alone takes the layer."""
    pays = layer.bits >= GEMV_BITS and GEMV_LEAST < N * K < GEMV_MOST.get(layer.bits, math.inf)
    if not (takes_gemv(layer, gpu) and pays):
        return None
    halves, parts = 2 * ceil(N / TILE), slabs(K)
    record = layer.bits // 2 * 128 + layer.bits % 2 * 64 if layer.grid == "bcq" else 64
    record += layer.offsets * (64 if layer.grid == "bcq" else 32)
    copied = 2 * layer.bits * 512 + 2 * (1 if layer.group % 128 == 0 else 2) * record  # bytes on their way to a warp
    best: tuple[float, GemvPlan] | None = None
    for split, part in CLUSTERED.items():
        clusters = min(halves, max(1, int(gpu.processors * part) // split))
        most = ceil(halves / clusters)
        sums = 32 * (most + (split * ceil(most / split) if split > 1 else 0))
        if split > parts or TABLE_BYTES + GEMV_WARPS * copied + 16 + sums > gpu.shared:
            continue
        cost = ceil(parts / split) * (TABLES_US + ceil(most / GEMV_WARPS) * ROUND_US[layer.bits])
        if best is None or cost < best[0]:
            best = cost, GemvPlan(clusters * split, split)
    return best and best[1]


class FusedPlan(ctypes.Structure):
    """How fused_gemm is launched: `Plan` of kernels/fused_gemm.cuh."""

    _fields_ = tuple(
        (name, ctypes.c_int) for name in ("blocks", "split", "k_groups", "n_groups", "builders", "item", "stages", "slots")
    )


BARRIER_BYTES, KEPT_STRIDE, BUILDERS, FUSED_STAGES, SLOTS = 512, PANEL + 4, 3, 2, 2  # of kernels/fused_gemm.cuh
MOST_GROUPS = {16: 4, 32: 3, 64: 2}  # warpgroups of products of a block, by mode


@functools.lru_cache(4096)
def fused_plan(N: int, K: int, rows: int, layer: LayerConfig, gpu: Gpu) -> FusedPlan:
    """The launch of fused_gemm for a mode of FUSED, whatever M: it decides in which order a row is summed."""
    unit = layer.bits * 2048 + (2 if layer.group % 128 == 0 else 8) * 4 * record_bytes(layer)
    groups = MOST_GROUPS[rows]
    split = 2 if units(K) > 1 else 1  # halves what a block reads of x
    for waves in range(1, panels(N) + 1):
        clusters = min(panels(N), gpu.processors // split * waves)
        most = ceil(panels(N) / clusters)
        n_groups = min(groups, most)
        k_groups = min(groups // n_groups, ceil(units(K) / split))
        for item in (2, 1) if units(K) >= 2 * split * k_groups else (1,):
            slot = ceil(k_groups * item * rows * 4 / 128) * 128 + k_groups * item * UNIT * rows * 2
            ring = k_groups * n_groups * FUSED_STAGES * item * unit
            if BARRIER_BYTES + SLOTS * slot + ring + k_groups * most * rows * KEPT_STRIDE * 4 <= gpu.shared:
                return FusedPlan(clusters * split, split, k_groups, n_groups, BUILDERS, item, FUSED_STAGES, SLOTS)
    raise too_little(gpu, layer.bits, layer.group)
