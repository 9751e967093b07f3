"""The calibrated fit: BCQ weights whose error, seen through the inputs of a calibration text, is small.

For W [N, K] and H = X^T X (lutq/hessian.py), U upper with U^T U = H^-1, one group S of inputs after the other:

    E = (w - q) U_SS^-1          whitened error of the group, the group's loss is |E|^2 per row
    W[:, rest] -= E U[S, rest]   what the later groups have to make up for

Within a group the same feedback runs from input to input, so codes are chosen after compensation; with the codes fixed,
scales and offset are least squares in the whitened metric; and again, from several starts, the best iterate of each row
kept. Frantar et al., arXiv 2210.17323, is the feedback; fitting BCQ grids in its metric is the idea of BPDQ and ShiftAddLLM
(arXiv 2406.05981). What the order of the groups has cost, `descend` takes back: exact coordinate descent in all of H over
codes and grids (as QuantEase, arXiv 2309.01885, does for uniform grids).

Rows are outputs: w [N, g] is what lutq/bcq.py calls R groups. Every grid is judged as stored, after rounding to fp16.
"""

import functools
from collections.abc import Callable

import torch

from lutq import bcq
from lutq.bcq import Bcq
from lutq.columns import levels_of, planes_of, round_columns
from lutq.hessian import inverse_factor

# the steps that the any-precision fit (lutq/nested.py) replaces, see `descend`, `alternate` and `move_grid`
Improve = Callable[[Bcq, torch.Tensor, torch.Tensor, torch.Tensor], tuple[Bcq, torch.Tensor]]
Choose = Callable[[Bcq], tuple[Bcq, torch.Tensor]]
Settle = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], Bcq]


def feedback(w: torch.Tensor, U: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None) -> tuple[Bcq, torch.Tensor]:
    """Round w [N, g] input by input to its grids, each input's error pushed onto the later ones by U [g, g].

    Returns the fit and the whitened error E [N, g] = (w - q) U^-1.
    """
    levels = levels_of(scales, offsets)
    positions, E = round_columns(w.T.contiguous(), U, levels)
    return Bcq(planes_of(positions, levels, len(scales)), scales, offsets), E.T


def choose(better: torch.Tensor, new: Bcq, old: Bcq) -> Bcq:
    """Rows of `new` where better [N], else of `old`."""
    offsets = None if old.offsets is None else torch.where(better, new.offsets, old.offsets)
    return Bcq(torch.where(better[:, None], new.planes, old.planes), torch.where(better, new.scales, old.scales), offsets)


def choose_rows(better: torch.Tensor, new: Bcq, old: Bcq) -> Bcq:
    """`choose` for whole layers: planes [b, N, K], scales [b, N, G], offsets [N, G] or None."""
    better = better[:, None]
    offsets = None if old.offsets is None else torch.where(better, new.offsets, old.offsets)
    return Bcq(torch.where(better, new.planes, old.planes), torch.where(better, new.scales, old.scales), offsets)


def alternate(
    w: torch.Tensor, start: Bcq, whiten: torch.Tensor | None, rounds: int, choose_codes: Choose, settle: Settle = bcq.canonical
) -> tuple[Bcq, torch.Tensor]:
    """Codes for the grid of `start`, then in `rounds` a least-squares refit and new codes: for each row of w [N, g] the iterate
    of least |E|^2, and its whitened error E [N, g]. choose_codes: a grid -> the fit with new codes and its E.
    """
    best, best_E = choose_codes(start)
    best_loss, current = best_E.square().sum(1), best
    for _ in range(rounds):
        fixed = settle(current.planes, *bcq.refit(current.planes, w, start.offsets is not None, whiten))
        moved, moved_E = choose_codes(fixed)
        for fit, E in ((fixed, bcq.whitened(w - bcq.values(*fixed), whiten)), (moved, moved_E)):
            loss = E.square().sum(1)
            better = loss < best_loss
            best, best_E = choose(better, fit, best), torch.where(better[:, None], E, best_E)
            best_loss = torch.where(better, loss, best_loss)
        current = moved
    return best, best_E


def solve_group(
    w: torch.Tensor, U: torch.Tensor, bits: int, has_offsets: bool, rounds: int, starts: tuple[str, ...], iterations: int = 15
) -> tuple[Bcq, torch.Tensor]:
    """Fit one group w [N, g] in the metric of U [g, g]; the fit and its whitened error E [N, g].

    Each start is an alternating fit of `iterations` in the metric of the diagonal alone; `rounds` of refit and feedback
    follow. The loss of the best iterate never rises.
    """
    N, count = len(w), len(starts)
    whiten = torch.linalg.solve_triangular(U, torch.eye(len(U), device=U.device), upper=True)
    grids = [bcq.alternating(w, bits, has_offsets, start, iterations, whiten=whiten.diagonal()) for start in starts]
    offsets = torch.cat([grid.offsets for grid in grids]) if has_offsets else None
    start = Bcq(torch.cat([grid.planes for grid in grids], 1), torch.cat([grid.scales for grid in grids], 1), offsets)
    w = w.repeat(count, 1)  # all starts at once, as more rows
    best, best_E = alternate(w, start, whiten, rounds, lambda grid: feedback(w, U, grid.scales, grid.offsets))
    best_loss = best_E.square().sum(1)
    rows = best_loss.view(count, N).argmin(0) * N + torch.arange(N, device=w.device)
    offsets = best.offsets[rows] if has_offsets else None
    return Bcq(best.planes[:, rows], best.scales[:, rows], offsets), best_E[rows]


def group_order(importance: torch.Tensor, g: int) -> list[torch.Tensor]:
    """Inputs of each group of g, groups and inputs inside them by falling importance [K], which costs nothing at inference."""
    groups = [part.argsort(descending=True, stable=True) + g * i for i, part in enumerate(importance.split(g))]
    return sorted(groups, key=lambda inputs: importance[inputs[0]].item(), reverse=True)


def solve(
    W: torch.Tensor,
    H: torch.Tensor,
    bits: int,
    g: int,
    has_offsets: bool,
    rounds: int = 8,
    iterations: int = 15,
    starts: tuple[str, ...] = ("range", "uniform", "greedy"),
) -> Bcq:
    """Error feedback through W fp32 [N, K] with H fp32 [K, K], positive definite: planes [b, N, K], scales [b, N, G], offsets
    [N, G] or None.
    """
    N, K = W.shape
    order = group_order(H.diagonal(), g)
    columns = torch.cat(order)
    U = inverse_factor(H[columns][:, columns])
    W = W[:, columns]
    planes = torch.empty(bits, N, K, dtype=torch.bool, device=W.device)
    scales = torch.empty(bits, N, len(order), device=W.device)
    offsets = torch.empty(N, len(order), device=W.device) if has_offsets else None
    begin = 0
    for inputs in order:
        here, rest = slice(begin, begin + len(inputs)), slice(begin + len(inputs), K)
        fit, E = solve_group(W[:, here], U[here, here], bits, has_offsets, rounds, starts, iterations)
        W[:, rest] -= E @ U[here, rest]
        group = inputs[0].item() // g
        planes[:, :, inputs], scales[:, :, group] = fit.planes, fit.scales
        if has_offsets:
            offsets[:, group] = fit.offsets
        begin = here.stop
    return Bcq(planes, scales, offsets)


def dense(fit: Bcq, g: int) -> torch.Tensor:
    """The weights fp32 [N, K] of a fit with planes [b, N, K], scales [b, N, G] and offsets [N, G] or None."""
    K = fit.planes.shape[2]
    scales = fit.scales.repeat_interleave(g, 2)[:, :, :K]
    q = torch.where(fit.planes, scales, -scales).sum(0)
    return q if fit.offsets is None else q + fit.offsets.repeat_interleave(g, 1)[:, :K]


def loss(W: torch.Tensor, Q: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """Squared output error of each row [N] of Q for W [N, K]."""
    e = W - Q
    return (e @ H * e).sum(1)


def improve_group(
    fit: Bcq, q: torch.Tensor, pull: torch.Tensor, H: torch.Tensor, settle: Settle = bcq.canonical
) -> tuple[Bcq, torch.Tensor]:
    """`move_codes`, then `move_grid`, whose arguments these are."""
    fit, moved = move_codes(fit, q, pull, H)
    return move_grid(fit, moved, pull - (moved - q) @ H, H, settle)


def descend(
    W: torch.Tensor,
    H: torch.Tensor,
    fit: Bcq,
    g: int,
    sweeps: int,
    improve: Improve = improve_group,
    settle_of: Callable[[int], Settle] | None = None,
) -> Bcq:
    """Lower `loss` from a fit as `solve` returns it by coordinate descent; no step raises the loss of a row.

    A sweep visits every group: each code takes the level that is best with all else fixed, then the group's scales and offset
    are least squares in H, and are kept in the rows where that, after rounding, is better. `improve` replaces these two steps,
    settle_of: number of a group -> the rounding of its grid, where groups do not share one.
    """
    if sweeps == 0:
        return fit
    planes, scales = fit.planes.clone(), fit.scales.clone()
    offsets = None if fit.offsets is None else fit.offsets.clone()
    Q = dense(fit, g)
    K = W.shape[1]
    for _ in range(sweeps):
        pull = (W - Q) @ H  # [N, K], minus half the gradient; anew in each sweep, since rounding errors add up
        for group, begin in enumerate(range(0, K, g)):
            here = slice(begin, min(begin + g, K))
            H_SS, before = H[here, here], Q[:, here].clone()
            part = Bcq(planes[:, :, here], scales[:, :, group], None if offsets is None else offsets[:, group])
            step = functools.partial(improve, settle=settle_of(group)) if settle_of else improve
            part, q = step(part, before, pull[:, here], H_SS)
            planes[:, :, here], scales[:, :, group], Q[:, here] = part.planes, part.scales, q
            if offsets is not None:
                offsets[:, group] = part.offsets
            pull -= (q - before) @ H[here]
    return Bcq(planes, scales, offsets)


def move_codes(fit: Bcq, q: torch.Tensor, pull: torch.Tensor, H: torch.Tensor) -> tuple[Bcq, torch.Tensor]:
    """One pass over the codes of a group, q [N, g], with pull = (W - Q) H[:, S] [N, g] and H = H_SS [g, g]; the new fit, q."""
    levels, q_columns = levels_of(fit.scales, fit.offsets), q.T.contiguous()
    positions, steps = round_columns(pull.T.contiguous(), H, levels, q_columns)
    return Bcq(planes_of(positions, levels, len(fit.scales)), fit.scales, fit.offsets), (q_columns + steps).T


def move_grid(
    fit: Bcq, q: torch.Tensor, pull: torch.Tensor, H: torch.Tensor, settle: Settle = bcq.canonical
) -> tuple[Bcq, torch.Tensor]:
    """Scales and offset of a group refitted with its codes fixed; arguments as `move_codes`. `settle` makes them storable."""
    has_offsets = fit.offsets is not None
    design = bcq.design_matrix(fit.planes, has_offsets)  # [N, b (+1), g]
    target = (design @ (pull + q @ H)[:, :, None])[:, :, 0]
    solution = bcq.solve(design @ H @ design.transpose(1, 2), target)
    bits = len(fit.scales)
    new = settle(fit.planes, solution[:, :bits].T, solution[:, -1] if has_offsets else None)
    new_q = bcq.values(*new)
    step = new_q - q
    better = (step @ H * step).sum(1) < 2 * (step * pull).sum(1)
    return choose(better, new, fit), torch.where(better[:, None], new_q, q)
