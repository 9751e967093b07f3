"""Binary-coding quantization: w ~ offset + sum_i scales_i s_i, s_i in {-1, +1}, fitted to the weights alone.

Everything works on groups as rows: w [R, g] fp32, R groups of g weights, and returns a `Bcq` whose scales and offsets are
fp16 values (held in fp32), non-negative and in descending order, with codes that are chosen after that rounding.

* `greedy`: plane by plane, s_i = sign(residual) and scales_i = mean |residual| (Guo et al., arXiv 1706.02021, eq. 3-5;
  the offset is the mean of the group).
* `alternating`: least squares for scales and offset with the codes fixed, then the nearest of the 2^b levels with those
  fixed, and again (Xu et al., arXiv 1802.00150, alg. 2), from one of the grids below or from several. The best iterate of each
  group is kept, starts included, so a round never hurts, and `uniform` is never worse than that uniform grid.

Grids to start from: `range`, the uniform grid over the whole range, in BCQ form; `uniform`, the clip-searched one; `greedy`;
`fine`, the top planes of a clip-searched grid of more bits; `quantiles`, least squares for codes that cut a group into equal
parts. `best` is all of these: of each group the fit with the smallest error is kept.

An error e [R, g] is measured as |e|^2, or as |e whiten|^2 with `whiten` [g] (the root of each input's importance) or [g, g]
(see lutq/solve.py).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from lutq import gpu_fit, uniform

BEST = ("range", "uniform", "greedy", "fine", "quantiles")  # the starts of `best`
FINER = 2  # bits that the uniform grid of the start `fine` has more


class Bcq(NamedTuple):
    """planes bool [b, R, g] (True is +1), scales fp32 [b, R] (fp16 values), offsets fp32 [R] (fp16 values) or None."""

    planes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None


class Best(NamedTuple):
    """The best grid so far of each group: scales [b, R], offsets [R] or None, and its error [R], changed in place."""

    scales: torch.Tensor
    offsets: torch.Tensor | None
    error: torch.Tensor


Refitted = Callable[[], Sequence[torch.Tensor | None]]  # scales [b, R], offsets [R] or None


def patterns(bits: int, device: torch.device) -> torch.Tensor:
    """All sign patterns, bool [2^b, b]; plane 0 is the most significant bit of the row number."""
    return planes_of(torch.arange(2**bits, device=device), bits).T.contiguous()


def planes_of(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Planes bool [b, ...] of integers or numbers of sign patterns [...], the most significant bit first."""
    shifts = torch.arange(bits - 1, -1, -1, dtype=numbers.dtype, device=numbers.device)
    return ((numbers >> shifts.view(-1, *[1] * numbers.dim())) & 1).bool()


def nearest(w: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Planes bool [b, R, g] of the level nearest to each weight, and the quantized weights fp32 [R, g]."""
    bits = scales.shape[0]
    signs = patterns(bits, w.device)
    levels = scales.T @ (2 * signs.float() - 1).T  # [R, 2^b]
    if offsets is not None:
        levels = levels + offsets[:, None]
    levels, order = levels.sort(dim=1)
    middles = (levels[:, 1:] + levels[:, :-1]) / 2
    below = torch.zeros_like(w, dtype=torch.uint8)  # levels below w's own; comparing is 5 times faster than searchsorted
    for middle in middles.unbind(1):
        below += w >= middle[:, None]
    position = below.long()
    return planes_of(order.to(torch.uint8).gather(1, position), bits), levels.gather(1, position)


def whitened(e: torch.Tensor, whiten: torch.Tensor | None) -> torch.Tensor:
    """Errors [..., g] in the metric that `whiten` ([g], [g, g] or None) stands for."""
    if whiten is None:
        return e
    return e * whiten if whiten.dim() == 1 else e @ whiten


def design_matrix(planes: torch.Tensor, has_offsets: bool) -> torch.Tensor:
    """Planes [b, R, g] as +-1, and a plane of ones for the offset: fp32 [R, b (+1), g]."""
    design = 2 * planes.float() - 1
    if has_offsets:
        design = torch.cat([design, torch.ones_like(design[:1])])
    return design.transpose(0, 1)


def refit(
    planes: torch.Tensor, w: torch.Tensor, has_offsets: bool, whiten: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Least-squares scales [b, R] and offsets [R] for fixed codes: argmin |(w - offset - sum_i scales_i s_i) whiten|^2.

    Planes that repeat each other share their scale (a ridge of 1e-6 decides).
    """
    design, w = whitened(design_matrix(planes, has_offsets), whiten), whitened(w, whiten)
    solution = solve(design @ design.transpose(1, 2), (design @ w[:, :, None])[:, :, 0])
    scales = solution[:, : planes.shape[0]].T
    return scales, solution[:, -1] if has_offsets else None


def solve(gram: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Solutions [R, n] of the R small positive semidefinite systems gram [R, n, n], target [R, n], n <= 5."""
    return (gpu_fit.solve if gpu_fit.usable(target) else eliminate)(gram, target)


def eliminate(gram: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`solve` by elimination unrolled over n, vectorized over R: a batched library solver calls LAPACK once per system."""
    n = target.shape[1]
    ridge = 1e-6 * gram.diagonal(dim1=1, dim2=2).mean(1) + 1e-30
    A = [[gram[:, i, j] + (ridge if i == j else 0) for j in range(n)] for i in range(n)]
    y = [target[:, i] for i in range(n)]
    for k in range(n):
        for i in range(k + 1, n):
            factor = A[i][k] / A[k][k]
            y[i] = y[i] - factor * y[k]
            for j in range(k + 1, n):
                A[i][j] = A[i][j] - factor * A[k][j]
    for k in reversed(range(n)):
        for j in range(k + 1, n):
            y[k] = y[k] - A[k][j] * y[j]
        y[k] = y[k] / A[k][k]
    return torch.stack(y, 1)


def storable(scales: torch.Tensor, offsets: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The grid as a checkpoint holds it: scales non-negative, descending, fp16; offsets fp16. Levels stay the same set."""
    scales = scales.abs().sort(dim=0, descending=True).values.half().float()
    return scales, None if offsets is None else offsets.half().float()


def canonical(planes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None) -> Bcq:
    """A fit as a checkpoint holds it (see `storable`); planes bool [b, R, g] are turned and sorted along with their scales."""
    order = scales.abs().sort(dim=0, descending=True).indices
    planes = (planes ^ (scales < 0)[:, :, None]).gather(0, order[:, :, None].expand_as(planes))
    return Bcq(planes, *storable(scales, offsets))


def values(planes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    """The quantized weights fp32 [R, g] of a fit."""
    q = torch.where(planes, scales[:, :, None], -scales[:, :, None]).sum(0)
    return q if offsets is None else q + offsets[:, None]


def greedy_grid(w: torch.Tensor, bits: int, has_offsets: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales [b, R] and offsets [R] of the greedy fit, in fp32."""
    offsets = w.mean(1) if has_offsets else None
    residual = w - offsets[:, None] if has_offsets else w
    scales = []
    for _ in range(bits):
        scales.append(residual.abs().mean(1))
        residual = torch.where(residual >= 0, residual - scales[-1][:, None], residual + scales[-1][:, None])
    return torch.stack(scales), offsets


def greedy(w: torch.Tensor, bits: int, has_offsets: bool) -> Bcq:
    """Greedy fit of w fp32 [R, g], its codes chosen for the stored scales."""
    scales, offsets = storable(*greedy_grid(w, bits, has_offsets))
    return Bcq(greedy_planes(w, scales, offsets), scales, offsets)


def greedy_planes(w: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    """Planes bool [b, R, g] that follow the residual's sign, plane by plane."""
    residual = w if offsets is None else w - offsets[:, None]
    planes = []
    for scale in scales:
        planes.append(residual >= 0)
        residual = torch.where(planes[-1], residual - scale[:, None], residual + scale[:, None])
    return torch.stack(planes)


def fine_grid(
    w: torch.Tensor, bits: int, has_offsets: bool, whiten: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The top planes of a clip-searched uniform grid of `FINER` bits more: of its levels, the middle of each 2^FINER in a row."""
    finer = bits + FINER
    scales, offsets = uniform.bcq_grid(uniform.rtn(w, finer, not has_offsets, whiten=whiten), finer)
    return scales[:bits], offsets if has_offsets else None


def quantile_grid(
    w: torch.Tensor, bits: int, has_offsets: bool, whiten: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Least squares for codes that cut each group, in order of size, into 2^bits parts of equally many weights."""
    ranks = w.argsort(dim=1, stable=True).argsort(dim=1)
    return refit(planes_of(ranks * 2**bits // w.shape[1], bits), w, has_offsets, whiten)


def starts(w: torch.Tensor, bits: int, has_offsets: bool, start: str, whiten: torch.Tensor | None = None) -> list[tuple]:
    """Initial grids (scales [b, R], offsets [R] or None) in fp32 for `start`, see `lutq.config.QuantConfig`; whiten [g]."""
    return [start_grid(w, bits, has_offsets, name, whiten) for name in (BEST if start == "best" else (start,))]


def start_grid(
    w: torch.Tensor, bits: int, has_offsets: bool, start: str, whiten: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One of `starts`: range, uniform, greedy, fine or quantiles."""
    if start == "greedy":
        return greedy_grid(w, bits, has_offsets)
    if start == "fine":
        return fine_grid(w, bits, has_offsets, whiten)
    if start == "quantiles":
        return quantile_grid(w, bits, has_offsets, whiten)
    scales, offsets = uniform.bcq_grid(uniform.rtn(w, bits, not has_offsets, start != "range", whiten), bits)
    return scales, offsets if has_offsets else None


def alternating(
    w: torch.Tensor,
    bits: int,
    has_offsets: bool,
    start: str = "range",
    iterations: int = 15,
    tolerance: float = 1e-3,
    whiten: torch.Tensor | None = None,
) -> Bcq:
    """Alternating fit of w fp32 [R, g]; whiten [g] weighs the inputs, the others as in `lutq.config.QuantConfig`.

    Every iterate is judged as it would be stored, after rounding to fp16, so the result is never worse than a start.
    """
    judge = judge_grid
    if gpu_fit.usable(w):
        judge, w, whiten = judge_on_gpu, w.contiguous(), gpu_fit.contiguous(whiten)
    grids = starts(w, bits, has_offsets, start, whiten)
    best = Best(*storable(*grids[0]), torch.full_like(w[:, 0], torch.inf))
    for grid in grids:
        previous = torch.inf
        for iteration in range(iterations + 1):
            error, refitted = judge(w, *grid, whiten, best)
            total = error.double().sum().item()
            if iteration == iterations or total >= previous * (1 - tolerance):
                break
            previous = total
            grid = refitted()
    return Bcq(nearest(w, best.scales, best.offsets)[0], best.scales, best.offsets)


def judge_grid(
    w: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None, whiten: torch.Tensor | None, best: Best
) -> tuple[torch.Tensor, Refitted]:
    """The error [R] of w fp32 [R, g] on a grid scales [b, R], offsets [R] or None as it would be stored, and what refits it to
    its codes; where it is the best so far it goes into `best`.
    """
    scales, offsets = storable(scales, offsets)
    planes, q = nearest(w, scales, offsets)
    error = whitened(w - q, whiten).square().sum(1)
    better = error < best.error
    for kept, new in zip(best, (scales, offsets, error), strict=True):
        if kept is not None:
            kept.copy_(torch.where(better, new, kept))
    return error, lambda: refit(planes, w, offsets is not None, whiten)


def judge_on_gpu(
    w: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None, whiten: torch.Tensor | None, best: Best
) -> tuple[torch.Tensor, Refitted]:
    """`judge_grid` by a kernel, which refits at once; w and whiten contiguous."""
    error, *refitted = gpu_fit.alternate(w, scales.contiguous(), gpu_fit.contiguous(offsets), whiten, best)
    return error, lambda: refitted
