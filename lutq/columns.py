"""The sequential part of the calibrated fit (lutq/solve.py): codes of one input after the other, each knowing the errors before.

On a GPU the torch operations below would be some ten launches for every input of every pass; a kernel (kernels/columns.cu) takes
64 inputs in one. It sums in another order, so codes that lie in the middle between two levels can come out otherwise.
"""

import ctypes
from typing import NamedTuple

import torch

from lutq import bcq, gpu_fit

TILE = 64  # inputs of a launch at most, of kernels/columns.cu


class Levels(NamedTuple):
    """The 2^b levels of N grids in ascending order: values and middles between them fp32 [2^b (- 1), N], and the number of
    each level's sign pattern, uint8 [2^b, N].
    """

    values: torch.Tensor
    middles: torch.Tensor
    numbers: torch.Tensor

    def nearest(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of one weight per row [N]: the level nearest to it and its position, both [N]."""
        position = (w >= self.middles).sum(0)
        return self.values.gather(0, position[None])[0], position


def levels_of(scales: torch.Tensor, offsets: torch.Tensor | None) -> Levels:
    """Levels of the grids scales [b, N], offsets [N] or None."""
    signs = 2 * bcq.patterns(len(scales), scales.device).float() - 1
    values = signs @ scales
    values, numbers = (values if offsets is None else values + offsets).sort(dim=0)
    return Levels(values, (values[1:] + values[:-1]) / 2, numbers.to(torch.uint8))


def planes_of(positions: torch.Tensor, levels: Levels, bits: int) -> torch.Tensor:
    """Planes bool [b, N, g] of the levels at positions int64 [g, N]."""
    return bcq.planes_of(levels.numbers.gather(0, positions).T, bits)


def round_columns(
    wanted: torch.Tensor, factors: torch.Tensor, levels: Levels, q: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose a level for one input after the other, of wanted fp32 [g, N] with factors F [g, g], of which only i <= j counts.

        t = wanted[j] - sum_{i < j} F[i, j] r[i]
        without q: the level v nearest to t, and r[j] = (t - v) / F[j, j], its error as later inputs see it
        with q [g, N]: the level v nearest to q[j] + t / F[j, j], and r[j] = v - q[j], the step from where it was

    Returns the positions of the levels, int64 [g, N], and r, fp32 [g, N].
    """
    if gpu_fit.usable(wanted):
        return round_on_gpu(wanted, factors, levels, q)
    positions, r = torch.empty_like(wanted, dtype=torch.int64), torch.empty_like(wanted)
    for j in range(len(wanted)):
        t = wanted[j] - factors[:j, j] @ r[:j] if j else wanted[j]
        if q is None:
            value, positions[j] = levels.nearest(t)
            r[j] = (t - value) / factors[j, j]
        else:
            value, positions[j] = levels.nearest(q[j] + t / factors[j, j])
            r[j] = value - q[j]
    return positions, r


class ColumnPass(ctypes.Structure):
    """`ColumnPass` of kernels/columns.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("wanted", "q", "factors", "values", "middles", "positions", "r")),
        ("N", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("inputs", "stride", "levels")),
    )


def round_on_gpu(
    wanted: torch.Tensor, factors: torch.Tensor, levels: Levels, q: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`round_columns` by the kernel, a tile of inputs at a time; what a tile leaves to the later ones is an ordinary product."""
    g, N = wanted.shape
    wanted, factors = wanted.clone(memory_format=torch.contiguous_format), factors.contiguous()
    values, middles = levels.values.contiguous(), levels.middles.contiguous()
    q = gpu_fit.contiguous(q)
    positions, r = torch.empty_like(wanted, dtype=torch.int64), torch.empty_like(wanted)
    for begin in range(0, g, TILE):
        end = min(begin + TILE, g)
        here = slice(begin, end)
        tile = (wanted[here], None if q is None else q[here], factors[here, here], values, middles, positions[here], r[here])
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in tile)
        gpu_fit.run("lutq_round_columns", ColumnPass(*pointers, N, end - begin, g, len(values)), wanted.device)
        if end < g:
            wanted[end:].addmm_(factors[here, end:].T, r[here], alpha=-1)
    return positions, r
