"""Corrections beside the bit-planes: a few weights of each row in fp16, and a product of two thin matrices.

    W [N, K] ~ planes + V + A B        V sparse, r entries in every row; A [N, R], B [R, K]

* Outliers stretch the grid of their group, so they are taken out of W before the fit, as SqueezeLLM does (arXiv 2306.07629), and
  V makes up for what the planes then lack there. Taken are the weights farthest from the mean of their group. On opt-tiny these
  did more than the sensitivities tried, error^2 H_kk of a fit and the gain (e H)_k^2 / H_kk of correcting one weight: errors at
  single places the feedback of lutq/solve.py makes up for, stretched grids it cannot. Every row has the same number, so that the
  product is a gather of dense shape without atomics.
* A B takes the main directions out of W before its outliers are looked for, and is fitted anew to what the planes left, both in
  the metric of the inputs H (SLiM, arXiv 2410.09615; L2QER, arXiv 2402.02446).

After the planes A B and then V are the best ones for all else, so they never raise the layer's output error. Two sets of planes
are tried, those of W as it is and those of W without its main directions and outliers, and the better one is kept: a corrected
layer has no larger error than one without corrections.

Stored: `outlier_values` fp16 [N, r] and `outlier_columns` [N, r], int16 or, beyond 32768 inputs, int32, ascending in each row;
`low_rank_left` fp16 [N, R] and `low_rank_right` fp16 [R, K].
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F

from lutq.config import LayerConfig

Planes = TypeVar("Planes")
CHUNK = 1 << 22  # numbers of the small systems solved at a time
GATHER = 8  # a product gathers while it takes at most 1/8 as many numbers as W has; beyond, V is made dense
SHORT = 1 << 15  # inputs that int16 columns can name


class Residual(NamedTuple):
    """See the module docstring; None for what a layer does not have."""

    outlier_values: torch.Tensor | None = None
    outlier_columns: torch.Tensor | None = None
    low_rank_left: torch.Tensor | None = None
    low_rank_right: torch.Tensor | None = None


NOTHING = Residual()


def residual_shapes(N: int, K: int, layer: LayerConfig) -> dict[str, tuple]:
    """Tensor name -> (shape, dtype) of the corrections of W [N, K]."""
    shapes: dict[str, tuple] = {}
    if layer.outliers_per_row:
        places = (N, layer.outliers_per_row)
        shapes["outlier_values"] = places, torch.float16
        shapes["outlier_columns"] = places, torch.int16 if K <= SHORT else torch.int32
    if layer.low_rank:
        shapes["low_rank_left"] = (N, layer.low_rank), torch.float16
        shapes["low_rank_right"] = (layer.low_rank, K), torch.float16
    return shapes


def costs(layers: Iterable[tuple[int, int, LayerConfig]]) -> dict[str, str]:
    """What the corrections of quantized layers (N, K, settings) are and take, as title -> words; nothing where there are none."""
    layers = list(layers)
    weights, found = sum(N * K for N, K, _ in layers), {}
    for title, field, words in (("outliers", "outliers_per_row", "{} weights of each row"), ("low rank", "low_rank", "rank {}")):
        counts = sorted({getattr(layer, field) for _, _, layer in layers})
        bits = 0
        for N, K, layer in layers:
            alone = layer.bare()._replace(**{field: getattr(layer, field)})
            bits += sum(8 * torch.Size(shape).numel() * dtype.itemsize for shape, dtype in residual_shapes(N, K, alone).values())
        if bits:
            many = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
            found[title] = f"{words.format(many)} in fp16 beside the planes, {bits / weights:.3f} bits per weight"
    return found


def product(x: torch.Tensor, residual: Residual) -> torch.Tensor | None:
    """What the corrections add to y [..., N], in the dtype of x or fp32, for x [..., K]; None where there are none.

    Ordinary operations, the same on every device and deterministic, that take no more memory than a dense W.
    """
    values, columns, left, right = residual
    y = None
    if values is not None:
        (N, r), K = values.shape, x.shape[-1]
        if GATHER * x.numel() * r <= K * K:
            taken = x.index_select(-1, columns.flatten().int()).unflatten(-1, (N, r))
            y = (taken * values.float()).sum(-1)
        else:
            V = torch.zeros(N, K, dtype=x.dtype, device=x.device)
            y = F.linear(x, V.scatter_(1, columns.long(), values.to(x.dtype)))
    if left is not None:
        thin = F.linear(F.linear(x, right.to(x.dtype)), left.to(x.dtype))
        y = thin if y is None else y + thin
    return y


def add_to(W: torch.Tensor, residual: Residual) -> torch.Tensor:
    """W [N, K] with the corrections added in its dtype, in place."""
    values, columns, left, right = residual
    if values is not None:
        columns = columns.long()
        W.scatter_(1, columns, W.gather(1, columns) + values.to(W.dtype))
    return W if left is None else W.addmm_(left.to(W.dtype), right.to(W.dtype))


def outlier_columns(W: torch.Tensor, g: int, r: int) -> torch.Tensor:
    """Of each row of W fp32 [N, K] the r weights farthest from the mean of their group of g: int64 [N, r], ascending."""
    distance = torch.cat([(w - w.mean(1, keepdim=True)).abs() for w in W.split(g, 1)], 1)
    return distance.topk(r, 1).indices.sort(1).values


def without_outliers(W: torch.Tensor, g: int, columns: torch.Tensor) -> torch.Tensor:
    """W fp32 [N, K] with the mean of the other weights of its group of g in place of every outlier."""
    others = torch.ones_like(W, dtype=torch.bool).scatter_(1, columns, False)
    parts = []
    for w, other in zip(W.split(g, 1), others.split(g, 1), strict=True):
        mean = (w * other).sum(1, keepdim=True) / other.sum(1, keepdim=True).clamp(min=1)
        parts.append(torch.where(other, w, mean))
    return torch.cat(parts, 1)


def outlier_values(E: torch.Tensor, H: torch.Tensor | None, columns: torch.Tensor) -> torch.Tensor:
    """The entries v [N, r] at columns [N, r] that make the error of E - V least in the metric of H [K, K]; None: of ones.

    Normal equations of each row, H_SS v = (e H)_S.
    """
    if H is None:
        return E.gather(1, columns)
    target = (E @ H).gather(1, columns)
    rows = max(1, CHUNK // columns.shape[1] ** 2)
    parts = zip(columns.split(rows), target.split(rows), strict=True)
    return torch.cat([torch.linalg.solve(H[at[:, :, None], at[:, None, :]], b) for at, b in parts])


def low_rank(E: torch.Tensor, H: torch.Tensor | None, R: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [N, R], B [R, K] with the least error of E [N, K] - A B in the metric of H [K, K]; None: the truncated SVD.

    With H = L L^T and U the first left singular vectors of E L, that is U U^T E. U comes from the smaller Gram matrix; entries of
    A and B are made equally large, so that neither leaves the range of fp16.
    """
    N, K = E.shape
    F_ = E if H is None else E @ torch.linalg.cholesky(H)
    if N <= K:
        U = torch.linalg.eigh(F_ @ F_.T).eigenvectors[:, -R:]
    else:
        U = torch.linalg.qr(F_ @ torch.linalg.eigh(F_.T @ F_).eigenvectors[:, -R:]).Q
    B = U.T @ E
    size = (B.norm(dim=1) * (N / K) ** 0.5).sqrt().clamp(min=1e-12)
    return U * size, B / size[:, None]


def correct(
    E: torch.Tensor, H: torch.Tensor | None, columns: torch.Tensor | None, layer: LayerConfig, common: torch.Tensor
) -> Residual:
    """Corrections of E fp32 [N, K], what the planes left of W, as stored: outliers at columns [N, r] or None.

    common [N, K]: about what A B will be. Without it V would first take from A B what it can.
    """
    values = left = right = None
    if layer.low_rank:
        V = torch.zeros_like(E)
        if columns is not None:
            V.scatter_(1, columns, outlier_values(E - common, H, columns))
        left, right = (factor.half() for factor in low_rank(E - V, H, layer.low_rank))
        E = E - left.float() @ right.float()
    if columns is not None:
        values = outlier_values(E, H, columns).half()
        columns = columns.to(torch.int16 if E.shape[1] <= SHORT else torch.int32)
    return Residual(values, columns, left, right)


def squared_error(E: torch.Tensor, H: torch.Tensor | None) -> float:
    """|E|^2 in the metric of H."""
    return (E if H is None else E @ H).mul(E).sum(1).double().sum().item()


def fit_corrected(
    W: torch.Tensor,
    H: torch.Tensor | None,
    layer: LayerConfig,
    g: int,
    fit: Callable[[torch.Tensor], Planes],
    dense: Callable[[Planes], torch.Tensor],
) -> tuple[Planes, Residual]:
    """Planes and corrections of W fp32 [N, K], of the two tries the better one.

    g: inputs of a group. H: second moments [K, K] of the inputs, or None. fit: a matrix -> its planes; dense: those as a matrix.
    """
    common = torch.zeros_like(W)
    if layer.low_rank:
        left, right = low_rank(W, H, layer.low_rank)
        common = left @ right
    target, columns = W - common, None
    if layer.outliers_per_row:
        columns = outlier_columns(target, g, layer.outliers_per_row)
        target = without_outliers(target, g, columns)
    tries = []
    for planes, start in ((fit(W), torch.zeros_like(W)), (fit(target), common)):
        E = W - dense(planes)
        residual = correct(E, H, columns, layer, start)
        tries.append((squared_error(add_to(-E, residual), H), planes, residual))
    _, planes, residual = min(tries, key=lambda one: one[0])
    return planes, residual
