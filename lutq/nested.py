"""The any-precision fit: one fit for each of several precisions, that of b bits made of the first b planes of the last one's.

Without data (`extend_layer`) the planes of the lowest precision stay as they are, and plane after plane is added: a bit
follows the sign of what the lower planes leave, and again all scales and the offset are least squares.

With H of every precision's own inputs (`solve`) all are fitted together, so that the sum of their squared output errors is
small. It is lutq/solve.py with three differences: every precision has its own grids, least squares in its own metric; in the
feedback each pushes its own errors onto its own copy of W; and the codes of a weight, all planes at once, are those of the
least sum over the precisions, since each wants other ones. Fitting the lowest first, as well as it can be alone, leaves
errors of feedback that no plane more takes back.

Storing every precision's scales is the idea of AnyBCQ (arXiv 2510.10467), planes shared by all that of Any-Precision LLM
(arXiv 2402.10517). Scales are not negative and stored as fp16, but, unlike those of lutq/bcq.py, not sorted: the order of the
planes is given.
"""

import torch

from lutq import bcq
from lutq.bcq import Bcq
from lutq.hessian import inverse_factor
from lutq.solve import alternate, choose, choose_rows, dense, group_order, loss, move_grid

Fits = list[Bcq]  # of one matrix at each precision, lowest first; the planes of each are the first of the last one's


def settle(planes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None) -> Bcq:
    """A fit as a checkpoint holds it, with codes that cannot turn along with a negative scale."""
    return Bcq(planes, scales.clamp(min=0).half().float(), None if offsets is None else offsets.half().float())


def add_plane(lower: Bcq, scale: torch.Tensor) -> Bcq:
    """A copy of `lower` with a scale [...], rounded to fp16, more, and a plane of ones."""
    planes = torch.cat([lower.planes, torch.ones_like(lower.planes[:1])])
    scales = torch.cat([lower.scales, scale.half().float()[None]])
    return Bcq(planes, scales, None if lower.offsets is None else lower.offsets.clone())


def extend(w: torch.Tensor, lower: Bcq, iterations: int = 15, whiten: torch.Tensor | None = None) -> Bcq:
    """`lower` [b, R, g] with a plane more, fitted to w fp32 [R, g] without data, no row worse; whiten [g] weighs the inputs."""
    residual = (w - bcq.values(*lower)).abs()
    weight = torch.ones_like(residual[0]) if whiten is None else whiten.square()
    start = add_plane(lower, (residual * weight).sum(1) / weight.sum())

    def signs(grid: Bcq) -> tuple[Bcq, torch.Tensor]:
        plane = w >= bcq.values(lower.planes, grid.scales[:-1], grid.offsets)
        fit = grid._replace(planes=torch.cat([lower.planes, plane[None]]))
        return fit, bcq.whitened(w - bcq.values(*fit), whiten)

    return alternate(w, start, whiten, iterations, signs, settle)[0]


def group_of(fit: Bcq, inputs: torch.Tensor | slice, group: int) -> Bcq:
    """The fit of the inputs of one group."""
    return Bcq(fit.planes[:, :, inputs], fit.scales[:, :, group], None if fit.offsets is None else fit.offsets[:, group])


def put_group(fit: Bcq, inputs: torch.Tensor | slice, group: int, part: Bcq) -> None:
    """The inverse of `group_of`, in place."""
    fit.planes[:, :, inputs], fit.scales[:, :, group] = part.planes, part.scales
    if fit.offsets is not None:
        fit.offsets[:, group] = part.offsets


def extend_layer(W: torch.Tensor, lowest: Bcq, bits: int, g: int, iterations: int = 15) -> Fits:
    """Fits from `lowest`, planes [b, N, K], scales [b, N, G], offsets [N, G] or None, to `bits` planes of W fp32 [N, K]."""
    fits = [lowest]
    while len(fits[-1].planes) < bits:
        fit = add_plane(fits[-1], torch.zeros_like(lowest.scales[0]))
        for group, inputs in enumerate(torch.arange(W.shape[1], device=W.device).split(g)):
            put_group(fit, inputs, group, extend(W[:, inputs], group_of(fits[-1], inputs, group), iterations))
        fits.append(fit)
    return fits


def levels_by_code(fit: Bcq) -> torch.Tensor:
    """Levels [2^b, R] of grids scales [b, R]; plane 0 is the most significant bit of the row number."""
    levels = (2 * bcq.patterns(len(fit.scales), fit.scales.device).float() - 1) @ fit.scales
    return levels if fit.offsets is None else levels + fit.offsets


def best_codes(levels: list[torch.Tensor], targets: list[torch.Tensor], weights: list[torch.Tensor]) -> torch.Tensor:
    """Codes int64 [R] of one weight per row, as in `levels_by_code`, at the highest precision, with the least sum over all
    precisions of weight (target - level)^2; levels [2^b, R], targets [R], weights [].
    """
    costs = torch.zeros_like(levels[0][:1])
    for level, target, weight in zip(levels, targets, weights, strict=True):
        costs = costs.repeat_interleave(len(level) // len(costs), 0) + weight * (target - level).square()
    return costs.argmin(0)


def values_of(codes: torch.Tensor, levels: list[torch.Tensor]) -> list[torch.Tensor]:
    """The quantized weights [R] at each precision of what `best_codes` returns."""
    highest = len(levels[-1])
    return [level.gather(0, (codes // (highest // len(level)))[None])[0] for level in levels]


def with_codes(fits: Fits, codes: torch.Tensor) -> Fits:
    """Fits of a group with other codes int64 [g, R]."""
    highest = len(fits[-1].planes)
    planes = bcq.planes_of(codes.T, highest)
    return [fit._replace(planes=planes[: len(fit.planes)]) for fit in fits]


def feedback(ws: list[torch.Tensor], Us: list[torch.Tensor], grids: Fits) -> tuple[Fits, list[torch.Tensor]]:
    """Codes for the weights of a group, ws [R, g] for each precision, input by input; each precision's error is pushed onto its
    later inputs by its U [g, g]. Returns the fits and their whitened errors E [R, g].
    """
    levels = [levels_by_code(grid) for grid in grids]
    columns = [w.T.contiguous() for w in ws]
    Es = [torch.empty_like(w) for w in columns]
    codes = torch.empty(columns[0].shape, dtype=torch.int64, device=ws[0].device)
    for j in range(len(codes)):
        targets = [w[j] - U[:j, j] @ E[:j] if j else w[j] for w, U, E in zip(columns, Us, Es, strict=True)]
        codes[j] = best_codes(levels, targets, [U[j, j] ** -2 for U in Us])
        for E, U, target, q in zip(Es, Us, targets, values_of(codes[j], levels), strict=True):
            E[j] = (target - q) / U[j, j]
    return with_codes(grids, codes), [E.T for E in Es]


def refit(fits: Fits, ws: list[torch.Tensor], whitens: list[torch.Tensor]) -> Fits:
    """Least-squares grids of a group for the codes of `fits`, each in its metric whiten [g] or [g, g]."""
    return [
        settle(fit.planes, *bcq.refit(fit.planes, w, fit.offsets is not None, whiten))
        for fit, w, whiten in zip(fits, ws, whitens, strict=True)
    ]


def starts(ws: list[torch.Tensor], whitens: list[torch.Tensor], bits: range, has_offsets: bool, iterations: int) -> Fits:
    """Fits of a group in the metric of whiten [g] alone: several of the highest precision, whose planes all take, and one of the
    lowest with planes added. All are there at once, as more rows: [b, S R, g] for S starts.
    """
    found = []
    for start in ("range", "uniform", "greedy"):
        top = bcq.alternating(ws[-1], bits[-1], has_offsets, start, iterations, whiten=whitens[-1])
        found.append(refit([top._replace(planes=top.planes[:b]) for b in bits], ws, whitens))
    grown = [bcq.alternating(ws[0], bits[0], has_offsets, iterations=iterations, whiten=whitens[0])]
    for w, whiten in zip(ws[1:], whitens[1:], strict=True):
        grown.append(extend(w, grown[-1], iterations, whiten))
    fits = []
    for same in zip(*found, grown, strict=True):  # of one precision
        offsets = torch.cat([fit.offsets for fit in same]) if has_offsets else None
        fits.append(Bcq(torch.cat([fit.planes for fit in same], 1), torch.cat([fit.scales for fit in same], 1), offsets))
    return fits


def solve_group(
    ws: list[torch.Tensor], Us: list[torch.Tensor], bits: range, has_offsets: bool, rounds: int, iterations: int
) -> tuple[Fits, list[torch.Tensor]]:
    """Fit one group, ws [N, g] and U [g, g] for each precision, with a small sum of |E|^2; the fits and their E [N, g].

    Codes by `feedback` from every one of `starts`, then `rounds` of `refit` and feedback; the best iterate of each row is kept.
    """
    N = len(ws[0])
    whitens = [torch.linalg.solve_triangular(U, torch.eye(len(U), device=U.device), upper=True) for U in Us]
    begin = starts(ws, [whiten.diagonal() for whiten in whitens], bits, has_offsets, iterations)
    ws = [w.repeat(len(begin[0].planes[0]) // N, 1) for w in ws]
    best, best_Es = feedback(ws, Us, begin)
    least, fits = sum(E.square().sum(1) for E in best_Es), best
    for _ in range(rounds):
        fits, Es = feedback(ws, Us, refit(fits, ws, whitens))
        losses = sum(E.square().sum(1) for E in Es)
        better = losses < least
        best = [choose(better, new, old) for new, old in zip(fits, best, strict=True)]
        best_Es = [torch.where(better[:, None], new, old) for new, old in zip(Es, best_Es, strict=True)]
        least = torch.where(better, losses, least)
    rows = least.view(-1, N).argmin(0) * N + torch.arange(N, device=least.device)
    best = [Bcq(fit.planes[:, rows], fit.scales[:, rows], fit.offsets[rows] if has_offsets else None) for fit in best]
    return best, [E[rows] for E in best_Es]


def solve(
    W: torch.Tensor, Hs: list[torch.Tensor], bits: range, g: int, has_offsets: bool, rounds: int = 8, iterations: int = 15
) -> Fits:
    """Error feedback through W fp32 [N, K] at every precision of `bits` with its H fp32 [K, K]; shapes as `lutq.solve.solve`."""
    N, K = W.shape
    order = group_order(Hs[-1].diagonal(), g)
    columns = torch.cat(order)
    Us = [inverse_factor(H[columns][:, columns]) for H in Hs]
    left = [W[:, columns] for _ in Hs]
    shared = torch.empty(bits[-1], N, K, dtype=torch.bool, device=W.device)
    grid = torch.empty(bits[-1] + 1, N, len(order), device=W.device)
    solved = [Bcq(shared[:b], grid[:b].clone(), grid[0].clone() if has_offsets else None) for b in bits]
    begin = 0
    for inputs in order:
        here, rest = slice(begin, begin + len(inputs)), slice(begin + len(inputs), K)
        fits, Es = solve_group([w[:, here] for w in left], [U[here, here] for U in Us], bits, has_offsets, rounds, iterations)
        for w, U, E, fit, whole in zip(left, Us, Es, fits, solved, strict=True):
            w[:, rest] -= E @ U[here, rest]
            put_group(whole, inputs, inputs[0].item() // g, fit)
        begin = here.stop
    return solved


def move_codes(
    fits: Fits, qs: list[torch.Tensor], pulls: list[torch.Tensor], Hs: list[torch.Tensor]
) -> tuple[Fits, list[torch.Tensor]]:
    """`lutq.solve.move_codes` at all precisions at once: one pass over the codes of a group; the new fits and their q [N, g]."""
    levels = [levels_by_code(fit) for fit in fits]
    columns, pulls = [q.T.contiguous() for q in qs], [pull.T.contiguous() for pull in pulls]
    steps = [torch.zeros_like(q) for q in columns]
    codes = torch.empty(columns[0].shape, dtype=torch.int64, device=qs[0].device)
    for j in range(len(codes)):
        now = [pull[j] - H[:j, j] @ step[:j] if j else pull[j] for pull, H, step in zip(pulls, Hs, steps, strict=True)]
        targets = [q[j] + p / H[j, j] for q, p, H in zip(columns, now, Hs, strict=True)]
        codes[j] = best_codes(levels, targets, [H[j, j] for H in Hs])
        for step, q, value in zip(steps, columns, values_of(codes[j], levels), strict=True):
            step[j] = value - q[j]
    return with_codes(fits, codes), [(q + step).T for q, step in zip(columns, steps, strict=True)]


def descend(W: torch.Tensor, Hs: list[torch.Tensor], fits: Fits, g: int, sweeps: int) -> Fits:
    """`lutq.solve.descend` at all precisions at once: no step raises the sum of a row's losses."""
    shared = fits[-1].planes.clone()
    fits = [
        Bcq(shared[: len(fit.planes)], fit.scales.clone(), None if fit.offsets is None else fit.offsets.clone()) for fit in fits
    ]
    Qs, K = [dense(fit, g) for fit in fits], W.shape[1]
    for _ in range(sweeps):
        pulls = [(W - Q) @ H for Q, H in zip(Qs, Hs, strict=True)]
        for group, begin in enumerate(range(0, K, g)):
            here = slice(begin, min(begin + g, K))
            before = [Q[:, here].clone() for Q in Qs]
            parts = [group_of(fit, here, group) for fit in fits]
            H_SS = [H[here, here] for H in Hs]
            moved = move_codes(parts, before, [pull[:, here] for pull in pulls], H_SS)
            for i, (part, q) in enumerate(zip(*moved, strict=True)):
                pull = pulls[i][:, here] - (q - before[i]) @ H_SS[i]
                part, q = move_grid(part, q, pull, H_SS[i], settle)
                put_group(fits[i], here, group, part)
                Qs[i][:, here] = q
                pulls[i] -= (q - before[i]) @ Hs[i][here]
    return fits


def no_worse(W: torch.Tensor, Hs: list[torch.Tensor], fits: Fits, g: int) -> Fits:
    """The fits; where a row is worse than at the precision below, its grid is that one and a scale of 0."""
    fits = list(fits)
    for i in range(1, len(fits)):
        same = add_plane(fits[i - 1], torch.zeros_like(fits[i].scales[0]))._replace(planes=fits[i].planes)
        better = loss(W, dense(fits[i], g), Hs[i]) <= loss(W, dense(same, g), Hs[i])
        fits[i] = choose_rows(better, fits[i], same)
    return fits
