"""Round-to-nearest on a uniform grid, w ~ s (u - zp) with u in [0, 2^b), one step s per group.

Everything works on groups as rows: w [R, g] fp32, R groups of g weights. The range of an asymmetric grid contains 0, so
that 0 is a level and zp an integer in [0, 2^b); a symmetric grid has its levels at odd multiples of s/2 and no zero point.
s is rounded to fp16 before weights are rounded to levels, so the error is that of the stored grid.
"""

from typing import NamedTuple

import torch

from lutq import gpu_fit

SHRINKS, LOWEST = 41, 0.2  # clipping ranges tried: 1, 0.98 .. 0.2 of the whole range
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-24, 65504.0  # of fp16


class Uniform(NamedTuple):
    """u uint8 [R, g], scales s fp32 [R] (fp16 values), zero_points fp32 [R] (integers) or None."""

    u: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None


def round_to_grid(w: torch.Tensor, scales: torch.Tensor, center: torch.Tensor, bits: int) -> torch.Tensor:
    """U fp32 [R, g] of the nearest level s (u - center), for s and center [R]."""
    return torch.round(w / scales[:, None] + center[:, None]).clamp_(0, 2**bits - 1)


def rtn(w: torch.Tensor, bits: int, symmetric: bool = False, clip: bool = True, whiten: torch.Tensor | None = None) -> Uniform:
    """Nearest levels of each group's uniform grid.

    w: fp32 [R, g]. clip: try `SHRINKS` clipping ranges and keep, per group, the one of the least squared error (the whole
    range is one of them); otherwise keep the whole range. whiten: [g], factors of each input's error.
    """
    search = gpu_fit.search_grid if gpu_fit.usable(w) else search_grid
    scales, center = search(w, bits, symmetric, SHRINKS if clip else 1, LOWEST, whiten)
    u = round_to_grid(w, scales, center, bits).to(torch.uint8)
    return Uniform(u, scales, None if symmetric else center)


def search_grid(
    w: torch.Tensor, bits: int, symmetric: bool, ranges: int, lowest: float, whiten: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the grids whose range is 1 .. `lowest` of the whole range of w [R, g], so many of them, the best one's scales and
    center, both [R].
    """
    steps = 2**bits - 1
    if symmetric:
        high = w.abs().amax(1)
        low = -high
    else:
        low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    best_error = torch.full_like(low, torch.inf)
    best_scales, best_center = torch.zeros_like(low), torch.zeros_like(low)
    for shrink in torch.linspace(1.0, lowest, ranges).tolist():
        scales = ((high - low) * (shrink / steps)).clamp(SMALLEST_SCALE, LARGEST_SCALE).half().float()
        center = torch.full_like(low, steps / 2) if symmetric else torch.round(-low * shrink / scales).clamp_(0, steps)
        u = round_to_grid(w, scales, center, bits)
        error = w - scales[:, None] * (u - center[:, None])
        error = (error if whiten is None else error * whiten).square_().sum(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scales = torch.where(better, scales, best_scales)
        best_center = torch.where(better, center, best_center)
    return best_scales, best_center


def bcq_grid(uniform: Uniform, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same levels in BCQ form: scales_i = s 2^(b-2-i) [b, R] and offset = s ((2^b - 1)/2 - zp) [R], in fp32."""
    powers = torch.tensor([2.0 ** (bits - 2 - i) for i in range(bits)], device=uniform.scales.device)
    if uniform.zero_points is None:
        return powers[:, None] * uniform.scales, torch.zeros_like(uniform.scales)
    return powers[:, None] * uniform.scales, uniform.scales * ((2**bits - 1) / 2 - uniform.zero_points)
