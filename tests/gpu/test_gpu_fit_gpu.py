"""The fits' kernels against the torch operations that they stand for."""

import pytest
import torch

from lutq import bcq, gpu_fit, tunable, uniform
from lutq.config import LayerConfig
from lutq.fit import pack

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

LAYERS = ((1, 1, 0), (5, 33, 0), (70, 100, 32), (64, 256, 64), (33, 1100, 0), (40, 514, 128))  # N, K, group
SHAPES = ((1, 1), (3, 32), (200, 33), (1000, 128), (7, 4096))


def groups(R, g):
    """Weights [R, g], some rows constant or zero, and factors [g] of their errors, on the CPU."""
    random = torch.Generator().manual_seed(0)
    w = torch.randn(R, g, generator=random) * torch.rand(R, 1, generator=random)
    w[2::50] = 0
    w[3::50] = 0.25
    return w, torch.rand(g, generator=random) + 0.1


def alike(a, b, share=0.99):
    """Whether that share of two tensors is the same but for rounding."""
    return torch.isclose(a.cpu(), b, rtol=2e-3, atol=1e-6).float().mean() >= share


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize(("symmetric", "clip"), [(False, True), (True, True), (False, False)])
@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize(("R", "g"), SHAPES)
def test_search(R, g, bits, symmetric, clip, weighed):
    w, whiten = groups(R, g)
    settings = bits, symmetric, uniform.SHRINKS if clip else 1, uniform.LOWEST
    expected = uniform.search_grid(w, *settings, whiten if weighed else None)
    found = gpu_fit.search_grid(w.cuda(), *settings, whiten.cuda() if weighed else None)
    errors = []
    for scales, center in (expected, [tensor.cpu() for tensor in found]):
        u = uniform.round_to_grid(w, scales, center, bits)
        e = (w - scales[:, None] * (u - center[:, None])) * (whiten if weighed else 1)
        errors.append(e.double().square().sum(1))
    assert torch.allclose(*errors, rtol=1e-4, atol=1e-10), f"{(errors[0] - errors[1]).abs().max()=}"
    again = gpu_fit.search_grid(w.cuda(), *settings, whiten.cuda() if weighed else None)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("has_offsets", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("R", "g"), SHAPES)
def test_round(R, g, bits, has_offsets, weighed):
    """One round: errors, the best grid and the next one."""
    w, whiten = groups(R, g)
    whiten = whiten if weighed else None
    scales, offsets = bcq.greedy_grid(w, bits, has_offsets)
    results = []
    for device in ("cpu", "cuda"):
        grid = [t if t is None else t.to(device) for t in (scales, offsets)]
        stored = bcq.storable(*grid)
        half_are_better = torch.where(torch.arange(R, device=device) % 2 == 0, torch.inf, 0.0)
        best = bcq.Best(torch.zeros_like(stored[0]), None if offsets is None else torch.zeros_like(stored[1]), half_are_better)
        judge = bcq.judge_grid if device == "cpu" else bcq.judge_on_gpu
        error, refitted = judge(w.to(device), *grid, None if whiten is None else whiten.to(device), best)
        results.append((error, *best, *refitted()))
    error, best_scales, best_offsets, best_error, new_scales, new_offsets = results[0]
    assert alike(results[1][0], error)
    assert torch.equal(results[1][1].cpu(), best_scales)
    assert has_offsets is False or torch.equal(results[1][2].cpu(), best_offsets)
    assert alike(results[1][3], best_error)
    size = w.abs().amax(1)
    regular = torch.isfinite(new_scales).all(0) & (size > 0) & (error > 1e-6 * size**2)  # of others a ridge decides
    off = (results[1][4].cpu() - new_scales).abs().amax(0)
    if has_offsets:
        off = off.maximum((results[1][5].cpu() - new_offsets).abs())
    assert (off[regular] <= 2e-3 * size[regular]).float().mean() >= 0.98 if regular.any() else True


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_systems(n):
    random = torch.Generator().manual_seed(n)
    design = torch.randn(777, n, 3 * n, generator=random)
    gram, target = design @ design.mT, torch.randn(777, n, generator=random)
    found = bcq.solve(gram.cuda(), target.cuda()).cpu()
    assert torch.allclose(found, bcq.eliminate(gram, target), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("start", ["range", "best"])
@pytest.mark.parametrize(("bits", "g"), [(2, 128), (3, 96), (4, 64)])
def test_alternating(bits, g, start, monkeypatch):
    """As good as on the CPU, with codes that are nearest, and the kernel is what runs."""
    w, whiten = groups(500, g)
    rounds = []
    kernel = gpu_fit.alternate
    monkeypatch.setattr(gpu_fit, "alternate", lambda *tensors: (rounds.append(1), kernel(*tensors))[1])
    fits = [bcq.alternating(w.to(d), bits, True, start, whiten=whiten.to(d)) for d in ("cuda", "cpu")]
    assert rounds
    errors = [((w - bcq.values(*(tensor.cpu() for tensor in fit))) * whiten).square().sum().item() for fit in fits]
    assert abs(errors[0] / errors[1] - 1) < 0.02, f"{errors=}"
    assert torch.equal(fits[0].planes, bcq.nearest(w.cuda(), fits[0].scales, fits[0].offsets)[0])


@pytest.fixture
def by_torch(monkeypatch):
    """Call it, and everything after runs by torch operations."""
    return lambda: monkeypatch.setattr(gpu_fit, "usable", lambda tensor: False)


@pytest.mark.parametrize("has_offsets", [False, True])
@pytest.mark.parametrize(
    ("N", "K", "group"), [(1, 1, 0), (5, 33, 0), (70, 100, 32), (64, 256, 64), (33, 1100, 0), (40, 514, 128)]
)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_layer(bits, N, K, group, has_offsets, by_torch):
    """A layer with codes that are learned: what it computes, its gradients and its codes, by the kernels and by torch."""
    random = torch.Generator().manual_seed(0)
    W, x = torch.randn(N, K, generator=random), torch.randn(3, 2, K, generator=random).cuda()
    G = -(-K // group) if group else 1
    scales = (1 + torch.rand(bits, N * G, generator=random)) / 3.0 ** torch.arange(bits)[:, None]  # no two levels are equal
    scales, offsets = bcq.storable(scales, 0.1 * torch.randn(N * G, generator=random))
    planes = torch.rand(bits, N, K, generator=random) < 0.5
    fit = bcq.Bcq(planes, scales.view(bits, N, G), offsets.view(N, G) if has_offsets else None)
    packed = type(pack(fit))(*(None if t is None else t.cuda() for t in pack(fit)))
    results = []
    for _ in range(2):
        layer = tunable.Tunable(packed, K, LayerConfig(bits, group, "bcq", has_offsets), None, W.cuda()).cuda()
        with torch.no_grad():
            layer.scales[0] *= -1  # as a step may leave them
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        y.square().sum().backward()
        grads = [layer.scales.grad, *([layer.offsets.grad] if has_offsets else []), layer.latent.grad, inputs.grad]
        results.append((y.detach(), layer.codes, *grads))
        by_torch()
    for number, (found, expected) in enumerate(zip(*results, strict=True)):
        size = float(expected.abs().max())
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * size), f"{number=} {(found - expected).abs().max()=}"
