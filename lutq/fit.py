"""From one weight matrix and its settings to its packed form: `fit(W, layer, config) -> Packed`, or `solve_layer` with the
second moments of its inputs.

Rows are taken in chunks of bounded memory and cut into groups; a short last group is fitted on its own. The chunk size,
over which `alternating` decides when to stop, depends on the device only: a matrix always gives the same codes on a device.
"""

import torch

from lutq import bcq, solve, uniform
from lutq.config import LayerConfig, QuantConfig
from lutq.pack import Packed, dequantize, group_size, pack_bits, unpack_bits

CHUNK = {"cpu": 1 << 20, "cuda": 1 << 24}  # weights at a time; a fit needs about 100 bytes for each


def fit(W: torch.Tensor, layer: LayerConfig, config: QuantConfig) -> Packed:
    """Quantize W [N, K] (any float dtype, fitted in fp32 where it lies) without any data but the weights."""
    N, K = W.shape
    rows = max(1, CHUNK.get(W.device.type, CHUNK["cpu"]) // K)
    chunks = [fit_rows(W[begin : begin + rows].float(), layer, config) for begin in range(0, N, rows)]
    rows_of = {"codes": 1, "scales": 1, "offsets": 0, "zero_points": 0}  # dimension of N
    parts = {name: [getattr(chunk, name) for chunk in chunks] for name in rows_of}
    return Packed(**{name: None if tensors[0] is None else torch.cat(tensors, rows_of[name]) for name, tensors in parts.items()})


def fit_rows(W: torch.Tensor, layer: LayerConfig, config: QuantConfig) -> Packed:
    """`fit` for an fp32 [rows, K] that is small enough to be done at once."""
    rows, K = W.shape
    g = group_size(layer.group, K)
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
        planes = torch.stack([((u >> (bits - 1 - i)) & 1).bool() for i in range(bits)])
        return planes, scales[None], zero_points
    if config.method == "greedy":
        return bcq.greedy(w, bits, config.offsets)
    search = (config.start, config.iterations, config.tolerance)
    return bcq.alternating(w, bits, config.offsets, *search)


def solve_layer(W: torch.Tensor, H: torch.Tensor, layer: LayerConfig, config: QuantConfig) -> tuple[Packed, float, float]:
    """Quantize W fp32 [N, K] with H [K, K]; relative output errors of the plain fit and of the result, which is never more.

    Methods other than `feedback` are plain fits.
    """
    K = W.shape[1]
    g = group_size(layer.group, K)
    plain = fit(W, layer, config)
    size = (W @ H * W).sum().clamp(min=1e-30)
    losses = solve.loss(W, dequantize(*plain, layer.group, layer.grid, K), H)
    before = (losses.sum() / size).sqrt().item()
    if config.method != "feedback":
        return plain, before, before
    solved = solve.solve(W, H, layer.bits, g, layer.offsets, config.rounds, config.iterations)
    better = solve.loss(W, solve.dense(solved, g), H) < losses
    offsets = None
    if layer.offsets:
        offsets = torch.where(better[:, None], solved.offsets, plain.offsets.float())
    planes = torch.where(better[:, None], solved.planes, unpack_bits(plain.codes, K))
    chosen = bcq.Bcq(planes, torch.where(better[:, None], solved.scales, plain.scales.float()), offsets)
    chosen = solve.descend(W, H, chosen, g, config.sweeps)
    after = (solve.loss(W, solve.dense(chosen, g), H).sum() / size).sqrt().item()
    return (
        Packed(pack_bits(chosen.planes), chosen.scales.half(), None if offsets is None else chosen.offsets.half()),
        before,
        after,
    )
