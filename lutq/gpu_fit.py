"""Steps of fitting and tuning (lutq/uniform.py, lutq/bcq.py, lutq/tunable.py) as kernels on a GPU, where torch would need many
small launches.

Each function takes tensors on one GPU and gives what the torch operations that it stands for would, but for rounding
(kernels/fit.cu sums in another order).
"""

import ctypes

import torch

from lutq.ops import working_backend


class GridSearch(ctypes.Structure):
    """`GridSearch` of kernels/fit.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("w", "whiten", "scales", "center")),
        ("R", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("g", "bits", "symmetric", "ranges")),
        ("lowest", ctypes.c_double),
    )


class Round(ctypes.Structure):
    """`Round` of kernels/fit.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("w", "whiten", "scales", "offsets", "best_scales", "best_offsets", "best_error")),
        *((name, ctypes.c_void_p) for name in ("error", "new_scales", "new_offsets")),
        ("R", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("g", "bits")),
    )


class Systems(ctypes.Structure):
    """`Systems` of kernels/fit.cu."""

    _fields_ = (*((name, ctypes.c_void_p) for name in ("gram", "target", "solution")), ("R", ctypes.c_int64), ("n", ctypes.c_int))


class Matrix(ctypes.Structure):
    """`Matrix` of kernels/fit.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("scales", "offsets", "codes", "weights", "dscales", "doffsets")),
        ("N", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("K", "g", "bits")),
    )


def usable(tensor: torch.Tensor) -> bool:
    """Whether the kernels work where a tensor lies; it must be fp32 and not empty."""
    return (
        tensor.is_cuda
        and tensor.dtype == torch.float32
        and tensor.numel() > 0
        and working_backend("auto", tensor.device) == "cuda"
    )


def contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A contiguous tensor; None for None."""
    return None if tensor is None else tensor.contiguous()


def address(tensor: torch.Tensor | None) -> int | None:
    """Of a contiguous tensor; None for None."""
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def run(name: str, a: ctypes.Structure, device: torch.device) -> None:
    """Launch an entry point of the library that takes `a` alone on the current stream of a GPU."""
    from lutq.cuda import kernels, start

    with torch.cuda.device(device):
        start(getattr(kernels(device), name), a)


def search_grid(
    w: torch.Tensor, bits: int, symmetric: bool, ranges: int, lowest: float, whiten: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`lutq.uniform.search_grid` of w fp32 [R, g]: scales and center, both [R]."""
    w, whiten = w.contiguous(), contiguous(whiten)
    scales, center = torch.empty_like(w[:, 0]), torch.empty_like(w[:, 0])
    pointers = (address(tensor) for tensor in (w, whiten, scales, center))
    run("lutq_search_grid", GridSearch(*pointers, *w.shape, bits, symmetric, ranges, lowest), w.device)
    return scales, center


def alternate(
    w: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    whiten: torch.Tensor | None,
    best: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A round of `lutq.bcq.alternating`, `lutq.bcq.judge_grid`, on contiguous tensors: the error [R], and the grid that is least
    squares for the codes.
    """
    error, new_scales, new_offsets = torch.empty_like(w[:, 0]), torch.empty_like(scales), None
    if offsets is not None:
        new_offsets = torch.empty_like(offsets)
    pointers = (address(tensor) for tensor in (w, whiten, scales, offsets, *best, error, new_scales, new_offsets))
    run("lutq_alternate", Round(*pointers, *w.shape, len(scales)), w.device)
    return error, new_scales, new_offsets


def solve(gram: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`lutq.bcq.eliminate` of gram [R, n, n], target [R, n]."""
    gram, target = gram.contiguous(), target.contiguous()
    solution = torch.empty_like(target)
    run("lutq_solve_systems", Systems(address(gram), address(target), address(solution), *target.shape), target.device)
    return solution


def run_matrix(name: str, codes: torch.Tensor, K: int, g: int, **tensors: torch.Tensor | None) -> None:
    """Launch an entry point that takes a `Matrix` of codes int32 [b, N, words], with tensors by the names of its fields."""
    pointers = {field: address(tensor) for field, tensor in tensors.items()}
    run(name, Matrix(codes=address(codes), N=codes.shape[1], K=K, g=g, bits=len(codes), **pointers), codes.device)


def make_weights(codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None, K: int, g: int) -> torch.Tensor:
    """The weights fp32 [N, K] of codes int32 [b, N, words], scales fp32 [b, N, G], offsets fp32 [N, G] or None in groups of g."""
    w = torch.empty(codes.shape[1], K, device=codes.device)
    grid = {"scales": scales.contiguous(), "offsets": contiguous(offsets)}
    run_matrix("lutq_make_weights", codes.contiguous(), K, g, weights=w, **grid)
    return w


def grid_gradients(
    codes: torch.Tensor, dW: torch.Tensor, G: int, g: int, has_offsets: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """From the gradient fp32 [N, K] of `make_weights`: those of its scales [b, N, G] and offsets [N, G], None for none."""
    dscales = dW.new_empty(*codes.shape[:2], G)
    doffsets = dW.new_empty(codes.shape[1], G) if has_offsets else None
    run_matrix(
        "lutq_grid_gradients", codes.contiguous(), dW.shape[1], g, weights=dW.contiguous(), dscales=dscales, doffsets=doffsets
    )
    return dscales, doffsets


def nearest_codes(w: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None, g: int) -> torch.Tensor:
    """Codes int32 [b, N, words] of the levels nearest to w fp32 [N, K], of a grid as `make_weights` takes it."""
    N, K = w.shape
    codes = torch.empty(len(scales), N, -(-K // 32), dtype=torch.int32, device=w.device)
    grid = {"scales": scales.contiguous(), "offsets": contiguous(offsets)}
    run_matrix("lutq_nearest_codes", codes, K, g, weights=w.contiguous(), **grid)
    return codes
