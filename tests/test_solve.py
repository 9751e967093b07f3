"""The calibrated fit against brute force in float64 on small problems, and what it promises about its objective."""

import itertools

import pytest
import torch

from lutq import bcq, solve
from lutq.bcq import Bcq
from lutq.config import QuantConfig
from lutq.fit import solve_layer, solve_layers
from lutq.hessian import accumulate, damp, inverse_factor
from lutq.pack import highest, weight


def problem(N, K, seed=0, correlated=True):
    random = torch.Generator().manual_seed(seed)
    W = torch.randn(N, K, generator=random)
    x = torch.randn(4 * K, K, generator=random)
    if correlated:
        x = x @ torch.randn(K, K, generator=random)
    H = torch.zeros(K, K)
    accumulate(H, x)
    return W, damp(H / len(x), 0.01).H


def grids(N, bits, has_offsets, seed=1):
    random = torch.Generator().manual_seed(seed)
    scales, offsets = torch.rand(bits, N, generator=random) + 0.1, 0.3 * torch.randn(N, generator=random)
    return bcq.storable(scales, offsets if has_offsets else None)


def brute_feedback(w, H, levels):
    """One row rounded input by input, after each step all later weights set to their best by least squares, in float64."""
    w, H = w.double().clone(), H.double()
    target, K, q = w.clone(), len(w), []
    for k in range(K):
        q.append(levels[(w[k] - levels).abs().argmin()])
        e = target[: k + 1] - torch.stack(q)  # min over the rest r of [e, t - r] H [e, t - r]: t - r = -H_rr^-1 H_re e
        if k + 1 < K:
            w[k + 1 :] = target[k + 1 :] + torch.linalg.solve(H[k + 1 :, k + 1 :], H[k + 1 :, : k + 1] @ e)
    return torch.stack(q)


@pytest.mark.parametrize(("bits", "has_offsets"), [*itertools.product((1, 2, 3, 4), (True, False))])
def test_feedback_is_brute_force_least_squares(bits, has_offsets):
    W, H = problem(6, 10)
    scales, offsets = grids(6, bits, has_offsets)
    fit, E = solve.feedback(W, inverse_factor(H), scales, offsets)
    q = bcq.values(*fit)
    for n in range(6):
        signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=bits))).double()
        levels = signs @ scales[:, n].double() + (offsets[n].double() if has_offsets else 0)
        expected = brute_feedback(W[n], H, levels)
        assert torch.allclose(q[n].double(), expected, atol=1e-5), f"{bits=} {has_offsets=} {n=} {q[n]=} {expected=}"
    loss = solve.loss(W, q, H)
    assert torch.allclose(E.square().sum(1), loss, rtol=1e-3), f"{bits=} {E.square().sum(1)=} {loss=}"


@pytest.mark.parametrize("has_offsets", [True, False])
def test_refit_is_least_squares_in_the_metric(has_offsets):
    W, H = problem(5, 24)
    planes = torch.rand(2, 5, 24, generator=torch.Generator().manual_seed(3)) < 0.5
    whiten = torch.linalg.cholesky(H)
    scales, offsets = bcq.refit(planes, W, has_offsets, whiten)
    design = bcq.design_matrix(planes, has_offsets).double()
    for n in range(5):
        A, y = whiten.double().T @ design[n].T, whiten.double().T @ W[n].double()
        expected = torch.linalg.lstsq(A, y[:, None]).solution[:, 0]
        got = torch.cat([scales[:, n], offsets[n : n + 1]] if has_offsets else [scales[:, n]])
        assert torch.allclose(got.double(), expected, atol=1e-3), f"{n=} {got=} {expected=}"


def test_canonical_keeps_the_values():
    random = torch.Generator().manual_seed(0)
    planes, scales = torch.rand(3, 7, 12, generator=random) < 0.5, torch.randn(3, 7, generator=random).half().float()
    fit = bcq.canonical(planes, scales, None)
    assert (fit.scales >= 0).all()
    assert (fit.scales[:-1] >= fit.scales[1:]).all()
    assert torch.allclose(bcq.values(*fit), bcq.values(planes, scales, None), atol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_more_rounds_never_hurt_a_group(bits):
    W, H = problem(8, 32)
    U = inverse_factor(H)
    losses = [solve.solve_group(W, U, bits, True, rounds, ("range", "greedy"))[1].square().sum(1) for rounds in range(6)]
    for before, after in itertools.pairwise(losses):
        assert (after <= before).all(), f"{bits=} {before=} {after=}"
    alone = solve.solve_group(W, U, bits, True, 5, ("greedy",))[1].square().sum(1)
    assert (losses[-1] <= alone * (1 + 1e-5)).all(), "a start more made it worse"


@pytest.mark.parametrize(
    ("bits", "K", "g", "has_offsets"), [(1, 64, 32, True), (2, 100, 32, True), (3, 96, 96, False), (4, 40, 64, True)]
)
def test_sweeps_never_raise_the_loss_and_beat_the_plain_fit(bits, K, g, has_offsets):
    W, H = problem(16, K)
    about = f"{bits=} {K=} {g=} {has_offsets=}"
    fit = solve.solve(W, H, bits, g, has_offsets)
    assert fit.planes.shape == (bits, 16, K), about
    assert fit.scales.shape == (bits, 16, -(-K // g)), about
    losses = [solve.loss(W, solve.dense(solve.descend(W, H, fit, g, sweeps), g), H) for sweeps in range(5)]
    for before, after in itertools.pairwise(losses):
        assert (after <= before * (1 + 1e-4)).all(), f"{about} {before=} {after=}"
    swept = solve.descend(W, H, fit, g, 2)
    for part in (swept.scales, swept.offsets):
        assert part is None or torch.equal(part, part.half().float()), f"{about}: not as stored"
    plain = torch.cat([bcq.values(*bcq.alternating(part, bits, has_offsets)) for part in W.split(g, 1)], 1)
    assert losses[-1].sum() < solve.loss(W, plain, H).sum(), about


def test_coordinate_steps_are_exact():
    W, H = problem(4, 6)
    fit = solve.solve(W, H, 2, 32, True)
    q = solve.dense(fit, 32)
    moved, new = solve.move_codes(Bcq(fit.planes, fit.scales[:, :, 0], fit.offsets[:, 0]), q, (W - q) @ H, H)
    assert torch.allclose(new, bcq.values(*moved), atol=1e-6)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=2)))
    for n in range(4):
        levels, expected = signs @ fit.scales[:, n, 0] + fit.offsets[n, 0], q[n].double().clone()
        for k in range(6):  # all levels of one weight, the others as they are
            tries = expected.repeat(4, 1)
            tries[:, k] = levels.double()
            e = W[n].double() - tries
            expected = tries[(e @ H.double() * e).sum(1).argmin()]
        assert torch.allclose(new[n].double(), expected, atol=1e-5), f"{n=} {new[n]=} {expected=}"


def test_the_order_of_the_inputs_does_not_matter():
    # with one group, importance decides the order, whatever the order of the inputs was
    W, H = problem(8, 32)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    straight = solve.dense(solve.solve(W, H, 2, 32, True), 32)
    turned = solve.dense(solve.solve(W[:, order], H[order][:, order], 2, 32, True), 32)
    assert torch.allclose(straight[:, order], turned, atol=1e-4)


def test_group_order():
    importance = torch.tensor([1.0, 5.0, 2.0, 9.0, 0.0, 3.0, 7.0])
    assert [part.tolist() for part in solve.group_order(importance, 3)] == [[3, 5, 4], [6], [1, 2, 0]]


def test_uncorrelated_inputs_need_no_feedback():
    W, _ = problem(8, 32)
    fit = solve.solve(W, torch.eye(32), 3, 32, True)
    plain = min(
        (W - bcq.values(*bcq.alternating(W, 3, True, start))).square().sum().item() for start in ("range", "uniform", "greedy")
    )
    assert solve.loss(W, solve.dense(fit, 32), torch.eye(32)).sum().item() <= plain * (1 + 1e-5)


@pytest.mark.parametrize("scale_bits", [16, 8])
def test_layers_with_the_same_inputs_are_solved_as_alone(scale_bits):
    random = torch.Generator().manual_seed(3)
    Ws = [torch.randn(rows, 96, generator=random) * size for rows, size in ((24, 1.0), (7, 0.1), (24, 1.0), (24, 30.0))]
    _, H = problem(1, 96)
    config = QuantConfig(bits=2, group=32, method="feedback", scale_bits=scale_bits)
    layers = [config.layer("q_proj")._replace(bits=bits) for bits in (2, 2, 3, 2)]
    together = solve_layers(Ws, H, layers, config)
    for W, layer, (packed, before, after) in zip(Ws, layers, together, strict=True):
        alone, plain, error = solve_layer(W, H, layer, config)
        about = f"{layer.bits=} {W.shape=}"
        assert highest(packed).codes.shape == highest(alone).codes.shape, about
        assert before == plain, about
        assert after == pytest.approx(error, rel=0.01), about  # starts are alternating fits that end together
        e = (W - weight(packed, layer, 96)).double()
        exact = ((e @ H.double() * e).sum() / (W.double() @ H.double() * W.double()).sum()).sqrt().item()
        assert after == pytest.approx(exact, rel=1e-3), about
