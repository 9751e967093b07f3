"""The solver's kernel against its torch operations, and the solver with it against the one on the CPU."""

import pytest
import torch
from test_columns import check, problem

from lutq import columns, solve
from lutq.columns import round_columns, round_on_gpu

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("g", "N"), [(1, 1), (32, 64), (64, 65), (128, 1000), (200, 129)])
def test_kernel(bits, g, N, start):
    wanted, factors, levels, q = problem(bits, g, N)
    on_gpu = [tensor.cuda() for tensor in (wanted, factors)]
    grids, begin = type(levels)(*(tensor.cuda() for tensor in levels)), q.cuda() if start else None
    positions, r = round_on_gpu(*on_gpu, grids, begin)
    check(wanted, factors, levels, q if start else None, positions.cpu(), r.cpu())
    again, r_again = round_on_gpu(*on_gpu, grids, begin)
    assert torch.equal(positions, again)
    assert torch.equal(r, r_again)
    alike = (positions.cpu() == round_columns(wanted, factors, levels, q if start else None)[0]).float().mean()
    assert alike > 0.99, f"{alike=}: but for rounding they are the same"


@pytest.mark.parametrize(("bits", "g"), [(2, 128), (3, 96), (4, 64)])
def test_solver(bits, g, monkeypatch):
    """As good as on the CPU, and the kernel is what runs."""
    random = torch.Generator().manual_seed(0)
    W, x = torch.randn(70, 288, generator=random), torch.randn(999, 288, generator=random)
    H = x.T @ x / 999 + 0.01 * torch.eye(288)
    runs = []
    kernel = columns.round_on_gpu
    monkeypatch.setattr(columns, "round_on_gpu", lambda *tensors: (runs.append(1), kernel(*tensors))[1])
    losses = []
    for device in ("cuda", "cpu"):
        w, h = W.to(device), H.to(device)
        fit = solve.descend(w, h, solve.solve(w.clone(), h, bits, g, True), g, 4)
        losses.append(solve.loss(W, solve.dense(fit, g).cpu(), H).sum().item())
    assert runs
    assert abs(losses[0] / losses[1] - 1) < 0.02, f"{losses=}"
