"""Folded scales: the function of a block stays, the error searched for never rises, the checkpoint holds what was folded."""

import dataclasses

import pytest
import torch
from conftest import crash_before
from safetensors.torch import load_file

from lutq import calib, hf, store, transform
from lutq.blocks import Blocks, visit_inputs
from lutq.calib import read_calibration
from lutq.config import QuantConfig
from lutq.errors import LutqError
from lutq.fit import fit
from lutq.pack import dequantize
from lutq.quantize import quantize_checkpoint
from lutq.refine import block_error
from lutq.structure import decoder_blocks
from lutq.tokens import load_tokenizer
from lutq.transform import fold, places, quantized, scale_block, scaled, scales_of, search

SMALL = {"bits": 3, "group": 32, "method": "feedback", "calib_windows": 4, "calib_length": 48, "rounds": 0, "sweeps": 0}
SMALL |= {"iterations": 2, "scaling": True}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = {"input_layernorm": QKV, "self_attn.v_proj": ("self_attn.o_proj",), "mlp.up_proj": ("mlp.down_proj",)}
GATED |= {"post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj")}
AFTER = {"self_attn.v_proj": ("self_attn.out_proj",), "fc1": ("fc2",)}  # norms of the residual stream itself cannot absorb
EXPECTED = {"opt": AFTER | {"self_attn_layer_norm": QKV, "final_layer_norm": ("fc1",)}, "opt-postnorm": AFTER}


@pytest.fixture(autouse=True)
def shorter(monkeypatch):
    """The first pages of the text and few exponents, which take less time."""
    monkeypatch.setattr(transform, "ALPHAS", (0.3,))
    text, source = calib.calibration_text("books")
    monkeypatch.setattr(calib, "calibration_text", lambda _: (text[:6000], source))


def walk_of(folder):
    """A walk, what enters its first block, and a LayerConfig for every Linear layer of the blocks."""
    walk = Blocks(hf.load(folder, device="cpu", dtype="float32"), torch.device("cpu"))
    hidden = walk.embed(read_calibration("books", load_tokenizer(folder), 4, 48, 0).windows)
    prefix = decoder_blocks(walk.model)
    linears = [name for name, module in walk.model.named_modules() if isinstance(module, torch.nn.Linear)]
    layer = QuantConfig(**SMALL).layer("any")
    return walk, hidden, {name: layer for name in linears if name.startswith(f"{prefix}.")}


def test_folding_keeps_the_function(tiny, family):
    walk, hidden, layers = walk_of(tiny(family))
    random = torch.Generator().manual_seed(0)
    for i, block in enumerate(walk.blocks):
        before = walk.through(block, i, hidden)
        state = {name: tensor.clone() for name, tensor in block.state_dict().items()}
        found = places(walk, i, hidden[:1], layers)
        assert all(torch.equal(tensor, state[name]) for name, tensor in block.state_dict().items()), f"{family=} {i=}"
        named = {place.source: tuple(sorted(place.readers)) for place in found}
        expected = {source: tuple(sorted(names)) for source, names in EXPECTED.get(family, GATED).items()}
        assert named == expected, f"{family=} {i=}"
        for place in found:
            s = torch.exp(2 * torch.randn(len(block.get_submodule(place.source).weight), generator=random).clamp(-1, 1))
            fold(block, place, s)
        after = walk.through(block, i, hidden)
        error = ((after - before).norm() / before.norm()).item()
        assert error < 1e-5, f"{family=} {i=} {error=}"
        hidden = before


def test_nothing_is_folded_that_would_change_the_function(tiny):
    walk, hidden, layers = walk_of(tiny("opt"))
    walk.blocks[0].activation_fn = torch.nn.GELU()
    assert "fc1" not in [place.source for place in places(walk, 0, hidden[:1], layers)]
    walk, hidden, layers = walk_of(tiny("llama"))
    walk.model.config.head_dim = 8  # half of what it is: heads would be mixed up
    assert "self_attn.v_proj" not in [place.source for place in places(walk, 0, hidden[:1], layers)]
    fewer = {name: layer for name, layer in layers.items() if "gate_proj" not in name}
    found = [place.source for place in places(walk, 0, hidden[:1], fewer)]
    assert "post_attention_layernorm" not in found, "a layer that is kept as it is would change"
    assert "input_layernorm" in found


def test_scales_of_a_shared_head():
    random = torch.Generator().manual_seed(0)
    x, w = torch.rand(12, generator=random) + 0.1, torch.rand(12, generator=random) + 0.1
    channels = torch.tensor([0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3])
    got = scales_of(x, w, channels, 0.3, 0.5).double()
    means = [[v[channels == c].double().mean() for c in range(4)] for v in (x, w)]
    expected = torch.stack([a**0.3 / b**0.5 for a, b in zip(*means, strict=True)])
    expected /= expected.log().mean().exp()
    assert torch.allclose(got, expected, rtol=1e-5), f"{got=} {expected=}"
    dead = scales_of(torch.tensor([0.0, 1e9]), torch.tensor([0.0, 1.0]), torch.arange(2), 1.0, 1.0)
    assert torch.isfinite(dead).all(), f"{dead=}"
    assert (dead > 0).all(), f"{dead=}"


@pytest.mark.parametrize("method", ["alternating", "feedback"])
def test_search_gains_where_channels_differ(tiny, method):
    walk, hidden, layers = walk_of(tiny("llama"))
    random, block = torch.Generator().manual_seed(0), walk.blocks[0]
    for name in ("input_layernorm", "post_attention_layernorm"):
        norm = block.get_submodule(name)
        norm.weight.data = torch.exp(1.5 * torch.randn(norm.weight.shape, generator=random))
    config = QuantConfig(**SMALL | {"method": method})
    original = walk.through(block, 0, hidden)
    state = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    for place in places(walk, 0, hidden[:1], layers):
        about = f"{method=} {place.source=}"
        s, before, after = search(walk, 0, hidden, place, layers, config)
        assert all(torch.equal(tensor, state[name]) for name, tensor in block.state_dict().items()), about
        assert after <= before, f"{about} {before=} {after=}"
        if method == "alternating" and "norm" in place.source:  # feedback sees the inputs itself
            assert after < 0.9 * before, f"{about} {before=} {after=}"
        weights, (K,) = [state[f"{name}.weight"] for name in place.readers], place.channels.shape
        seen = []
        visit_inputs(walk, 0, hidden, place.readers[0], lambda x, seen=seen, K=K: seen.append(x.reshape(-1, K)))
        x = torch.cat(seen)
        for scales, expected in ((torch.ones_like(s), before), (s, after)):
            settings = [config.layer("any")] * len(weights)
            Qs = quantized(weights, x.T @ x / len(x), scales[place.channels], settings, config)
            for name, Q in zip(place.readers, Qs, strict=True):
                block.get_submodule(name).weight.data = Q
            got = block_error(walk.through(block, 0, hidden), original).item()
            block.load_state_dict(state)
            assert got == pytest.approx(expected, rel=1e-2), f"{about} {got=} {expected=}"


def test_quantized_is_the_fit_of_the_scaled_weights():
    random = torch.Generator().manual_seed(0)
    x, W = torch.randn(200, 64, generator=random), torch.randn(16, 64, generator=random)
    s, config = torch.rand(64, generator=random) + 0.5, QuantConfig(bits=2, group=32, scaling=True)
    layer = config.layer("any")
    expected = dequantize(*fit(W * s, layer, config), 32, "bcq", 64).double() / s.double()
    (got,) = quantized([W], x.T @ x / 200, s, [layer], config)
    assert torch.allclose(got.double(), expected, rtol=1e-5), f"{(got - expected).abs().max()=}"


def test_scaled_is_what_was_folded(tiny):
    for family in ("opt", "llama"):
        walk, hidden, layers = walk_of(tiny(family))
        block, said = walk.blocks[0], []
        state = {name: tensor.clone() for name, tensor in block.state_dict().items()}
        before = walk.through(block, 0, hidden)
        scales = scale_block(walk, 0, hidden, layers, QuantConfig(**SMALL), said.append)
        error = ((walk.through(block, 0, hidden) - before).norm() / before.norm()).item()
        assert error < 1e-5, f"{family=} {error=}"
        assert len(said) == 4, f"{family=} {said=}"
        assert any((s != 1).any() for s in scales.values()), f"{family=}: nothing was scaled"
        for short, linear in block.named_modules():
            if isinstance(linear, torch.nn.Linear):
                got = scaled(state[f"{short}.weight"], f"{walk.name(0)}.{short}", scales)
                assert torch.allclose(got, linear.weight, rtol=1e-6), f"{family=} {short=}"


@pytest.mark.parametrize("family", ["opt", "qwen2"])
def test_checkpoint_holds_the_scaled_model(tiny, family, tmp_path):
    config = QuantConfig(**SMALL | {"method": "alternating", "bits": 4, "refine": 1})
    report = quantize_checkpoint(tiny(family), tmp_path / "out", config, device="cpu", dtype="float32")
    one = {layer.name: (layer.error / layer.norm) ** 0.5 for layer in report.layers}
    plain = dataclasses.replace(config, scaling=False)
    report = quantize_checkpoint(tiny(family), tmp_path / "plain", plain, device="cpu", dtype="float32")
    for layer in report.layers:
        assert one[layer.name] < 1.5 * (layer.error / layer.norm) ** 0.5, f"{family=} {layer.name=} {one[layer.name]=}"
    tokens = read_calibration("books", load_tokenizer(tiny(family)), 4, 48, 0).windows
    with torch.inference_mode():
        expected, got, other = (
            hf.load(folder, device="cpu", dtype="float32")(tokens).logits
            for folder in (tiny(family), tmp_path / "out", tmp_path / "plain")
        )
    errors = [((logits - expected).norm() / expected.norm()).item() for logits in (got, other)]
    assert errors[0] < 1.2 * errors[1], f"{family=} {errors=}"


def test_interrupted_goes_on_bit_for_bit(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "APART", 0)  # hidden states are kept after every block
    config = QuantConfig(**SMALL | {"method": "alternating"})
    quantize_checkpoint(tiny("llama"), tmp_path / "whole", config, device="cpu")

    for last in ("block-1", "hidden-2"):  # two blocks
        with crash_before(last):
            quantize_checkpoint(tiny("llama"), tmp_path / "out", config, device="cpu")
    quantize_checkpoint(tiny("llama"), tmp_path / "out", config, device="cpu")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    for name in ("config.json", "README.md"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def test_uniform_grids_are_refused():
    with pytest.raises(LutqError, match="scaling is for BCQ grids"):
        QuantConfig(method="rtn", scaling=True)
    assert QuantConfig(scaling=True).calibrated
