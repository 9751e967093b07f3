"""Hessians and their factors against float64, and what happens where they are singular."""

import pytest
import torch

from lutq.errors import LutqError
from lutq.hessian import accumulate, damp, inverse_factor


def hessian(K, seed=0, rows=None):
    x = torch.randn(rows or 4 * K, K, generator=torch.Generator().manual_seed(seed))
    H = torch.zeros(K, K)
    accumulate(H, x)
    return H / len(x), x


@pytest.mark.parametrize("shape", [(64, 24), (4, 16, 24)], ids=str)
def test_accumulated_in_parts(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    H = torch.zeros(24, 24)
    for part in x.split(2):
        accumulate(H, part)
    rows = x.reshape(-1, 24).double()
    assert torch.allclose(H.double(), rows.T @ rows, atol=1e-4), f"{shape=}"


@pytest.mark.parametrize("K", [1, 5, 64])
def test_factor_of_the_inverse(K):
    H = damp(hessian(K)[0], 0.01).H
    U = inverse_factor(H)
    assert torch.equal(U, U.triu())
    assert torch.allclose((U.T @ U).double(), torch.linalg.inv(H.double()), rtol=1e-3, atol=1e-5), f"{K=}"


def test_regular_hessian_gets_what_was_asked_for():
    H, _ = hessian(16)
    damped = damp(H, 0.05)
    assert damped.damping == 0.05
    assert damped.reason == ""
    assert torch.allclose(damped.H - H, 0.05 * H.diagonal().mean() * torch.eye(16), atol=1e-6)


def test_singular_hessian_is_damped_more_and_says_so():
    H, _ = hessian(64, rows=3)
    damped = damp(H, 0.0, "fc1")
    assert 0 < damped.damping <= 0.01, f"{damped.damping=}"
    assert "fc1" in damped.reason
    assert f"{damped.damping:g}" in damped.reason
    inverse_factor(damped.H)


def test_inputs_that_were_never_active():
    H, _ = hessian(16)
    H[3], H[:, 3] = 0, 0
    damped = damp(H, 0.01)
    assert damped.H[3, 3] == pytest.approx(0.01 * H.diagonal().mean().item())
    assert torch.isfinite(inverse_factor(damped.H)).all()
    nothing = damp(torch.zeros(4, 4), 0.01, "fc2")
    assert torch.equal(nothing.H, torch.eye(4))
    assert "fc2" in nothing.reason


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_refused(value):
    H = torch.eye(4)
    H[1, 2] = value
    with pytest.raises(LutqError, match="inputs of fc1 are NaN or infinite"):
        damp(H, 0.01, "fc1")
