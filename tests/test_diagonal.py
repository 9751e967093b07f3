"""Learned scales: gradients against finite differences, the folded function, held-out errors that never rise, and resuming."""

import copy
import dataclasses
import itertools

import pytest
import torch
from conftest import crash_before
from safetensors.torch import load_file

from lutq import calib, diagonal, hf, transform, uniform
from lutq.blocks import Blocks
from lutq.calib import read_calibration
from lutq.config import LayerConfig, QuantConfig
from lutq.diagonal import Diagonal, fitted_error, learn, learn_block, outputs_with, rounded
from lutq.errors import LutqError
from lutq.quantize import quantize_checkpoint
from lutq.refine import block_error, split_windows
from lutq.tokens import load_tokenizer
from lutq.transform import fold, places, scaled

SMALL = {"bits": 2, "group": 32, "calib_windows": 8, "calib_length": 48, "iterations": 2, "rounds": 0, "sweeps": 0}
SMALL |= {"learned_scaling": 2}
BOTH = pytest.mark.parametrize("family", ["opt", "llama"])  # the latter with two key-value heads for six query heads


@pytest.fixture(autouse=True)
def shorter(monkeypatch):
    """The first pages of the text and few exponents, which take less time."""
    monkeypatch.setattr(transform, "ALPHAS", (0.3,))
    text, source = calib.calibration_text("books")
    monkeypatch.setattr(calib, "calibration_text", lambda _: (text[:6000], source))


def block_of(folder, config, uneven=True):
    """A walk, what enters its first block and leaves it, LayerConfigs for that block by full name, and its places.

    uneven: the channels of its norms differ, so that there is something to gain.
    """
    walk = Blocks(hf.load(folder, device="cpu", dtype="float32"), torch.device("cpu"))
    hidden = walk.embed(read_calibration("books", load_tokenizer(folder), 8, 48, 0).windows)
    block, random = walk.blocks[0], torch.Generator().manual_seed(0)
    for name, parameter in block.named_parameters():
        if uneven and "norm" in name and name.endswith("weight"):
            parameter.data = torch.exp(torch.randn(parameter.shape, generator=random))
    linears = [name for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)]
    layers = {f"{walk.name(0)}.{name}": config.layer(name) for name in linears}
    return walk, hidden, walk.through(block, 0, hidden), layers, places(walk, 0, hidden[:1], layers)


def short(walk, layers):
    """Names inside the block."""
    return {name.removeprefix(f"{walk.name(0)}."): layer for name, layer in layers.items()}


def ones(block, found):
    return [torch.ones(len(block.get_submodule(place.source).weight)) for place in found]


@pytest.mark.parametrize("layer", [LayerConfig(2, 32), LayerConfig(3, 32, offsets=False), LayerConfig(1, 0)], ids=str)
@pytest.mark.parametrize("K", [64, 76])
def test_rounded_and_its_gradient(K, layer):
    random = torch.Generator().manual_seed(K)
    W = torch.randn(5, K, generator=random, dtype=torch.float64)
    W[0, :32] = 0  # a pruned group
    W.requires_grad_()
    about, g, steps = f"{K=} {layer=}", layer.group or K, 2**layer.bits - 1
    Q = rounded(W, layer)
    weight = torch.randn(Q.shape, generator=random, dtype=torch.float64)
    (Q * weight).sum().backward()

    def sizes(part):
        high, low = part.amax(1), part.amin(1)
        return high.clamp(min=0) - low.clamp(max=0) if layer.offsets else torch.maximum(high, -low)

    fits = []  # of each group: the unclipped code, what was added to get it, the step's part of the range, the step, the center
    for begin in range(0, K, g):
        part = torch.nn.functional.pad(W.detach()[:, begin : begin + g], (0, max(0, begin + g - K)))
        fit = uniform.rtn(part, layer.bits, not layer.offsets)
        center = torch.full((5,), steps / 2) if fit.zero_points is None else fit.zero_points
        x = part / fit.scales[:, None] + center[:, None]
        fits.append((x.round(), x.round() - x, fit.scales / sizes(part).clamp(min=1e-30), fit.scales, center))

    def reference(V):  # what was added stays fixed, in parts of a step, and so does what is clipped
        parts = []
        for begin, (code, off, ratio, scales, center) in zip(range(0, K, g), fits, strict=True):
            part = torch.nn.functional.pad(V[:, begin : begin + g], (0, max(0, begin + g - K)))
            step = torch.where(ratio * sizes(part) > 0, ratio * sizes(part), scales)[:, None]
            u = torch.where((code < 0) | (code > steps), code.clamp(0, steps), part / step + center[:, None] + off)
            parts.append(step * (u - center[:, None]))
        return torch.cat(parts, 1)[:, :K]

    with torch.no_grad():
        assert torch.allclose(Q, reference(W), atol=1e-12), about
        for _ in range(5):
            direction = torch.randn(W.shape, generator=random, dtype=torch.float64)
            direction[0, :32] = 0
            h = 1e-7
            expected = ((reference(W + h * direction) - reference(W - h * direction)) * weight).sum().item() / (2 * h)
            got = (W.grad * direction).sum().item()
            assert got == pytest.approx(expected, rel=1e-5, abs=1e-5), about
        along = (W.grad * W).sum().item()  # Q(c W) = c Q(W) for c > 0, rounding included
        assert along == pytest.approx((Q * weight).sum().item(), rel=1e-9, abs=1e-6), about
    assert torch.isfinite(W.grad).all(), about


@BOTH
def test_learning_folding_and_rounding_agree(tiny, family):
    """The unfolded block with Q(W t) / t is the folded block with Q of its weights, and folding alone changes nothing: fp64."""
    config = QuantConfig(**SMALL)
    walk, hidden, original, layers, found = block_of(tiny(family), config)
    block, random = walk.blocks[0].double(), torch.Generator().manual_seed(0)
    extras = [
        {k: (tuple(t.double() for t in v) if isinstance(v, tuple) else v) for k, v in extra.items()} for extra in walk.extras
    ]
    walk.extras, hidden = extras, hidden[:2].double()
    original = walk.through(block, 0, hidden)
    inside = short(walk, layers)
    start = [torch.exp(torch.randn(s.shape, generator=random).double()) for s in ones(block, found)]
    function = Diagonal(found, start, {name: block.get_submodule(name).weight.clone() for name in inside}, inside)
    with torch.no_grad():
        scales, weights = function.scales(), function.weights()
        unfolded = walk.through(outputs_with(walk, 0, weights), 0, hidden)
        for place, s in zip(found, scales, strict=True):
            assert s.log().mean().abs() < 1e-12, f"{family=} {place.source=}"
            fold(block, place, s)
        error = ((walk.through(block, 0, hidden) - original).norm() / original.norm()).item()
        assert error < 1e-12, f"{family=} {error=}"
        folded = {f"{name}.weight": rounded(block.get_submodule(name).weight, layer) for name, layer in inside.items()}
        difference = (walk.through(outputs_with(walk, 0, folded), 0, hidden) - unfolded).norm() / unfolded.norm()
    assert difference < 1e-9, f"{family=} {difference=}"
    assert block_error(unfolded, original) > 1e-4, f"{family=}: nothing was rounded"


@BOTH
def test_learning_lowers_the_error(tiny, family):
    config = QuantConfig(**SMALL | {"learned_scaling": 24, "rate": 0.02})
    walk, hidden, original, layers, found = block_of(tiny(family), config)
    block, inside = walk.blocks[0], short(walk, layers)
    weights = {name: block.get_submodule(name).weight.detach() for name in inside}
    scales, before, after = learn(walk, 0, hidden, original, [Diagonal(found, ones(block, found), weights, inside)], config)
    assert after < before, f"{family=} {before=} {after=}"
    learned, held_out = split_windows(len(hidden))
    errors = {}
    for name, start in (("no scales", ones(block, found)), ("learned", scales)):
        with torch.no_grad():
            outputs = walk.through(outputs_with(walk, 0, Diagonal(found, start, weights, inside).weights()), 0, hidden)
        errors[name] = [block_error(outputs[part], original[part]).item() for part in (learned, held_out)]
    assert errors["learned"][0] < 0.95 * errors["no scales"][0], f"{family=} {errors=}"
    assert errors["no scales"][1] == pytest.approx(before, rel=1e-3), f"{family=} {errors=}"
    assert errors["learned"][1] == pytest.approx(after, rel=1e-3), f"{family=} {errors=}"
    state = {name: torch.equal(block.get_submodule(name).weight, W) for name, W in weights.items()}
    assert all(state.values()), f"{family=} {state=}: learning touches no weight"


@pytest.mark.parametrize(("family", "method"), [("opt", "alternating"), ("llama", "feedback")])
def test_never_worse_on_held_out_windows(tiny, family, method, monkeypatch):
    """Even at a rate that throws the scales to their limits at once."""
    monkeypatch.setattr(diagonal, "STRIDE", 1e4)
    config = QuantConfig(**SMALL | {"rate": 0.99, "method": method})
    walk, hidden, original, layers, found = block_of(tiny(family), config)
    block, inside, about = walk.blocks[0], short(walk, layers), f"{family=} {method=}"
    weights = {name: block.get_submodule(name).weight.clone() for name in inside}
    _, before, after = learn(walk, 0, hidden, original, [Diagonal(found, ones(block, found), weights, inside)], config)
    assert after <= before, f"{about} {before=} {after=}"
    without = fitted_error(walk, 0, hidden, original, inside, config)
    learn_block(walk, 0, hidden, layers, config, [].append)
    error = fitted_error(walk, 0, hidden, original, inside, config)
    assert error <= without, f"{about} {error=} {without=}"


@pytest.mark.parametrize("scaling", [False, True])
def test_refused_where_the_fit_disagrees(tiny, scaling, monkeypatch):
    config = QuantConfig(**SMALL, scaling=scaling)
    walk, hidden, _, layers, _ = block_of(tiny("llama"), config)
    block, said = walk.blocks[0], []
    state = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    errors = iter([0.1, 0.1, 0.2] if scaling else [0.1, 0.2])
    monkeypatch.setattr(diagonal, "fitted_error", lambda *_: next(errors))
    scales = learn_block(walk, 0, hidden, layers, config, said.append)
    assert said[-1].endswith("learned 0.2000; kept: no scales"), f"{said=}"
    assert all((s == 1).all() for s in scales.values())
    assert all(torch.equal(tensor, state[name]) for name, tensor in block.state_dict().items())


@BOTH
def test_kept_scales_are_what_was_folded(tiny, family):
    config = QuantConfig(**SMALL, scaling=True)
    walk, hidden, original, layers, found = block_of(tiny(family), config)
    block, said = walk.blocks[0], []
    before = copy.deepcopy(block.state_dict())
    scales = learn_block(walk, 0, hidden, layers, config, said.append)
    assert len(said) == len(found) + 1, f"{family=} {said=}"
    assert any((s != 1).any() for s in scales.values()), f"{family=}: nothing was scaled, {said=}"
    error = ((walk.through(block, 0, hidden) - original).norm() / original.norm()).item()
    assert error < 1e-5, f"{family=} {error=}"
    for name in layers:
        inside = name.removeprefix(f"{walk.name(0)}.")
        got = scaled(before[f"{inside}.weight"], name, scales)
        assert torch.allclose(got, block.get_submodule(inside).weight, rtol=1e-6), f"{family=} {name=}"


def test_interrupted_goes_on_bit_for_bit(tiny, tmp_path, monkeypatch):
    config, falling = QuantConfig(**SMALL | {"rate": 0.1}), itertools.count(0, -1)
    monkeypatch.setattr(diagonal, "fitted_error", lambda *_: float(next(falling)))  # what is learned is kept
    quantize_checkpoint(tiny("llama"), tmp_path / "whole", config, device="cpu")
    with crash_before("block-1"):
        quantize_checkpoint(tiny("llama"), tmp_path / "out", config, device="cpu")
    quantize_checkpoint(tiny("llama"), tmp_path / "out", config, device="cpu")
    plain = dataclasses.replace(config, learned_scaling=0, scaling=False, method="alternating")
    quantize_checkpoint(tiny("llama"), tmp_path / "plain", plain, device="cpu")
    one, other, without = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out", "plain"))
    assert one.keys() == other.keys() == without.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert any(not torch.equal(tensor, without[name]) for name, tensor in one.items() if "layernorm" in name)
    for name in ("config.json", "README.md"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def test_settings():
    with pytest.raises(LutqError, match="learned_scaling is for BCQ grids and method is 'rtn'"):
        QuantConfig(method="rtn", learned_scaling=1)
    assert QuantConfig(learned_scaling=1).calibrated
