"""From one weight matrix and its settings to its packed form: `fit(W, layer, config) -> Packed`, or `solve_layer` with the
second moments of its inputs.

Rows are taken in chunks of bounded memory and cut into groups; a short last group is fitted on its own. The chunk size,
over which `alternating` decides when to stop, depends on the device only: a matrix always gives the same codes on a device.
"""

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from lutq import bcq, nested, residual, solve, uniform
from lutq.config import LayerConfig, QuantConfig
from lutq.pack import (
    Corrected,
    EightBit,
    Nested,
    Packed,
    Stored,
    from_tensors,
    group_size,
    highest,
    in_eight_bits,
    lower_name,
    pack_bits,
    to_tensors,
    unpack_bits,
    weight,
)
from lutq.scales import OFFSETS, SCALES, nearest, spread

CHUNK = {"cpu": 1 << 20, "cuda": 1 << 24}  # weights at a time; a fit needs about 100 bytes for each


def fit(W: torch.Tensor, layer: LayerConfig, config: QuantConfig) -> Stored:
    """Quantize W [N, K] (any float dtype, fitted in fp32 where it lies) without any data but the weights.

    With scales in 8 bits a fit in 16 is rounded, whose units span the chunks, and codes are chosen once more.
    """
    N, K = W.shape
    if layer.corrected:
        return with_corrections(W.float(), None, layer, lambda target: fit(target, layer.bare(), config))
    rows = max(1, CHUNK.get(W.device.type, CHUNK["cpu"]) // K)
    chunks = [to_tensors(fit_rows(W[begin : begin + rows].float(), layer, config)) for begin in range(0, N, rows)]
    rows_of = {name: 0 if name.startswith(("offsets", "zero_points")) else 1 for name in chunks[0]}  # dimension of N
    fitted = from_tensors({name: torch.cat([chunk[name] for chunk in chunks], rows_of[name]) for name in rows_of})
    if layer.scale_bits == 16:
        return fitted
    rounded = in_eight_bits(fitted)
    codes = [recode(W[begin : begin + rows].float(), rounded.values, begin, layer, config) for begin in range(0, N, rows)]
    return rounded._replace(values=rounded.values._replace(codes=torch.cat(codes, 1)))


def recode(W: torch.Tensor, packed: Packed, begin: int, layer: LayerConfig, config: QuantConfig) -> torch.Tensor:
    """Codes [b, rows, ceil(K/32)] of W fp32 [rows, K], the rows from `begin` on of a packed matrix, for the grids of that."""
    rows, K = W.shape
    g = group_size(layer.group, K)
    w = F.pad(W, (0, -K % g)).unflatten(1, (-1, g)).flatten(0, 1)
    here = slice(begin, begin + rows)
    grid = packed.scales[:, here].float().flatten(1)
    if layer.grid == "uniform":
        zeros = packed.zero_points
        center = torch.full_like(grid[0], (2**layer.bits - 1) / 2) if zeros is None else zeros[here].float().flatten()
        step = grid[0].clamp(min=uniform.SMALLEST_SCALE)  # where it is 0, so is every level
        planes = bcq.planes_of(uniform.round_to_grid(w, step, center, layer.bits).to(torch.uint8), layer.bits)
    else:
        offsets = None if packed.offsets is None else packed.offsets[here].float().flatten()
        planes = bcq.greedy_planes(w, grid, offsets) if config.method == "greedy" else bcq.nearest(w, grid, offsets)[0]
    return pack_bits(planes.unflatten(1, (rows, -1)).flatten(2)[..., :K])


def fit_rows(W: torch.Tensor, layer: LayerConfig, config: QuantConfig) -> Packed | Nested:
    """`fit` for an fp32 [rows, K] that is small enough to be done at once."""
    rows, K = W.shape
    g = group_size(layer.group, K)
    if config.lowest_bits:
        alone = dataclasses.replace(config, lowest_bits=0, bits=config.lowest_bits)
        lowest = unpack(fit_rows(W, layer._replace(bits=config.lowest_bits), alone), K)
        return pack_nested(nested.extend_layer(W, lowest, layer.bits, g, config.iterations))
    whole = K // g * g
    parts = [W[:, :whole].unflatten(1, (-1, g)), W[:, whole:].unsqueeze(1)] if K % g else [W.unflatten(1, (-1, g))]
    fits = []
    for part in parts:  # [rows, groups, g or less]
        if part.shape[1] == 0:
            continue
        planes, scales, extra = fit_groups(part.flatten(0, 1).contiguous(), layer.bits, config)
        fits.append((planes.view(layer.bits, rows, -1), scales.view(len(scales), rows, -1), extra))
    codes = pack_bits(torch.cat([planes for planes, _, _ in fits], 2))
    scales = torch.cat([scales for _, scales, _ in fits], 2).half()
    if fits[0][2] is None:
        return Packed(codes, scales)
    extra = torch.cat([extra.view(rows, -1) for _, _, extra in fits], 1)
    return Packed(codes, scales, None, extra.to(torch.uint8)) if layer.grid == "uniform" else Packed(codes, scales, extra.half())


def fit_groups(w: torch.Tensor, bits: int, config: QuantConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Planes bool [b, R, g], scales [b or 1, R] and offsets or zero points [R] for groups w fp32 [R, g]."""
    if config.method == "rtn":
        u, scales, zero_points = uniform.rtn(w, bits, config.symmetric, config.clip)
        return bcq.planes_of(u, bits), scales[None], zero_points
    if config.method == "greedy":
        return bcq.greedy(w, bits, config.offsets)
    search = (config.start, config.iterations, config.tolerance)
    return bcq.alternating(w, bits, config.offsets, *search)


def with_corrections(
    W: torch.Tensor, H: torch.Tensor | None, layer: LayerConfig, fit_planes: Callable[[torch.Tensor], Packed | EightBit]
) -> Corrected:
    """W fp32 [N, K] with the corrections that `layer` asks for, in the metric of H [K, K] if there is one."""
    K = W.shape[1]
    dense = functools.partial(weight, layer=layer, K=K)
    return Corrected(*residual.fit_corrected(W, H, layer, group_size(layer.group, K), fit_planes, dense))


def unpack(packed: Packed, K: int) -> bcq.Bcq:
    """Planes bool [b, N, K] and the grid in fp32 of a packed matrix on the bcq grid."""
    offsets = None if packed.offsets is None else packed.offsets.float()
    return bcq.Bcq(unpack_bits(packed.codes, K), packed.scales.float(), offsets)


def pack(fit: bcq.Bcq) -> Packed:
    """The inverse of `unpack`."""
    return Packed(pack_bits(fit.planes), fit.scales.half(), None if fit.offsets is None else fit.offsets.half())


def pack_nested(fits: nested.Fits) -> Nested:
    """A matrix at several precisions from its fits, lowest first."""
    grids = {len(fit.planes): to_tensors(pack(fit)) for fit in fits[:-1]}
    lower = {lower_name(name, bits): tensor for bits, grid in grids.items() for name, tensor in grid.items() if name != "codes"}
    return Nested(pack(fits[-1]), lower)


def solve_layer(
    W: torch.Tensor, H: torch.Tensor, layer: LayerConfig, config: QuantConfig, Hs: dict[int, torch.Tensor] | None = None
) -> tuple[Stored, float, float]:
    """Quantize W fp32 [N, K] with H [K, K]; relative output errors of the plain fit and of the result, which is never more.

    Methods other than `feedback` are plain fits, without corrections in the first of these errors. With several precisions the
    errors are of all together, each seen through its own inputs: Hs maps bits to their H; without it all have the same.
    """
    return solve_alike([W], H, layer, config, Hs)[0]


def solve_layers(
    Ws: list[torch.Tensor],
    H: torch.Tensor,
    layers: list[LayerConfig],
    config: QuantConfig,
    Hs: dict[int, torch.Tensor] | None = None,
) -> list[tuple[Stored, float, float]]:
    """`solve_layer` for matrices [N, K] that read the same inputs; those with equal settings are solved as the rows of one."""
    results: dict[int, tuple[Stored, float, float]] = {}
    for layer in dict.fromkeys(layers):
        alike = [number for number, other in enumerate(layers) if other == layer]
        results |= zip(alike, solve_alike([Ws[number] for number in alike], H, layer, config, Hs), strict=True)
    return [results[number] for number in range(len(Ws))]


def solve_alike(
    Ws: list[torch.Tensor], H: torch.Tensor, layer: LayerConfig, config: QuantConfig, Hs: dict[int, torch.Tensor] | None
) -> list[tuple[Stored, float, float]]:
    """`solve_layers` for matrices of the same settings."""
    K = Ws[0].shape[1]
    plains = [fit(W, layer.bare(), config) for W in Ws]
    if config.lowest_bits:
        metrics = Hs or dict.fromkeys(config.precisions, H)
        return [solve_nested(W, metrics, plain, layer, config) for W, plain in zip(Ws, plains, strict=True)]
    if layer.corrected:
        results = [with_corrections(W, H, layer, lambda target: solve_layer(target, H, layer.bare(), config)[0]) for W in Ws]
    else:
        results = solve_rows(Ws, plains, H, layer, config) if config.method == "feedback" else plains

    solved = []
    for W, plain, result in zip(Ws, plains, results, strict=True):
        size = (W @ H * W).sum().clamp(min=1e-30)
        losses = [solve.loss(W, weight(packed, layer, K), H) for packed in ((plain,) if result is plain else (plain, result))]
        errors = [(loss.sum() / size).sqrt().item() for loss in losses]
        solved.append((result, errors[0], errors[-1]))
    return solved


def solve_rows(
    Ws: list[torch.Tensor], plains: list[Packed | EightBit], H: torch.Tensor, layer: LayerConfig, config: QuantConfig
) -> list[Packed | EightBit]:
    """The calibrated fit of matrices [N, K] of the same inputs, none with a larger loss than its plain fit."""
    W, sizes, K = torch.cat(Ws), [len(W) for W in Ws], Ws[0].shape[1]
    g = group_size(layer.group, K)
    plain = join([unpack(highest(packed), K) for packed in plains])
    solved = solve.solve(W, H, layer.bits, g, layer.offsets, config.rounds, config.iterations)
    better = solve.loss(W, solve.dense(solved, g), H) < solve.loss(W, solve.dense(plain, g), H)
    start = solve.choose_rows(better, solved, plain)
    if layer.scale_bits == 16:
        return [pack(part) for part in split(solve.descend(W, H, start, g, config.sweeps), sizes)]
    rounded = descend_in_eight_bits(W, H, start, g, max(1, config.sweeps), sizes)

    def total(W: torch.Tensor, packed: EightBit) -> torch.Tensor:
        return solve.loss(W, weight(packed, layer, K), H).sum()

    pairs = zip(Ws, rounded, plains, strict=True)
    return [packed if total(W, packed) < total(W, plain) else plain for W, packed, plain in pairs]


def join(fits: list[bcq.Bcq]) -> bcq.Bcq:
    """Fits of matrices as that of all their rows: planes [b, N, K], scales [b, N, G], offsets [N, G] or None."""
    planes, scales = (torch.cat(parts, 1) for parts in zip(*(fit[:2] for fit in fits), strict=True))
    return bcq.Bcq(planes, scales, None if fits[0].offsets is None else torch.cat([fit.offsets for fit in fits]))


def split(fit: bcq.Bcq, sizes: list[int]) -> list[bcq.Bcq]:
    """The inverse of `join`; sizes: rows of each."""
    offsets = [None] * len(sizes) if fit.offsets is None else fit.offsets.split(sizes)
    return [bcq.Bcq(*parts) for parts in zip(fit.planes.split(sizes, 1), fit.scales.split(sizes, 1), offsets, strict=True)]


def solve_nested(
    W: torch.Tensor, Hs: dict[int, torch.Tensor], plain: Nested, layer: LayerConfig, config: QuantConfig
) -> tuple[Nested, float, float]:
    """`solve_layer` at several precisions, from their plain fits; Hs: bits -> H [K, K]."""
    K, bits = W.shape[1], config.precisions
    g, metrics = group_size(layer.group, K), [Hs[b] for b in bits]
    size = sum((W @ H * W).sum() for H in metrics).clamp(min=1e-30)

    def losses(fits: nested.Fits) -> torch.Tensor:  # of each row, all precisions together
        return sum(solve.loss(W, solve.dense(fit, g), H) for fit, H in zip(fits, metrics, strict=True))

    fits = [unpack(plain.at(b), K) for b in bits]
    before = losses(fits)
    if config.method == "feedback":
        solved = nested.solve(W, metrics, bits, g, layer.offsets, config.rounds, config.iterations)
        better = losses(solved) < before
        fits = [solve.choose_rows(better, new, old) for new, old in zip(solved, fits, strict=True)]
        fits = nested.no_worse(W, metrics, nested.descend(W, metrics, fits, g, config.sweeps), g)
    first, last = ((total.sum() / size).sqrt().item() for total in (before, losses(fits)))
    return pack_nested(fits), first, last


def descend_in_eight_bits(
    W: torch.Tensor, H: torch.Tensor, start: bcq.Bcq, g: int, sweeps: int, sizes: list[int]
) -> list[EightBit]:
    """`start` with scales and offsets in 8 bits, then `lutq.solve.descend`, whose arguments these are, with the units kept.

    sizes: rows of each of the matrices whose rows W [N, K] holds and which have units of their own.
    """
    rounded = [in_eight_bits(pack(part)) for part in split(start, sizes)]
    G = start.scales.shape[2]
    unit = torch.cat([spread(part.scale_units, N, G) for part, N in zip(rounded, sizes, strict=True)], 1)
    offset_unit = None
    if start.offsets is not None:
        offset_unit = torch.cat([spread(part.offset_units, N, G) for part, N in zip(rounded, sizes, strict=True)])

    def settle_of(group: int) -> solve.Settle:
        def settle(planes: torch.Tensor, grid: torch.Tensor, offsets: torch.Tensor | None) -> bcq.Bcq:
            fit = bcq.canonical(planes, grid, offsets)
            if offsets is not None:
                fit = fit._replace(offsets=nearest(fit.offsets, offset_unit[:, group], OFFSETS))
            return fit._replace(scales=nearest(fit.scales, unit[:, :, group], SCALES))

        return settle

    begin = join([unpack(part.values, W.shape[1]) for part in rounded])
    moved = split(solve.descend(W, H, begin, g, sweeps, settle_of=settle_of), sizes)
    return [part._replace(values=pack(fit)) for part, fit in zip(rounded, moved, strict=True)]
