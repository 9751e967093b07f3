"""The `cuda` backend: products with a layer in kernel order (lutq/prepack.py), by the kernels in kernels/.

Which kernel runs is decided here, by M (rows of x) and dtype:

    M = 1                   bit_gemv on the binary tensor cores, in groups of multiples of 128 on GPUs of compute capability
                            9.0; lut_gemv with tables in shared memory, for large layers of 3 or 4 bits in groups of multiples
                            of 64 on GPUs that have 227 KB of it and clusters: relative error below 2e-6.
    M <= 4                  lut_gemm with split tables on the sparse tensor cores: relative error below 2e-6
    M <= 8                  lut_gemm with rounded tables: below 5e-4
    M <= rows_limit         on GPUs of compute capability 9.0 fused_gemm, which rounds weights to fp16, 64 rows at a time: below
                            5e-4. On others lut_gemm, 8 rows at a time
    above                   W is dequantized to fp16 (rounded once), a slice at a time, for an ordinary matrix product

For fp32 x, and below 1024 inputs, where few roundings average out, lut_gemm with split tables takes 4 rows at a time instead.
Layers of 8 bits are layers of 4 with twice as many inputs (lutq/eight.py).
Weights that fp16 does not hold (`wide`) never go through fp16, nor do those of small layers above rows_limit, nor fp32 x.

x that is not finite gives a y that is not finite. The same call gives the same bits every time. In lut_gemm and fused_gemm a
row's result does not depend on the other rows: it is the same bits at every M of one mode (1; 2 to 4; 5 to 8;
9 to 16; 17 to 32; above). An ordinary matrix product promises no such thing.
"""

import ctypes
import functools
import json
import math
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lutq import eight
from lutq.build import cache_folder, library
from lutq.compiler import CLUSTERS
from lutq.config import LayerConfig
from lutq.errors import LutqError
from lutq.launch import (
    EIGHT,
    FEW,
    FUSED,
    ONE,
    PASS_UNITS,
    GemvPlan,
    Gpu,
    bit_blocks,
    fused_plan,
    gemv_plan,
    plan,
    slabs,
    takes_gemv,
)
from lutq.pack import Packed, dequantize, packed_shapes
from lutq.paths import shipped
from lutq.prepack import TILE, UNIT, pack_codes, pack_records, units, unpack_codes, unpack_records

DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
GRIDS = {"bcq": 0, "uniform": 1}
FEW_INPUTS, SMALL = 1024, 1 << 20  # inputs, and weights, of layers where rounding might show
LUT_LIMIT = 48  # rows that lut_gemm takes at most, 8 at a time, where rows_limit is that of fused_gemm; measured on an H200
SLICE = 1 << 27  # weights dequantized at a time: 256 MB in fp16
FP16_LARGEST, FP16_SMALLEST = 65504.0, 2.0**-14  # the smallest with all its digits


class Arguments(ctypes.Structure):
    """`Linear` of kernels/layout.cuh."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("codes", "records", "x", "bias", "y")]
        + [("x_stride", ctypes.c_int64)]
        + [(name, ctypes.c_int) for name in ("N", "K", "M", "group", "bits", "grid", "offsets")]
        + [(name, ctypes.c_int) for name in ("x_dtype", "bias_dtype", "y_dtype")]
    )


FUNCTIONS = {"relu": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3}  # of kernels/step.cuh


class FusionArguments(ctypes.Structure):
    """`Fusion` of kernels/bit_gemv.cuh; without fields that say otherwise a product alone. See lutq/decode/fusion.py."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("weight", "shift")]
        + [("eps", ctypes.c_float)]
        + [(name, ctypes.c_int) for name in ("centered", "dtype", "function", "gated", "add")]
    )


ALONE = FusionArguments(function=-1)


class Prepacked(NamedTuple):
    """A layer in kernel order. codes int32 [P, U, 4, 128 b], records uint8 [P, bytes]; wide: too much for fp16."""

    codes: torch.Tensor
    records: torch.Tensor
    wide: bool


def prepack(packed: Packed, layer: LayerConfig) -> Prepacked:
    """The kernel order of packed tensors, on their device. Waits for it: kernels read weights before they wait for others.

    Raises LutqError for a layer of 8 bits with scales that are too large.
    """
    if layer.bits == eight.BITS:
        packed, layer = eight.halve(packed, layer)
    if layer.grid == "bcq":
        top = packed.scales.float().abs().sum(0)
        top = top if packed.offsets is None else top + packed.offsets.float().abs()
        unfit = ~(top <= FP16_LARGEST)
    else:
        step = packed.scales[0].float().abs()
        unfit = ~(step * (2**layer.bits if packed.zero_points is None else 256) <= FP16_LARGEST)
        if packed.zero_points is None:  # levels are odd multiples of half a step
            unfit |= (step > 0) & (step < FP16_SMALLEST)
    K = 32 * packed.codes.shape[-1]
    ready = Prepacked(pack_codes(packed.codes, layer.grid), pack_records(packed, K, layer), bool(unfit.any()))
    if packed.codes.device.type == "cuda":
        torch.cuda.synchronize(packed.codes.device)
    return ready


def canonical(codes: torch.Tensor, records: torch.Tensor, N: int, K: int, layer: LayerConfig) -> Packed:
    """The tensors [N, K] of which `prepack` made codes and records, on their device, bit for bit."""
    if layer.bits == eight.BITS:
        narrow, left = eight.halves(layer, K)
        return eight.unite(canonical(codes, records, N, left + K, narrow), layer, K)
    return Packed(unpack_codes(codes, N, K, layer.grid), **unpack_records(records, N, K, layer))


@functools.cache
def kernels(device: torch.device) -> ctypes.CDLL:
    """The compiled library for a GPU, checked there once: one product against the reference.

    Raises LutqError, with the remedy, where it cannot be built, loaded or trusted.
    """
    found = library(torch.cuda.get_device_capability(device))
    try:
        with torch.cuda.device(device):
            check(found, device)
    except RuntimeError as error:
        raise LutqError(f"the CUDA kernels fail on {torch.cuda.get_device_name(device)}: {error}") from error
    return found


def check(found: ctypes.CDLL, device: torch.device) -> None:
    """Raise LutqError unless a row of x is right by every kernel for one.

    That sparse tensor cores look up any index is promised nowhere, nor where a kernel's shared memory begins.
    """
    generator = torch.Generator().manual_seed(0)
    layer, K = LayerConfig(3, 128, "bcq", True), 1120
    shapes = packed_shapes(64, K, layer)
    codes = torch.randint(-(2**31), 2**31, shapes["codes"][0], generator=generator).to(torch.int32)
    scales, offsets = (torch.rand(shapes[name][0], generator=generator).half() for name in ("scales", "offsets"))
    packed = Packed(*(tensor.to(device) for tensor in (codes, scales, offsets)))
    x = torch.randn(1, K, generator=generator).half().to(device)
    y = torch.empty(1, 64, device=device)
    ready, gpu = prepack(packed, layer), properties(device)
    a = arguments(x, ready, None, y, layer)
    wanted = x.double() @ dequantize(*packed, layer.group, layer.grid, K, torch.float64).T
    ways = [lambda: run_lut(found, a, ONE, gpu)]
    if takes_gemv(layer, gpu):
        ways.append(lambda: run_gemv(found, a, GemvPlan(2, 2)))
    if bit_blocks(64, K, layer, gpu):
        ways.append(lambda: run_bits(found, a, 3))
    for run in ways:
        y.fill_(math.nan)
        run()
        difference = ((y.double() - wanted).norm() / wanted.norm()).item()
        if not difference < 1e-5:
            raise LutqError(
                f"the CUDA kernels give wrong results on {gpu.name} (off by {difference:.1e}): use --backend reference"
            )


@functools.cache
def properties(device: torch.device) -> Gpu:
    """Of a GPU."""
    found = torch.cuda.get_device_properties(device)
    capability = (found.major, found.minor)
    shared = found.shared_memory_per_block_optin
    return Gpu(found.name, found.multi_processor_count, shared, found.major in CLUSTERS, capability == (9, 0))


def user_table() -> Path:
    """Where `lutq bench kernel --tune` puts what it measured; the file need not exist."""
    return cache_folder() / "gpus.json"


@functools.cache
def rows_limit(name: str, bits: int, fused: bool) -> int:
    """Up to how many rows lut_gemm, and fused_gemm where the GPU has it, beat dequantizing on this GPU.

    Measured by `lutq bench kernel --tune`, whose table in the user's cache goes before configs/gpus.json.
    """
    table = read_limits(shipped("configs") / "gpus.json") | read_limits(user_table())
    return table.get(name, table["default 9.0" if fused else "default"])[str(bits)]


def read_limits(file: Path) -> dict[str, dict[str, int]]:
    """A table of row limits by GPU and bits; empty where there is no file. Raises LutqError for one that is no such table."""
    if not file.is_file():
        return {}
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        whole = all(type(limits[str(bits)]) is int for limits in table.values() for bits in (1, 2, 3, 4))
    except (ValueError, AttributeError, KeyError, TypeError):
        whole = False
    if not whole:
        raise LutqError(f"{file} is not a table of row limits: remove it")
    return table


def arguments(x: torch.Tensor, ready: Prepacked, bias: torch.Tensor | None, y: torch.Tensor, layer: LayerConfig) -> Arguments:
    """Of one launch. x [M, K], y [M, N]."""
    (M, K), N = x.shape, y.shape[-1]
    return Arguments(
        ready.codes.data_ptr(),
        ready.records.data_ptr(),
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x.stride(0),
        N,
        K,
        M,
        layer.group or UNIT * units(K),
        layer.bits,
        GRIDS[layer.grid],
        int(layer.offsets),
        DTYPES[x.dtype],
        0 if bias is None else DTYPES[bias.dtype],
        DTYPES[y.dtype],
    )


def start(entry: Callable[..., int], a: Arguments, *how: Any) -> None:
    """Call an entry point of the library on the current stream. Raises RuntimeError for a cudaError_t."""
    code = entry(ctypes.byref(a), *how, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
    if code:
        raise RuntimeError(f"a CUDA kernel could not be launched: error {code}")


def run_lut(found: ctypes.CDLL, a: Arguments, mode: int, gpu: Gpu) -> None:
    """Launch lut_gemm in a mode on the current stream."""
    start(getattr(found, f"lutq_lut_gemm_{a.bits}bit"), a, mode, *plan(a.N, a.K, mode, a.bits, a.group, gpu))


def run_bits(found: ctypes.CDLL, a: Arguments, blocks: int, fusion: FusionArguments = ALONE) -> None:
    """Launch bit_gemv on the current stream."""
    start(getattr(found, f"lutq_bit_gemv_{a.bits}bit"), a, ctypes.byref(fusion), blocks)


def run_gemv(found: ctypes.CDLL, a: Arguments, how: GemvPlan, partial: torch.Tensor | None = None) -> None:
    """Launch lut_gemv on the current stream. With `partial` it leaves sums there and y as it is."""
    sums = ctypes.c_void_p(None if partial is None else partial.data_ptr())
    start(getattr(found, f"lutq_lut_gemv_{a.bits}bit"), a, sums, *how)


def run_fused(found: ctypes.CDLL, a: Arguments, rows: int, layer: LayerConfig, gpu: Gpu) -> None:
    """Launch fused_gemm in a mode on the current stream."""
    start(getattr(found, f"lutq_fused_gemm_{a.bits}bit"), a, rows, ctypes.byref(fused_plan(a.N, a.K, rows, layer, gpu)))


def aligned(x: torch.Tensor) -> torch.Tensor:
    """What the kernels read, from x [M, K]: rows of K rounded up to 8 inputs, each on 16 bytes. A view or a copy [M, K]."""
    K = x.shape[1]
    if K % 8 == 0 and x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    padded = x.new_zeros(x.shape[0], -(-K // 8) * 8)
    padded[:, :K] = x
    return padded[:, :K]


def multiply(
    x: torch.Tensor,
    ready: Prepacked,
    bias: torch.Tensor | None,
    N: int,
    layer: LayerConfig,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The product x [..., K] W^T + bias -> [..., N] in `dtype`, or in that of x (fp16, bf16, fp32).

    Raises LutqError for other dtypes and an x of another width.
    """
    if layer.bits == eight.BITS:
        layer, left = eight.halves(layer, x.shape[-1])
        x = eight.twice(x, left)
    device, K = x.device, x.shape[-1]
    for tensor in (x, bias):
        if tensor is not None and tensor.dtype not in DTYPES:
            raise LutqError(f"the CUDA kernels take float16, bfloat16 and float32, not {tensor.dtype}: use --backend reference")
    if ready.codes.shape[1] != units(K):
        raise LutqError(
            f"x has {K} features and the weight {UNIT * ready.codes.shape[1]} in whole units: check the model's config"
        )
    y = torch.empty(*x.shape[:-1], N, dtype=dtype or x.dtype, device=device)
    if y.numel() == 0:
        return y
    rows, out = x.reshape(-1, K), y.view(-1, N)
    with torch.cuda.device(device):
        mode = lut_mode(rows)
        gpu = properties(device)
        limit = rows_limit(gpu.name, layer.bits, gpu.fused)
        if not fits_fused(mode, ready, gpu):
            limit = max(FEW, (min(limit, LUT_LIMIT) if gpu.fused else limit) * max(mode, FEW) // EIGHT)
        if rows.shape[0] > limit or not fits_packed(ready, layer):
            multiply_dense(rows, ready, bias, out, layer)
        else:
            multiply_packed(rows, ready, bias, out, layer)
    return y


def fits_packed(ready: Prepacked, layer: LayerConfig) -> bool:
    """Whether `multiply_packed` takes a layer: lut_gemm takes 8 times a uniform step into fp16."""
    return not (ready.wide and layer.grid == "uniform")


def fits_fused(mode: int, ready: Prepacked, gpu: Gpu) -> bool:
    """Whether fused_gemm takes what lut_gemm would take in this mode, if there are more than 8 rows."""
    return mode == EIGHT and gpu.fused and not ready.wide


def lut_mode(x: torch.Tensor) -> int:
    """The mode of lut_gemm for x [M, K]."""
    M, K = x.shape
    if M == 1:
        return ONE
    return FEW if M <= FEW or K < FEW_INPUTS or x.dtype == torch.float32 else EIGHT


def multiply_packed(x: torch.Tensor, ready: Prepacked, bias: torch.Tensor | None, y: torch.Tensor, layer: LayerConfig) -> None:
    """Fill y [M, N], contiguous, on the current device, as many rows at a time as a kernel takes."""
    found, gpu, mode, x = kernels(x.device), properties(x.device), lut_mode(x), aligned(x)
    fused = x.shape[0] > EIGHT and fits_fused(mode, ready, gpu)
    if fused:
        mode = next((rows for rows in FUSED if x.shape[0] <= rows), FUSED[-1])
    for begin in range(0, x.shape[0], mode):
        part = slice(begin, begin + mode)
        a = arguments(x[part], ready, bias, y[part], layer)
        if fused:
            run_fused(found, a, mode, layer, gpu)
        elif mode == ONE and (blocks := bit_blocks(a.N, a.K, layer, gpu)):
            run_bits(found, a, blocks)
        elif mode == ONE and (how := gemv_plan(a.N, a.K, layer, gpu)):
            run_gemv(found, a, how)
        else:
            run_lut(found, a, mode, gpu)


def fuses(ready: Prepacked, N: int, K: int, layer: LayerConfig, gpu: Gpu, normed: bool, gated: bool) -> bool:
    """Whether `multiply_fused` takes a layer, with a norm of x and gated outputs or not."""
    fits = fits_packed(ready, layer) and not (normed and (units(K) > PASS_UNITS or K % 8)) and not (gated and N % (2 * TILE))
    return fits and bit_blocks(N, K, layer, gpu, 1 + gated) > 0


def multiply_fused(
    x: torch.Tensor,
    ready: Prepacked,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    N: int,
    layer: LayerConfig,
    fusion: FusionArguments,
) -> None:
    """Fill y [1, N] as `fusion` says, or [1, N / 2] where it is gated, from x [1, K] on the current stream."""
    x, gpu = aligned(x), properties(x.device)
    a = arguments(x, ready, bias, y, layer)
    a.N = N
    run_bits(kernels(x.device), a, bit_blocks(N, a.K, layer, gpu, 1 + fusion.gated), fusion)


def sum_parts(ready: Prepacked, N: int, K: int, layer: LayerConfig, gpu: Gpu) -> int:
    """Sums of an output that `multiply_sums` leaves, one for every slab of inputs; 0 where it does not take the layer, or
    bit_gemv does, which needs none.
    """
    by_gemv = takes_gemv(layer, gpu) and fits_packed(ready, layer) and not bit_blocks(N, K, layer, gpu)
    return slabs(K) if by_gemv else 0


def multiply_sums(x: torch.Tensor, ready: Prepacked, partial: torch.Tensor, N: int, layer: LayerConfig) -> None:
    """Fill partial fp32 [sum_parts, N rounded up to 16] on the current stream: for x [1, K], y = their sum in order + bias."""
    x, gpu = aligned(x), properties(x.device)
    a = arguments(x, ready, None, partial[:1, :N], layer)
    run_gemv(kernels(x.device), a, GemvPlan(min(gpu.processors, 2 * ceil(N / TILE) * slabs(a.K)), 1), partial)


def multiply_dense(x: torch.Tensor, ready: Prepacked, bias: torch.Tensor | None, y: torch.Tensor, layer: LayerConfig) -> None:
    """Fill y [M, N] by dequantizing W a slice of rows at a time. bf16 x is scaled by a power of two per row into fp16."""
    (_, K), N = x.shape, y.shape[1]
    precise = ready.wide or x.dtype == torch.float32 or N * K < SMALL
    scale = None
    if precise:
        x = x.float()
    elif x.dtype == torch.bfloat16:
        _, exponent = torch.frexp(x.abs().amax(1, keepdim=True).float())
        scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent.clamp(-100, 120))
        x = (x / scale).half()
    step = max(1, SLICE // (K * TILE))
    direct = not precise and scale is None and y.dtype == x.dtype
    tiles = ceil(N / TILE)
    for first in range(0, tiles, step):
        last = min(tiles, first + step)
        part = slice(first * TILE, min(N, last * TILE))
        w = torch.empty(part.stop - part.start, K, dtype=torch.float32 if precise else torch.float16, device=x.device)
        a = arguments(x, ready, None, y, layer)
        a.y, a.y_dtype = w.data_ptr(), DTYPES[w.dtype]
        start(kernels(x.device).lutq_dequantize, a, first, last)
        if direct:
            if bias is None:
                torch.mm(x, w.T, out=y[:, part])
            else:
                torch.addmm(bias[part].to(w.dtype), x, w.T, out=y[:, part])
            continue
        product = x @ w.T if precise else torch.mm(x, w.T, out_dtype=torch.float32)
        if scale is not None:
            product *= scale
        y[:, part] = product if bias is None else product + bias[part]
