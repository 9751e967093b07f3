"""Tuning of scales and offsets: gradients against autograd, what is stored, and that no stage ends worse than it began."""

import pytest
import torch
from conftest import random_packed

from lutq.blocks import Blocks
from lutq.config import LayerConfig, QuantConfig
from lutq.distill import distill
from lutq.errors import LutqError
from lutq.hf import load
from lutq.pack import Nested, dequantize, to_tensors, unpack_bits
from lutq.refine import Tuner, divergence, split_windows, tunable_parameters
from lutq.tunable import Tunable, run_at


def layer_and_dense(N, K, layer):
    packed = random_packed(N, K, layer)
    return Tunable(packed, K, layer, torch.nn.Parameter(torch.randn(N))), dequantize(*packed, layer.group, "bcq", K)


@pytest.mark.parametrize(
    "layer", [LayerConfig(2, 32), LayerConfig(3, 64, "bcq", False), LayerConfig(1, 0), LayerConfig(4, 96)], ids=str
)
@pytest.mark.parametrize(("N", "K"), [(8, 96), (5, 100), (3, 20)])
def test_gradients_are_those_of_autograd(N, K, layer):
    module, W = layer_and_dense(N, K, layer)
    x = torch.randn(2, 7, K, requires_grad=True)
    weight = torch.randn(2, 7, N)
    y = module(x)
    assert torch.allclose(y, x @ W.T + module.bias, atol=1e-4), f"{N=} {K=} {layer=}"
    (y * weight).sum().backward()
    dW = (weight.flatten(0, 1).T @ x.detach().flatten(0, 1)).double()
    assert torch.allclose(x.grad, weight @ W, atol=1e-4), f"{N=} {K=} {layer=}"
    for parameter, name in ((module.scales, "scales"), (module.offsets, "offsets")):
        if parameter is None:
            continue
        for index in [(0,) * parameter.dim(), tuple(n - 1 for n in parameter.shape)]:
            with torch.no_grad():  # W is linear in every scale: its derivative is a difference
                parameter[index] += 1
                step = dequantize(module.codes, module.scales, module.offsets, None, layer.group, "bcq", K) - W
                parameter[index] -= 1
            expected = (dW * step.double()).sum().item()
            assert parameter.grad[index].item() == pytest.approx(expected, rel=1e-3, abs=1e-3), (
                f"{name} {index} {N=} {K=} {layer=}"
            )


@pytest.mark.parametrize("K", [96, 100])
def test_stored_form_is_canonical_and_the_same_weight(K):
    layer = LayerConfig(3, 32)
    module, _ = layer_and_dense(6, K, layer)
    with torch.no_grad():
        module.scales.copy_(torch.randn_like(module.scales).half())
    W = dequantize(module.codes, module.scales, module.offsets, None, layer.group, "bcq", K)
    packed = module.packed()
    assert (packed.scales >= 0).all()
    assert (packed.scales[:-1] >= packed.scales[1:]).all()
    assert torch.allclose(dequantize(*packed, layer.group, "bcq", K), W, atol=1e-5), f"{K=}"
    assert packed.scales.dtype == packed.offsets.dtype == torch.float16


@pytest.mark.parametrize("K", [96, 100])
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_codes_follow_latent_weights(bits, K):
    layer = LayerConfig(bits, 32)
    packed, W = random_packed(6, K, layer), torch.randn(6, K)
    fixed, free = Tunable(packed, K, layer, None), Tunable(packed, K, layer, None, W)
    x = torch.randn(9, K)
    assert torch.allclose(free(x), fixed(x), atol=1e-4), f"{bits=} {K=}: the codes moved before any step"
    (free(x) * torch.arange(6)).sum().backward()
    dW = (torch.arange(6.0).expand(9, 6).T @ x).double()
    assert torch.allclose(free.latent.grad.double(), dW, atol=1e-4), f"{bits=} {K=}"
    with torch.no_grad():
        free.latent.copy_(W)
    free(x)
    q = dequantize(free.codes, free.scales, free.offsets, None, 32, "bcq", K)
    stored = dequantize(*free.packed(), 32, "bcq", K)
    assert torch.allclose(q, stored, atol=1e-2), f"{bits=} {K=}"
    levels = {round(value, 3) for value in q[0, :32].tolist()}
    assert len(levels) <= 2**bits, f"{levels=}"
    before = dequantize(*packed, 32, "bcq", K)
    assert ((W - q).abs() <= (W - before).abs() + 1e-3).all(), f"{bits=} {K=}: not the nearest levels"


def regression(rate, epochs=3):
    torch.manual_seed(0)
    module, _ = layer_and_dense(8, 64, LayerConfig(2, 32))
    module = torch.nn.Sequential(module).requires_grad_(requires_grad=False)
    x = torch.randn(16, 32, 64)
    scales = module[0].scales * (1 + 0.3 * torch.rand_like(module[0].scales))
    y = x @ dequantize(module[0].codes, scales, module[0].offsets, None, 32, "bcq", 64).T + module[0].bias

    def loss(windows):
        return (module(x[windows]) - y[windows]).square().mean()

    return module, loss, Tuner(module, loss, 16, 512, epochs, rate, seed=0)


@pytest.mark.parametrize("rate", [0.0, 5e-2, 0.9])
def test_never_ends_worse_than_it_began(rate):
    module, loss, tuner = regression(rate)
    assert set(tuner.parameters) == {"0.scales", "0.offsets", "0.bias"} == set(tunable_parameters(module))
    for _ in range(3):
        list(tuner.run_epoch())
    tuner.finish()
    with torch.no_grad():
        now = loss(tuner.held_out).item()
    assert now <= tuner.first * (1 + 1e-6), f"{rate=} {tuner.first=} {now=}"
    assert now == pytest.approx(tuner.best_loss, rel=1e-5), f"{rate=}"
    if rate == 5e-2:
        assert now < 0.95 * tuner.first, f"{tuner.first=} {now=}: it learns nothing"
    assert not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_is_tuned_by_what_is_no_number(value):
    module, _, tuner = regression(1e-2)
    losses = torch.ones(16).index_fill(0, tuner.held_out[:1], value)  # one window held out is enough
    with pytest.raises(LutqError, match="the loss before tuning is NaN or infinite on the calibration text: give an undamaged"):
        Tuner(module, lambda windows: losses[windows].mean(), 16, 512, 1, 1e-2, seed=0)


def test_predictions_that_overflow_are_not_distilled(tiny):
    walk = Blocks(load(tiny("llama"), device="cpu", dtype="float32"), torch.device("cpu"))
    walk.model.model.norm.weight.fill_(3e38)  # behind the last Linear layer of the blocks: no Hessian sees it
    windows = torch.randint(3, 4000, (2, 8), generator=torch.Generator().manual_seed(0))
    hidden = walk.embed(windows)
    for i, block in enumerate(walk.blocks):
        hidden = walk.through(block, i, hidden)
    assert torch.isfinite(hidden).all()
    with pytest.raises(LutqError, match="the loss before tuning is NaN or infinite on the calibration text"):
        distill(walk, windows, hidden, QuantConfig(distill=1), store=None)


def test_goes_on_bit_for_bit():
    module, _, tuner = regression(1e-2)
    for _ in range(3):
        list(tuner.run_epoch())
    tuner.finish()
    _, _, first = regression(1e-2)
    list(first.run_epoch())
    again, _, second = regression(1e-2)
    second.restore(first.state())
    while second.epoch < 3:
        list(second.run_epoch())
    second.finish()
    for (name, one), other in zip(module.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def several(N=6, K=64):
    """A module of 3, 2 and 1 bits, and the dense weights of each."""
    packed, layer = random_packed(N, K, LayerConfig(3, 32)), LayerConfig(3, 32)
    lower = {}
    for bits in (1, 2):
        other = random_packed(N, K, layer._replace(bits=bits))
        lower |= {f"scales_{bits}bit": other.scales, f"offsets_{bits}bit": other.offsets}
    form = Nested(packed, lower)
    dense = {bits: dequantize(*form.at(bits), 32, "bcq", K) for bits in (1, 2, 3)}
    return torch.nn.Sequential(Tunable(form, K, layer, torch.nn.Parameter(torch.randn(N)))), dense, form


def test_each_precision_runs_and_learns_its_own_grid():
    module, dense, form = several()
    x, names = torch.randn(5, 64), {1: "_1bit", 2: "_2bit", 3: ""}
    for bits, W in dense.items():
        run_at(module, bits)
        expected = {f"0.{part}{names[bits]}" for part in ("scales", "offsets")}
        assert set(tunable_parameters(module)) == expected, f"{bits=}: more than its grid"
        y = module(x)
        assert torch.allclose(y, x @ W.T + module[0].bias, atol=1e-4), f"{bits=}"
        module.zero_grad()
        weight = torch.randn_like(y)
        (y * weight).sum().backward()
        for name, p in module.named_parameters():
            assert (p.grad is None) == (name not in {*expected, "0.bias"}), f"{bits=} {name}"
        signs = 2 * unpack_bits(form.highest.codes[:bits], 64).double() - 1
        dscales = ((weight.T @ x).double() * signs).unflatten(2, (2, 32)).sum(3)
        found = module.get_parameter(f"0.scales{names[bits]}").grad.double()
        assert torch.allclose(found, dscales, atol=1e-3), f"{bits=} {found=} {dscales=}"
    stored, expected = to_tensors(module[0].packed()), to_tensors(form)
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_shared_codes_keep_scales_from_turning(bits):
    module, dense, _ = several()
    run_at(module.requires_grad_(requires_grad=False), bits)
    x, seen = torch.randn(16, 32, 64), []
    y = x @ -dense[bits].T  # what only negative scales could give

    def loss(windows):
        seen.append(min(p.min().item() for name, p in module.named_parameters() if "scales" in name))
        return (module(x[windows]) - y[windows]).square().mean()

    tuner = Tuner(module, loss, 16, 512, 3, 0.3, seed=0)
    for _ in range(3):
        list(tuner.run_epoch())
    tuner.finish()
    assert min(seen) == 0, f"{bits=} {min(seen)=}: no scale came to its bound, or one went beyond"
    assert tuner.best_loss < tuner.first, f"{bits=}"


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 64])
def test_held_out_windows_are_not_learned(count):
    learned, held_out = split_windows(count)
    assert len(learned) > 0
    assert len(held_out) > 0
    if count > 1:
        assert sorted([*learned.tolist(), *held_out.tolist()]) == list(range(count)), f"{count=}"


def test_divergence():
    p, q = torch.randn(3, 5, 11).double(), torch.randn(3, 5, 11).double()
    assert divergence(p, p).item() == pytest.approx(0, abs=1e-6)
    expected = (q.softmax(-1) * (q.log_softmax(-1) - p.log_softmax(-1))).sum(-1).mean().item()
    assert divergence(p, q).item() == pytest.approx(expected, rel=1e-5)
