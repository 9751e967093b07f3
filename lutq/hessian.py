"""Second moments of a layer's inputs, and the factor that carries an error from one input to the next.

With calibration inputs X [M, K] the output error of quantized weights Q is |X (W - Q)^T|^2 = sum_n e_n H e_n^T, e = W - Q and
H = X^T X / M [K, K]. Of U, the upper Cholesky factor of H^-1, the rows say what the inputs not yet quantized must make up
for (Frantar et al., arXiv 2210.17323, step 3).
"""

from typing import NamedTuple

import torch

from lutq.errors import LutqError

MOST_DAMPING = 1e3  # of the mean of H's diagonal; beyond it nothing of the calibration would be left


class Damped(NamedTuple):
    """H fp32 [K, K], positive definite after adding `damping` times the mean of its diagonal; `reason` where that is more
    than was asked for, else empty.
    """

    H: torch.Tensor
    damping: float
    reason: str


def accumulate(H: torch.Tensor, x: torch.Tensor, weights: torch.Tensor | None = None) -> None:
    """Add X^T X of inputs x [..., K] to H fp32 [K, K], in place; with weights [M] of the rows of X, X^T diag(weights) X."""
    x = x.reshape(-1, H.shape[0]).float()
    if weights is not None:
        x = x * weights.reshape(-1, 1).sqrt()  # of both factors, so that H is symmetric after rounding, too
    H.addmm_(x.T, x)


def damp(H: torch.Tensor, damping: float, name: str = "a layer") -> Damped:
    """H [K, K] with enough added to its diagonal to be positive definite in fp32: `damping` times the diagonal's mean, ten
    times more each time that this is too little. Inputs that were never active are left with the damping alone.

    Raises LutqError for NaN or infinite H, which means such activations of the layer called `name`.
    """
    if not torch.isfinite(H).all():
        raise LutqError(f"the inputs of {name} are NaN or infinite on the calibration text: give an undamaged model")
    mean = H.diagonal().double().mean().item()
    if mean == 0:
        return Damped(torch.eye(len(H), device=H.device), damping, f"{name} has no inputs but zeros on the calibration text")
    used = damping
    while used <= MOST_DAMPING:
        damped = H + torch.diag(torch.full_like(H.diagonal(), used * mean))
        _, info = torch.linalg.cholesky_ex(damped)
        if info == 0:
            reason = f"damping of {name} raised from {damping:g} to {used:g}: its Hessian is singular" if used > damping else ""
            return Damped(damped, used, reason)
        used = max(10 * used, 1e-4)
    raise LutqError(f"the Hessian of {name} is not positive definite with any damping: give more calibration text")


def inverse_factor(H: torch.Tensor) -> torch.Tensor:
    """U fp32 [K, K], upper triangular, with U^T U = H^-1 for a positive definite H; computed in fp64."""
    L = torch.linalg.cholesky(H.double())
    return torch.linalg.cholesky(torch.cholesky_inverse(L), upper=True).float()
