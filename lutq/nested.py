"""The any-precision fit: one plane more for a fit that stays as it is, so that the first b planes are a good b-bit model.

Of the planes of `lower`, which a model of fewer bits uses too, no code changes. The new plane, all scales and the offset
are fitted to W, in turn: the plane's bits choose between two values of each weight, what the lower planes give plus and
minus the new scale; the grid is least squares. Without data (`extend`) a bit follows the sign of what the lower planes leave.
With H (`solve`) the bits are chosen input by input, each error pushed onto the inputs to come, in the metric and the order
of lutq/solve.py, and coordinate descent in all of H follows. Storing every precision's scales is the idea of AnyBCQ
(arXiv 2510.10467), planes shared by all precisions that of Any-Precision LLM (arXiv 2402.10517).

A plane more never makes a row worse: with a scale of 0 it is `lower`. Scales are not negative and stored as fp16, but, unlike
those of lutq/bcq.py, not sorted, since the order of the planes is given.
"""

import torch

from lutq import bcq
from lutq.bcq import Bcq
from lutq.hessian import inverse_factor
from lutq.solve import alternate, choose_rows, dense, descend, group_order, loss, move_grid


def add_plane(lower: Bcq, scale: torch.Tensor) -> Bcq:
    """`lower` with a scale [R], rounded to fp16, more, and a plane of ones."""
    planes = torch.cat([lower.planes, torch.ones_like(lower.planes[:1])])
    return Bcq(planes, torch.cat([lower.scales, scale.half().float()[None]]), lower.offsets)


def change_plane(fit: Bcq, plane: torch.Tensor) -> Bcq:
    """The fit with another last plane bool [R, g]."""
    return fit._replace(planes=torch.cat([fit.planes[:-1], plane[None]]))


def without_last(fit: Bcq) -> torch.Tensor:
    """What all planes but the last, and the offset, give: fp32 [R, g]."""
    return bcq.values(fit.planes[:-1], fit.scales[:-1], fit.offsets)


def settle(planes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None) -> Bcq:
    """A fit as a checkpoint holds it, its planes in their order; only the last plane may turn, with the sign of its scale."""
    turned = planes[-1] ^ (scales[-1] < 0)[:, None]
    scales = torch.cat([scales[:-1].clamp(min=0), scales[-1:].abs()]).half().float()
    return change_plane(Bcq(planes, scales, None if offsets is None else offsets.half().float()), turned)


def extend(w: torch.Tensor, lower: Bcq, iterations: int = 15, whiten: torch.Tensor | None = None) -> Bcq:
    """`lower` [b, R, g] with a plane more, fitted to w fp32 [R, g] without data; whiten [g] weighs the inputs."""
    residual = (w - bcq.values(*lower)).abs()
    weight = torch.ones_like(residual[0]) if whiten is None else whiten.square()
    start = add_plane(lower, (residual * weight).sum(1) / weight.sum())

    def signs(grid: Bcq) -> tuple[Bcq, torch.Tensor]:
        fit = change_plane(grid, w >= without_last(grid))
        return fit, bcq.whitened(w - bcq.values(*fit), whiten)

    return alternate(w, start, whiten, iterations, signs, settle)[0]


def feedback(w: torch.Tensor, U: torch.Tensor, grid: Bcq) -> tuple[Bcq, torch.Tensor]:
    """New codes of the last plane for w [N, g], input by input, each input's error pushed onto the later ones by U [g, g].

    Returns the fit and the whitened error E [N, g].
    """
    columns, given, scale = w.T.contiguous(), without_last(grid).T.contiguous(), grid.scales[-1]
    E, plane = torch.empty_like(columns), torch.empty(columns.shape, dtype=torch.bool, device=w.device)
    for j, column in enumerate(columns):
        if j:
            column = column - U[:j, j] @ E[:j]
        plane[j] = column >= given[j]
        E[j] = (column - given[j] - torch.where(plane[j], scale, -scale)) / U[j, j]
    return change_plane(grid, plane.T), E.T


def improve(fit: Bcq, q: torch.Tensor, pull: torch.Tensor, H: torch.Tensor) -> tuple[Bcq, torch.Tensor]:
    """A step of `lutq.solve.descend` that moves codes of the last plane only; arguments as `lutq.solve.move_codes`."""
    given, scale = without_last(fit).T.contiguous(), fit.scales[-1]
    q_columns, pulls = q.T.contiguous(), pull.T.contiguous()
    steps, plane = torch.zeros_like(q_columns), torch.empty(q_columns.shape, dtype=torch.bool, device=q.device)
    for j in range(len(q_columns)):
        now = pulls[j] - H[:j, j] @ steps[:j] if j else pulls[j]
        plane[j] = q_columns[j] + now / H[j, j] >= given[j]
        steps[j] = given[j] + torch.where(plane[j], scale, -scale) - q_columns[j]
    return move_grid(change_plane(fit, plane.T), (q_columns + steps).T, pull - steps.T @ H, H, settle)


def group_of(fit: Bcq, inputs: torch.Tensor, group: int) -> Bcq:
    """The fit of the inputs of one group."""
    return Bcq(fit.planes[:, :, inputs], fit.scales[:, :, group], None if fit.offsets is None else fit.offsets[:, group])


def extend_layer(W: torch.Tensor, lower: Bcq, g: int, iterations: int = 15) -> Bcq:
    """`extend` for W fp32 [N, K] in groups of g: planes [b, N, K], scales [b, N, G], offsets [N, G] or None."""
    groups = torch.arange(W.shape[1], device=W.device).split(g)
    fits = [extend(W[:, inputs], group_of(lower, inputs, i), iterations) for i, inputs in enumerate(groups)]
    offsets = None if lower.offsets is None else torch.stack([fit.offsets for fit in fits], 1)
    return Bcq(torch.cat([fit.planes for fit in fits], 2), torch.stack([fit.scales for fit in fits], 2), offsets)


def solve(W: torch.Tensor, H: torch.Tensor, lower: Bcq, g: int, rounds: int = 8, iterations: int = 15, sweeps: int = 8) -> Bcq:
    """`lower` with a plane more, fitted to W fp32 [N, K] in the metric of H fp32 [K, K]; shapes as in `extend_layer`."""
    K = W.shape[1]
    order = group_order(H.diagonal(), g)
    columns = torch.cat(order)
    U = inverse_factor(H[columns][:, columns])
    left = W[:, columns]
    unchanged = add_plane(lower, torch.zeros_like(lower.scales[0]))
    solved = Bcq(*(None if part is None else part.clone() for part in unchanged))
    begin = 0
    for inputs in order:
        here, rest = slice(begin, begin + len(inputs)), slice(begin + len(inputs), K)
        group = inputs[0].item() // g
        w, U_SS = left[:, here], U[here, here]
        whiten = torch.linalg.solve_triangular(U_SS, torch.eye(len(U_SS), device=U.device), upper=True)
        start = extend(w, group_of(lower, inputs, group), iterations, whiten.diagonal())
        fit, E = alternate(w, start, whiten, rounds, lambda grid, w=w, U_SS=U_SS: feedback(w, U_SS, grid), settle)
        left[:, rest] -= E @ U[here, rest]
        solved.planes[:, :, inputs], solved.scales[:, :, group] = fit.planes, fit.scales
        if solved.offsets is not None:
            solved.offsets[:, group] = fit.offsets
        begin = here.stop
    better = loss(W, dense(solved, g), H) < loss(W, dense(lower, g), H)
    return descend(W, H, choose_rows(better, solved, unchanged), g, sweeps, improve)
